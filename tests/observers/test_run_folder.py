from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from flwr.app import ArrayRecord, MetricRecord
from PIL import Image
from safetensors.torch import load_file

from fedzge_flwr.common.errors import RosterError, RunFolderError
from fedzge_flwr.common.files import atomic_path, atomic_write_text
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.observers.pictures import draw_synthetic
from fedzge_flwr.observers.run_folder import RunFolder
from fedzge_flwr.server.build import build_central, build_generator
from fedzge_flwr.strategy import FedZGE
from tests.helpers.running import folder_of, rows_of, run_server


@pytest.fixture
def folder(make_grid: Any, tiny_config: dict[str, Any]) -> Path:
    return run_server(make_grid(tiny_config), tiny_config)


def test_as_many_rounds_as_the_strategy_was_told(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    """The settings' own number is another."""
    settings = from_run_config({**tiny_config, "num-server-rounds": 12})
    central = build_central(settings)
    folder = RunFolder(settings)
    strategy = FedZGE(settings, central, observers=[folder])
    strategy.start(make_grid(tiny_config), ArrayRecord(central.state_dict()), num_rounds=1)
    written = json.loads((folder.path / "config.json").read_text())["settings"]
    again = tomllib.loads((folder.path / "resume.toml").read_text())
    assert written["num-server-rounds"] == again["num-server-rounds"] == 1


def test_contents(folder: Path, tiny_config: dict[str, Any]) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "config.json",
        "resume.toml",
        "rounds.jsonl",
        "run.lock",
        "central.safetensors",
        "generator.safetensors",
        "accuracy.png",
        "bytes.png",
        "synthetic.png",
        "accuracy.csv",
        "generated",
        # Of the paper's values that it does not have.
        "warnings.log",
    }
    assert len((folder / "warnings.log").read_text().splitlines()) == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["status"] == "finished"
    assert config["seed"] == 0
    assert config["settings"] == from_run_config(tiny_config).to_run_config()
    assert {"python", "fedzge-flwr", "flwr", "ray", "torch"} <= set(config["versions"])
    assert len(config["clients"]) == 3
    rows = rows_of(folder)
    assert [row["round"] for row in rows] == [1, 2]
    assert rows[1]["queries_per_client"] == 2 * rows[0]["queries_per_client"]
    for name in ("accuracy.png", "bytes.png", "synthetic.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("L").getcolors()) > 3


@pytest.mark.parametrize("channels", [1, 3])
def test_generated_images_are_drawn_by_class(tmp_path: Path, channels: int) -> None:
    """A dark image of class 7 below two light ones of class 2, which lie side by side."""
    images = np.full((3, channels, 8, 8), 200, dtype=np.uint8)
    images[1] = 30
    draw_synthetic(images, np.array([2, 7, 2]), tmp_path / "synthetic.png")
    with Image.open(tmp_path / "synthetic.png") as picture:
        grey = np.array(picture.convert("L"))
    dark, light = (np.argwhere(grey == level) for level in (30, 200))
    assert 1.8 < len(light) / len(dark) < 2.2
    assert np.percentile(light[:, 0], 99) < np.percentile(dark[:, 0], 1)
    assert np.median(light[:, 1]) > np.percentile(dark[:, 1], 98)


def test_accuracy_table(folder: Path) -> None:
    table = pd.read_csv(folder / "accuracy.csv", index_col="round")
    assert list(table.columns) == ["central", "client-0", "client-1", "client-2"]
    rows = rows_of(folder)
    assert table["central"].tolist() == [row["central_accuracy"] for row in rows]
    assert table.loc[2, "client-1"] == rows[1]["client_accuracy"]["1"]


def test_models_load_into_fresh_ones(folder: Path, tiny_config: dict[str, Any]) -> None:
    settings = from_run_config({**tiny_config, "seed": 9})
    build_central(settings).load_state_dict(load_file(folder / "central.safetensors"))
    build_generator(settings).load_state_dict(load_file(folder / "generator.safetensors"))


@pytest.mark.parametrize(
    ("given", "kept", "said"),
    [
        ({"accuracy": np.nan, "loss": np.inf}, (None, None), "\"accuracy\" = nan of 'evaluate_fn'"),
        ({"accuracy": 0.5, "loss": np.nan}, (0.5, None), "\"loss\" = nan of 'evaluate_fn'"),
        (
            {"accuracy": 87.0, "loss": 1.0},
            (87.0, 1.0),
            "\"accuracy\" = 87 of 'evaluate_fn' is shown as 8700.0 %",
        ),
    ],
)
def test_figures_of_evaluate_fn_that_are_none(
    make_grid: Any,
    tiny_config: dict[str, Any],
    given: dict[str, float],
    kept: tuple[float | None, float | None],
    said: str,
) -> None:
    """The run goes on, and its log says once what to mend."""
    settings = from_run_config({**tiny_config, "checkpoint-every": 1})
    central = build_central(settings)
    folder = RunFolder(settings)
    strategy = FedZGE(settings, central, observers=[folder], checkpoints=folder.checkpoints)
    strategy.start(
        make_grid(tiny_config),
        ArrayRecord(central.state_dict()),
        evaluate_fn=lambda round_, arrays: MetricRecord(given),
    )
    rows = rows_of(folder.path)
    assert [(row["central_accuracy"], row["central_loss"]) for row in rows] == [kept] * 2
    lines = (folder.path / "warnings.log").read_text().splitlines()
    assert [said in line for line in lines if "evaluate_fn" in line] == [True]
    folder.checkpoints.newest()


def test_clients_that_are_not_sampled_are_evaluated_too(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    config = {**tiny_config, "fraction-train": 0.3, "eval-every": 2}
    table = pd.read_csv(run_server(make_grid(config), config) / "accuracy.csv", index_col="round")
    assert table.loc[1].isna().all()
    assert table.loc[2].notna().all()


def test_a_run_that_fails_before_round_1_says_so(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    grid = make_grid(tiny_config, num_nodes=4)
    with pytest.raises(RosterError):
        run_server(grid, {**tiny_config, "node-timeout": 0.6})
    config = json.loads((folder_of(tiny_config) / "config.json").read_text())
    assert config["status"].startswith("failed: RosterError: 0 of 4 nodes take part, ")


def test_taken_name(folder: Path, tiny_config: dict[str, Any]) -> None:
    with pytest.raises(RunFolderError, match=r"'run-name' = 'run': .* exists already"):
        RunFolder(from_run_config(tiny_config))


def test_a_folder_that_the_launch_has_reserved_is_taken_over(tmp_path: Path) -> None:
    settings = from_run_config({"output-dir": str(tmp_path), "run-name": "run"})
    (tmp_path / "run").mkdir()
    held = RunFolder(settings)
    assert held.path == tmp_path / "run"
    # By one run alone.
    with pytest.raises(RunFolderError, match=r"'run-name' = 'run': .* exists already"):
        RunFolder(settings)


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_only_an_empty_folder_is_taken_over(tmp_path: Path, kind: str) -> None:
    there = tmp_path / "run"
    if kind == "file":
        there.write_text("")
    else:
        there.symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    if kind == "link":
        there.resolve().mkdir()
    with pytest.raises(RunFolderError, match=r"'run-name' = 'run': .* exists already"):
        RunFolder(from_run_config({"output-dir": str(tmp_path), "run-name": "run"}))


def test_automatic_names_never_collide(tmp_path: Path) -> None:
    settings = from_run_config({"output-dir": str(tmp_path)})
    folders = {RunFolder(settings).path for _ in range(3)}
    assert len(folders) == 3


@pytest.mark.parametrize("place", ["file", "below-file", "proc"])
def test_folder_that_cannot_be_made(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    output = {
        "file": tmp_path / "file",
        "below-file": tmp_path / "file" / "runs",
        "proc": Path("/proc/fedzge"),
    }[place]
    with pytest.raises(RunFolderError) as caught:
        RunFolder(from_run_config({"output-dir": str(output)}))
    assert str(output) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_vanishes_in_mid_run_is_one_clear_line(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    def vanish(request: Any, reply: Any) -> Any:
        if request.metadata.group_id == "2":
            folder = Path(tiny_config["output-dir"]) / "run"
            if folder.is_dir():
                folder.rename(folder.with_name("moved"))
        return reply

    with pytest.raises(RunFolderError, match=r"run folder .*run cannot be written"):
        run_server(make_grid(tiny_config, tamper=vanish), tiny_config)
    kept = Path(tiny_config["output-dir"]) / "moved"
    assert len(rows_of(kept)) == 1


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write_text(path, "older")
    with path.open() as reader:
        atomic_write_text(path, "old")
        # Whoever reads meanwhile sees the whole file that was there.
        assert reader.read() == "older"

    def fail_half_way() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]  # noqa: PTH208
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
