"""The examples run, and say what they are."""

from __future__ import annotations

import difflib
import io
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedzge_flwr.compare.app import run_here
from fedzge_flwr.compare.results import all_in
from fedzge_flwr.launch.session import executable, session
from fedzge_flwr.launch.simulate import environment
from fedzge_flwr.launch.submission import CONNECTION, submit
from tests.helpers.paths import ROOT
from tests.helpers.superlink import start_superlink

EXAMPLES = ROOT / "examples"
QUICKSTART, MIXED, YOURS, TABULAR, COMPARISON = (
    EXAMPLES / name
    for name in ("quickstart-strategy", "mixed-black-boxes", "your-data", "tabular", "comparison")
)


def run(folder: Path, num_nodes: int, overrides: str) -> str:
    """Run an example in a process of its own, with few steps; return what it printed."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.helpers.run_example",
            str(folder),
            str(num_nodes),
            overrides,
            "20",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_on_ray(folder: Path, num_nodes: int, overrides: str) -> str:
    """Run an example as its README says, by ``flwr run`` on a real SuperLink."""
    with session({}, environment) as launch:
        start_superlink(launch)
        submit(
            launch,
            [
                *(executable("flwr"), "run", folder, CONNECTION, "--stream"),
                *("--run-config", overrides, "--federation-config", f"num-supernodes={num_nodes}"),
            ],
            f"running {folder.name}",
        )
        return launch.log("flower").read_text()


def changed_lines(name: str) -> tuple[list[str], str]:
    """The lines that are new or changed, and the whole difference."""
    before, after = (
        (QUICKSTART / part / name).read_text().splitlines(keepends=True) for part in ("before", ".")
    )
    diff = list(difflib.unified_diff(before, after, f"before/{name}", name, n=1))
    return [line for line in diff[2:] if line[0] == "+" and line.strip() != "+"], "".join(diff)


@pytest.mark.parametrize("name", ["client_app.py", "server_app.py"])
def test_the_strategy_is_adopted_in_a_few_lines(name: str) -> None:
    """At most 20 on either side, what both share included; the README shows them as they are."""
    added, diff = changed_lines(name)
    shared = [line for line in (QUICKSTART / "shared.py").read_text().splitlines() if line]
    assert 0 < len(added) + len(shared) <= 20
    assert diff in (QUICKSTART / "README.md").read_text()
    assert (QUICKSTART / "shared.py").read_text() in (QUICKSTART / "README.md").read_text()


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    out = run(QUICKSTART, 2, f'num-server-rounds=2\nnum-clients=2\noutput="{tmp_path}/central.pt"')
    found = [float(value) for value in re.findall(r"central ([\d.]+) %", out)]
    assert len(found) == 2
    assert found[-1] > 60
    assert "WARNING" not in out
    assert (tmp_path / "central.pt").stat().st_size > 100_000


@pytest.mark.slow
def test_the_quickstart_was_a_working_app_before(tmp_path: Path) -> None:
    """Its own endpoints are still there beside those of the strategy."""
    before = (QUICKSTART / "before" / "server_app.py").read_text()
    for file in QUICKSTART.glob("*.*"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "server_app.py").write_text(before)
    out = run(tmp_path, 3, f'num-server-rounds=2\nnum-clients=3\noutput="{tmp_path}/c.pt"')
    (found,) = re.findall(r"2: \{'eval_loss': [^}]*'eval_acc': '([\d.e+-]+)'", out)
    assert float(found) > 0.5


SHORT_TABLE = 'num-server-rounds=3\nrows-a-round=200\nboosting=false\ntable="wine"'


@pytest.mark.parametrize("strategy", ["fedzge", pytest.param("fedavg", marks=pytest.mark.slow)])
def test_a_table(strategy: str) -> None:
    out = run(TABULAR, 4, f'{SHORT_TABLE}\nstrategy="{strategy}"')
    found = [float(value) for value in re.findall(r"round \d: ([\d.]+)%", out)]
    assert len(found) == 4
    assert found[-1] > 80


@pytest.mark.slow
def test_a_table_on_ray() -> None:
    out = run_on_ray(TABULAR, 4, 'table="breast-cancer" num-server-rounds=4 rows-a-round=200')
    assert float(re.findall(r"round 4: ([\d.]+)%", out)[0]) > 85


@pytest.mark.slow
def test_quickstart_on_ray(tmp_path: Path) -> None:
    overrides = f'num-server-rounds=2 num-clients=3 output="{tmp_path}/central.pt"'
    out = run_on_ray(QUICKSTART, 3, overrides)
    assert float(re.findall(r"round 2/2 .*central ([\d.]+) %", out)[0]) > 60
    assert (tmp_path / "central.pt").stat().st_size > 100_000


@pytest.mark.slow
def test_mixed_black_boxes_on_ray(tmp_path: Path) -> None:
    """All its rounds: the central model is better than the clients are in the mean."""
    file = tmp_path / "digits.onnx"
    made = subprocess.run(
        [sys.executable, "make_onnx.py", str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=MIXED,
    )
    assert made.returncode == 0, made.stderr
    out = run_on_ray(MIXED, 4, f'onnx-file="{file}"')
    kinds = ("ResNet-18", "random forest", "gradient boosting", "ONNX, inference-only")
    table = {}
    for kind in (*kinds, "mean client", "central CNN"):
        (found,) = re.findall(rf"^{kind} +([\d.]+)%$", out, re.MULTILINE)
        table[kind] = float(found)
    print(table)
    assert table["central CNN"] >= table["mean client"] > 60
    assert table["mean client"] == pytest.approx(sum(table[kind] for kind in kinds) / 4, abs=0.06)


@pytest.mark.slow
def test_your_data_on_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder, as the Hub's "imagefolder" has it."""
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        for label in range(3):
            folder = tmp_path / "data" / split / f"kind-{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (20, 24)).astype(np.uint8)
                pixels[6 * label : 6 * label + 6] += 150
                Image.fromarray(pixels).save(folder / f"{number}.png")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = run_on_ray(
        YOURS,
        2,
        f'dataset="{tmp_path / "data"}" num-classes=3 num-clients=2 num-server-rounds=2 '
        # Two epochs over 60 images are four steps: whether the clients learn by them is luck.
        "images-a-round=200 local-epochs=20",
    )
    found = [float(value) for value in re.findall(r"central model ([\d.]+)%", out)]
    assert found[-1] > 60


