"""Every snippet of the page on extending, in apps that a real ``flwr run`` runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from safetensors.torch import load_file

from fedzge_flwr.launch.session import Session, executable, session
from fedzge_flwr.launch.simulate import environment
from fedzge_flwr.launch.submission import CONNECTION, submit
from tests.helpers.launching import toml_pairs
from tests.helpers.paths import ROOT
from tests.helpers.snippets import SNIPPETS
from tests.helpers.superlink import start_superlink

REGISTERED = ("model", "dataset", "generator", "source", "objective", "estimator", "ensemble")
SHORT = (
    "num_train_images=120, synthetic_batch_size=20, central_distill_steps=2, "
    "client_distill_steps=2, min_local_steps=2, local_rounds=1, server_threads=1"
)
SERVER = """
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from torch import nn
{imports}

app = ServerApp()


@app.main()
def main(grid, context):
    central = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    {strategy}.start(grid, ArrayRecord(central.state_dict()))
"""
USED: dict[str, tuple[str, ...]] = {
    "registered": (*REGISTERED, "defence"),
    "a run folder": ("settings", "folder"),
    "checkpoints": ("settings", "resume"),
    "a black box": ("blackbox", "observer", "tracker"),
}


@pytest.fixture(scope="module")
def launch() -> Iterator[Session]:
    with session({}, environment) as started:
        start_superlink(started)
        yield started


def flwr_run(launch: Session, app: Path, num_nodes: int, config: dict[str, Any]) -> str:
    """Run an app and return what was logged."""
    given = ["--run-config", toml_pairs(config)] if config else []
    submit(
        launch,
        [
            *(executable("flwr"), "run", app, CONNECTION, "--stream", *given),
            *("--federation-config", f"num-supernodes={num_nodes}"),
        ],
        f"running {app.name}",
    )
    return launch.log("flower").read_text()


def make_app(folder: Path, client: str, server: str, modules: dict[str, str]) -> Path:
    """Write an app of a project's own, without settings of this package."""
    folder.mkdir()
    for name, text in {**modules, "server_app": server}.items():
        (folder / f"{name}.py").write_text(text)
    app = {"publisher": "tests", "components": {}}
    app["components"] = {"serverapp": "server_app:app", "clientapp": f"{client}:app"}
    project = {"name": "snippets", "version": "1.0.0", "description": "", "license": "MIT"}
    whole = {"project": {**project, "dependencies": []}, "tool": {"flwr": {"app": app}}}
    (folder / "pyproject.toml").write_text(tomli_w.dumps(whole))
    return folder


def short_settings(**more: Any) -> str:
    """The snippet of settings, with a run of seconds."""
    given = ", ".join([SHORT, *(f"{name}={value!r}" for name, value in more.items())])
    return SNIPPETS["settings"].replace("server_threads=4", given)


def test_every_snippet_is_in_a_run() -> None:
    assert {name for names in USED.values() for name in names} == set(SNIPPETS)


@pytest.mark.slow
def test_what_an_app_registers_and_a_defence(launch: Session, tmp_path: Path) -> None:
    """In this repository's own app, to which two modules have been added and an import each."""
    for split in ("train", "test"):
        images = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8)).astype(np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.arange(60) % 3)
    app = tmp_path / "app"
    app.mkdir()
    for name in REGISTERED:
        (app / f"my_{name}.py").write_text(SNIPPETS[name])
    imports = "\n".join(f"import my_{name}" for name in REGISTERED)
    (app / "client_app.py").write_text(f"{imports}\n{SNIPPETS['defence']}")
    (app / "server_app.py").write_text(f"{imports}\n{(ROOT / 'server_app.py').read_text()}")
    whole = (ROOT / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(re.sub(r"^fab-include.*\n", "", whole, flags=re.MULTILINE))
    names = {"dataset": "blobs", "local-models": "linear", "central-model": "linear"}
    names |= {"generator": "flat", "objective": "smooth", "estimator": "normalised"}
    few = [part.replace("_", "-").split("=") for part in SHORT.split(", ")]
    config = {
        **{key: int(value) for key, value in few if key != "num-train-images"},
        **names,
        "ensemble": "surest",
        "generator-share": 0.25,
        "image-sources": "stripes:0.5,evolved:0.25",
        "num-clients": 2,
        "num-server-rounds": 2,
        "num-train-images": 0,
        "num-test-images": 0,
        "data-dir": str(tmp_path),
        "output-dir": str(tmp_path / "runs"),
        "run-name": "run",
    }
    flwr_run(launch, app, 2, config)
    folder = tmp_path / "runs" / "run"
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [row["missing"] for row in rows] == [[], []]
    assert all("roughness" in row["loss"] for row in rows)
    assert load_file(folder / "central.safetensors")["1.weight"].shape == (3, 64)
    assert set(load_file(folder / "generator.safetensors")) == {
        *("labels.weight", "layer.weight", "layer.bias"),
    }


@pytest.mark.slow
def test_settings_and_a_run_folder(launch: Session, tmp_path: Path) -> None:
    server = SERVER.format(
        imports="import folder\nfrom settings import SETTINGS",
        strategy="folder.strategy(SETTINGS, central)",
    )
    settings = short_settings(output_dir=str(tmp_path / "runs"), run_name="run")
    modules = {"settings": settings, "folder": SNIPPETS["folder"]}
    flwr_run(launch, make_app(tmp_path / "app", "settings", server, modules), 3, {})
    rows = (tmp_path / "runs" / "run" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(row)["missing"] for row in rows] == [[], []]


@pytest.mark.slow
def test_settings_and_checkpoints(launch: Session, tmp_path: Path) -> None:
    """A second run finds the first one's, and has nothing more to do."""
    server = SERVER.format(
        imports="import resume\nfrom settings import SETTINGS",
        strategy=f"resume.strategy(SETTINGS, central, {str(tmp_path / 'kept')!r})",
    )
    modules = {"settings": short_settings(checkpoint_every=1), "resume": SNIPPETS["resume"]}
    app = make_app(tmp_path / "app", "settings", server, modules)
    for resumed in (False, True):
        out = flwr_run(launch, app, 3, {})
        assert ("resumed after round 2 of 2" in out) == resumed
    assert (tmp_path / "kept" / "round-000002.checkpoint").exists()


@pytest.mark.slow
def test_a_black_box_followed_by_observers(launch: Session, tmp_path: Path) -> None:
    """With a stand-in for the tracker's own module, which is no dependency."""
    logged = tmp_path / "logged"
    wandb = (
        "class Run:\n"
        "    def log(self, figures, step):\n"
        f"        with open({str(logged)!r}, 'a') as file:\n"
        "            print(step, sorted(figures), file=file)\n"
        "def init(project):\n"
        "    return Run()\n"
    )
    server = SERVER.format(
        imports="import observer, tracker\nfrom fedzge_flwr import FedZGE, make_settings",
        strategy=(
            "FedZGE(make_settings(image_shape=(1, 8, 8), num_classes=10, num_clients=2, "
            "num_server_rounds=2, synthetic_batch_size=20, central_distill_steps=2, "
            "server_threads=1), central, observers=[observer.Printer(), tracker.Tracker('x')])"
        ),
    )
    modules = {name: SNIPPETS[name] for name in ("blackbox", "observer", "tracker")}
    app = make_app(tmp_path / "app", "blackbox", server, {**modules, "wandb": wandb})
    out = flwr_run(launch, app, 2, {})
    assert len(re.findall(r"^[12] None \d+$", out, re.MULTILINE)) == 2
    assert [line.split()[0] for line in logged.read_text().splitlines()] == ["1", "2"]
