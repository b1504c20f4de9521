"""What a loss of power leaves is gone on from: every round once, and the same models."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedzge_flwr.common.errors import CheckpointError, RunFolderError
from fedzge_flwr.observers.drawing import RunPictures
from fedzge_flwr.observers.rows import RowsFile
from fedzge_flwr.server.checkpoints import CheckpointFolder
from tests.helpers.power import KINDS, Disk, restore
from tests.helpers.resuming import client_models, results, resume
from tests.helpers.running import folder_of, run_server

ROUNDS = 3


@pytest.fixture
def config(efficient_config: dict[str, Any]) -> dict[str, Any]:
    return {
        **efficient_config,
        "num-clients": 2,
        "num-server-rounds": ROUNDS,
        "num-train-images": 60,
        "num-test-images": 20,
        "synthetic-batch-size": 10,
        "min-local-steps": 1,
        "q": 1,
        "local-rounds": 1,
        "client-evaluation": "off",
    }


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a small run's time, and none is read again."""
    monkeypatch.setattr(RunPictures, "of_run", lambda *_: None)


class Place:
    """A copy of all that a run has on disk, its clients' states included."""

    def __init__(self, root: Path, config: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.config = {**config, "output-dir": str(root / "runs")}
        self.folder = folder_of(self.config)
        patch.setenv("FEDZGE_STATE_DIR", str(root / "states"))

    def outcome(self) -> tuple[list[Any], dict[str, bytes]]:
        return results(self.config), client_models(self.root / "states")


@pytest.fixture
def whole(
    make_grid: Any,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_pictures: None,
) -> Place:
    (tmp_path / "whole").mkdir()
    place = Place(tmp_path / "whole", config, monkeypatch)
    run_server(make_grid(place.config), place.config)
    return place


def resumed_with(
    rows: bytes, newest: int, whole: Place, make_grid: Any, patch: pytest.MonkeyPatch
) -> Place:
    """Go on from a copy with these rows, whose newest checkpoint is of a given round."""
    root = whole.root.with_name("copy")
    shutil.copytree(whole.root, root)
    place = Place(root, whole.config, patch)
    (place.folder / "rounds.jsonl").write_bytes(rows)
    for later in range(newest + 1, ROUNDS + 1):
        (place.folder / "checkpoints" / f"round-{later:06d}.checkpoint").unlink()
    resume(make_grid, place.config)
    return place


def cuts(rows: bytes) -> range:
    """Every length that leaves a part of the last two rows, or nothing of them, or all."""
    last_two = sum(len(line) for line in rows.splitlines(keepends=True)[-2:])
    return range(len(rows) - last_two, len(rows) + 1)


def check_cuts(
    lengths: Sequence[int], newest: int, whole: Place, make_grid: Any, patch: pytest.MonkeyPatch
) -> None:
    rows = (whole.folder / "rounds.jsonl").read_bytes()
    table = (whole.folder / "accuracy.csv").read_bytes()
    wanted = whole.outcome()
    for length in lengths:
        place = resumed_with(rows[:length], newest, whole, make_grid, patch)
        outcome = place.outcome()
        assert [row["round"] for row in outcome[0][2:]] == [1, 2, 3], length
        assert outcome == wanted, length
        assert (place.folder / "accuracy.csv").read_bytes() == table
        shutil.rmtree(place.root)


@pytest.mark.parametrize("newest", [ROUNDS - 1, ROUNDS])
def test_rows_that_are_cut_anywhere(
    whole: Place, make_grid: Any, monkeypatch: pytest.MonkeyPatch, newest: int
) -> None:
    """A sample, and by `test_rows_that_are_cut_at_every_byte` all of them."""
    lengths = cuts((whole.folder / "rounds.jsonl").read_bytes())
    sample = [lengths[at] for at in (0, 1, len(lengths) // 4, -3, -2, -1)]
    check_cuts(sample, newest, whole, make_grid, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("newest", "every"), [(ROUNDS, 1), (ROUNDS - 1, 8)])
def test_rows_that_are_cut_at_every_byte(
    whole: Place, make_grid: Any, monkeypatch: pytest.MonkeyPatch, newest: int, every: int
) -> None:
    """Both rows come back from the checkpoint; or one does, and the other's round is done again."""
    lengths = cuts((whole.folder / "rounds.jsonl").read_bytes())
    assert len(lengths) > 2000
    # Thousands of runs: what they say, and the disk that they wait for, take most of the time.
    monkeypatch.setattr(logging.getLogger("flwr.fedzge"), "disabled", True)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    check_cuts(lengths[::every], newest, whole, make_grid, monkeypatch)


def test_a_round_is_redone_with_the_rows_of_all_rounds_before(
    make_grid: Any,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_pictures: None,
) -> None:
    """What a checkpoint holds does not grow with the rounds, and lives through a restart."""
    monkeypatch.setattr("fedzge_flwr.strategy._rows_kept", lambda _: 2)
    (tmp_path / "root").mkdir()
    place = Place(tmp_path / "root", {**config, "client-distill-rounds": 0}, monkeypatch)
    run_server(make_grid(place.config), place.config)
    checkpoints = CheckpointFolder(place.folder / "checkpoints")
    assert [row["round"] for row in checkpoints.newest().rows] == [2, 3]
    (place.folder / "checkpoints" / "round-000003.checkpoint").unlink()
    resume(make_grid, place.config)
    assert [row["round"] for row in checkpoints.newest().rows] == [2, 3]


def check_losses(
    every: int,
    whole: Place,
    make_grid: Any,
    tmp_path: Path,
    patch: pytest.MonkeyPatch,
) -> int:
    """Resume from every so manieth image of the disk."""
    wanted = whole.outcome()
    (tmp_path / "watched").mkdir()
    watched = Place(tmp_path / "watched", whole.config, patch)
    disk = Disk(watched.root)
    with disk.watched(patch):
        run_server(make_grid(watched.config), watched.config)
    assert watched.outcome() == wanted
    resumed = 0
    for number, images in list(enumerate(disk.images))[::every]:
        for kind in KINDS:
            restore(images[kind], tmp_path / "restored")
            place = Place(tmp_path / "restored", whole.config, patch)
            if any(place.folder.glob("checkpoints/round-*")):
                newest = CheckpointFolder(place.folder / "checkpoints").newest().round
                written = RowsFile(place.folder / "rounds.jsonl").read()
                assert len(written) >= newest, "a checkpoint counts on a row that is not there"
                resume(make_grid, place.config)
                assert place.outcome() == wanted, (number, kind)
                resumed += 1
            else:
                # Nothing has been done that is worth going on from.
                with pytest.raises((RunFolderError, CheckpointError)):
                    resume(make_grid, place.config)
            shutil.rmtree(place.root)
    return resumed


@pytest.mark.faults
def test_power_is_lost_now_and_then(
    whole: Place, make_grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_losses(11, whole, make_grid, tmp_path, monkeypatch) > 5


@pytest.mark.faults
def test_power_is_lost_after_every_sync(
    whole: Place, make_grid: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_losses(1, whole, make_grid, tmp_path, monkeypatch) > 80