@pytest.mark.parametrize("folder", [QUICKSTART, MIXED, YOURS, TABULAR], ids=lambda path: path.name)
def test_every_example_says_how_to_run_it(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert "flwr run ." in text
    assert "pip install" in text


@pytest.mark.parametrize("folder", [QUICKSTART, MIXED, YOURS, TABULAR], ids=lambda path: path.name)
def test_flower_packs_the_example(folder: Path) -> None:
    """As ``flwr run`` does before anything else: all modules, and nothing that was left there."""
    from flwr.cli.build import build_fab_from_disk

    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        names = {name for name in bundle.namelist() if not name.startswith(".info")}
    modules = {path.name for path in folder.glob("*.py")}
    assert names - {"README.md"} == modules | {"pyproject.toml"}
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    for component in project["tool"]["flwr"]["app"]["components"].values():
        module, name = component.split(":")
        assert re.search(rf"^{name} = ", (folder / f"{module}.py").read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "fd", "fedmd", "fedzge"])
def test_comparison_on_ray(tmp_path: Path, name: str) -> None:
    """On Ray a method has the numbers that it has in one process."""
    config: dict[str, object] = {
        "num-clients": 3,
        "num-server-rounds": 2,
        "num-test-images": 60,
        "min-local-steps": 4,
        "client-distill-steps": 4,
        "server-threads": 1,
    }
    pairs = " ".join(f"{key}={value}" for key, value in config.items())
    run_on_ray(COMPARISON, 3, f'strategy="{name}" output-dir="{tmp_path}" {pairs}')
    (found,) = all_in(tmp_path)
    torch.set_num_threads(1)
    here = run_here(name, config, print)
    assert found.measured.client_steps == here.client_steps
    for there, point in zip(found.measured.points, here.points, strict=True):
        assert there.central == point.central
        assert there.mean_client == point.mean_client
        # Node ids differ by some digits.
        assert there.up == pytest.approx(point.up, rel=0.01, abs=100)
