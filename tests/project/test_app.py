"""The Flower app as it is shipped: bundle, presets, README's tables."""

from __future__ import annotations

import io
import re
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fedzge_flwr import __version__
from fedzge_flwr.config.parsing import from_run_config
from tests.helpers.fabricate import make_dataset
from tests.helpers.pages import PAGES
from tests.helpers.paths import ROOT
from tests.helpers.running import rows_of, run_server

FOLDER = ROOT / "fedzge_flwr" / "config" / "presets"
PAPER = FOLDER / "paper.toml"
PRESETS = sorted(set(FOLDER.glob("*.toml")) - {PAPER})
LARGE = {"cifar10-hetero-a1", "cifar100-homo-a1"}


def read_preset(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def test_version_is_the_same_everywhere() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_bundle_holds_what_it_needs_and_nothing_else() -> None:
    from flwr.cli.build import build_fab_from_disk

    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(ROOT))) as bundle:
        names = set(bundle.namelist())
    needed = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedzge_flwr").rglob("*.py")}
    needed |= {path.relative_to(ROOT).as_posix() for path in (PAPER, *PRESETS)}
    needed |= {"server_app.py", "client_app.py", "pyproject.toml", "LICENSE"}
    # Flower adds its own manifest.
    assert {name for name in names if not name.startswith(".info/")} == needed


def test_components_load_from_pyproject() -> None:
    from flwr.cli.config_utils import load_and_validate

    config, warnings = load_and_validate(ROOT / "pyproject.toml")
    assert not warnings
    assert config["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "server_app:app",
        "clientapp": "client_app:app",
    }


def test_there_is_a_preset_for_each_published_command() -> None:
    assert {path.stem for path in PRESETS} == {
        f"{dataset}-{kind}-a{alpha}"
        for dataset in ("cifar10", "cifar100")
        for kind in ("homo", "hetero")
        for alpha in ("1", "0.1")
    }


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset_is_the_published_command(path: Path) -> None:
    settings = from_run_config(read_preset(path))
    dataset, kind, alpha = path.stem.split("-")
    assert settings.data.dataset == dataset
    assert settings.data.alpha == float(alpha.removeprefix("a"))
    assert (settings.run.num_server_rounds, settings.run.num_clients) == (100, 10)
    models = [settings.training.model_of(number) for number in range(10)]
    if kind == "homo":
        assert {settings.distillation.central_model, *models} == {"resnet18"}
    else:
        assert settings.distillation.central_model == "resnet50"
        assert models == ["resnet18"] * 3 + ["resnet34"] * 3 + ["resnet50"] * 4
    defaults = from_run_config(read_preset(PAPER))
    changed = {
        key
        for key, value in settings.to_run_config().items()
        if value != defaults.to_run_config()[key]
    }
    assert changed <= {"dataset", "alpha", "num-server-rounds", "central-model", "local-models"}


def test_every_preset_is_whole_and_builds_on_the_papers() -> None:
    """Flower takes one file: what the presets share is in each, and the same."""
    paper = read_preset(PAPER)
    defaults = from_run_config({}).to_run_config()
    assert all(value != defaults[key] for key, value in paper.items())
    for path in PRESETS:
        assert paper.items() <= read_preset(path).items(), path.name


def test_presets_of_a_kind_differ_in_alpha_alone() -> None:
    """And those of several architectures in the data set, so that one of each need be run."""
    for path in PRESETS:
        of_kind = read_preset(path.with_name(re.sub("-a[0-9.]+$", "-a1", path.stem) + ".toml"))
        assert {**read_preset(path), "alpha": 1.0} == of_kind
    ten, hundred = (
        read_preset(PRESETS[0].with_name(f"{name}-hetero-a1.toml"))
        for name in ("cifar10", "cifar100")
    )
    assert {**hundred, "dataset": "cifar10"} == ten


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in LARGE else ())
        for path in PRESETS
        if path.stem.endswith("-a1") and path.stem != "cifar100-hetero-a1"
    ],
)
def test_preset_runs_a_tiny_round(path: Path, make_grid: Any, tmp_path: Path) -> None:
    preset = read_preset(path)
    make_dataset(preset["dataset"], tmp_path / "data")
    heterogeneous = "," in preset["local-models"]
    config = {
        **preset,
        "data-dir": str(tmp_path / "data"),
        "output-dir": str(tmp_path / "runs"),
        "run-name": "run",
        "num-server-rounds": 1,
        # One of each architecture where they differ, by the models' own order.
        "num-clients": 3 if heterogeneous else 2,
        "local-models": "resnet18,resnet34,resnet50" if heterogeneous else preset["local-models"],
        "min-partition-size": 0,
        "num-train-images": 40,
        "num-test-images": 4,
        "local-epochs": 1,
        "central-distill-steps": 1,
        "client-distill-steps": 1,
        "synthetic-batch-size": 2,
        "client-evaluation": "off",
        "q": 1,
    }
    (row,) = rows_of(run_server(make_grid(config), config))
    assert row["missing"] == []
    assert row["queries_per_client"] == 4


def test_every_original_flag_is_mapped() -> None:
    readme = (ROOT / "docs" / "reproducing.md").read_text()
    flags = re.findall(r"^\| `--(\w+)`.*?\| (.+?) \|$", readme, re.MULTILINE)
    known = from_run_config({}).to_run_config()
    assert {flag for flag, _ in flags} >= {
        *("algorithm", "seed", "K", "C", "R", "E1", "E2", "E3", "data_dir", "dataset"),
        *("batch_size", "partition", "alpha", "central_model", "global_model", "local_models"),
        *("optimizer", "scheduler", "lr_k", "momentum", "weight_decay", "generator", "nz"),
        *("lr_G", "lr", "synthetic_size", "temperature", "beta1", "beta2", "beta3", "q", "eps"),
        *("dis_epochs", "dis_lr", "output_dir"),
    }
    for flag, meaning in flags:
        for key in re.findall(r"`([a-z0-9-]+)`", meaning.split(":")[0]):
            assert key in known, (flag, key)


def test_documented_commands_keep_flower_from_building_an_environment() -> None:
    for path in (*PAGES, PAPER, *PRESETS):
        text = path.read_text().replace("\\\n#   ", "").replace("\\\n", "")
        for line in text.splitlines():
            if line.lstrip("# ").startswith(("flwr run", "FLWR_")):
                assert "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1" in line, (path, line)
