"""A disk that fills and folders that go in mid-run: one clear line, and resuming loses nothing."""

from __future__ import annotations

import json
import logging
import resource
from pathlib import Path
from typing import Any

import pytest

from fedzge_flwr.common.errors import CheckpointError, FedZGEError, RunFolderError
from fedzge_flwr.observers.run_folder import RunFolder
from fedzge_flwr.server.checkpoints import CheckpointFolder
from tests.helpers.resuming import client_models, results, resume
from tests.helpers.running import folder_of, run_server

ROUNDS = 3


@pytest.fixture
def config(efficient_config: dict[str, Any]) -> dict[str, Any]:
    return {**efficient_config, "num-server-rounds": ROUNDS, "client-evaluation": "off"}


class Limit:
    """The size beyond which no file of this process grows, as on a disk without room."""

    def __init__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set(self, size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, self._before[1]))

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


@pytest.fixture
def limit() -> Any:
    limit = Limit()
    yield limit
    limit.lift()


def at_phase(monkeypatch: pytest.MonkeyPatch, round_: int, phase: str, act: Any) -> None:
    """Do something when a phase begins, after the run folder has noted that."""
    whole = RunFolder.on_phase

    def on_phase(self: RunFolder, at: int, name: str) -> None:
        whole(self, at, name)
        if (at, name) == (round_, phase):
            act()

    monkeypatch.setattr(RunFolder, "on_phase", on_phase)


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the log says at ERROR, and check that each is a line."""
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]
    assert all(line.isprintable() for line in found)
    return [line for line in found if line.startswith("fedzge: ")]


@pytest.fixture
def unbroken(
    make_grid: Any, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Compare a run that was resumed with one that was never stopped, clients' models included."""
    whole = {**config, "run-name": "unbroken"}
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "unbroken"))
    run_server(make_grid(whole), whole)
    wanted, clients = results(whole), client_models(tmp_path / "unbroken")
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "states"))

    def compare() -> None:
        resume(make_grid, config)
        assert results(config) == wanted
        assert client_models(tmp_path / "states") == clients

    return compare


def test_no_room_for_a_checkpoint(
    make_grid: Any,
    config: dict[str, Any],
    unbroken: Any,
    limit: Limit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = folder_of(config)
    with monkeypatch.context() as patched:
        # Room for all small files and for no checkpoint, whose size is that of three models.
        at_phase(patched, 2, "save_checkpoint", lambda: limit.set(20_000))
        with pytest.raises(CheckpointError) as caught:
            run_server(make_grid(config), config)
    limit.lift()
    line = (
        f"checkpoint of round 2 cannot be written to {folder / 'checkpoints'} (File too large); "
        "free space, then resume from the one before"
    )
    assert str(caught.value) == line
    assert lines_of(caplog) == [f"fedzge: {line}"]
    assert json.loads((folder / "config.json").read_text())["status"] == (
        f"failed: CheckpointError: {line}"
    )
    assert CheckpointFolder(folder / "checkpoints").newest().round == 1
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["round-000000.checkpoint", "round-000001.checkpoint"]
    unbroken()


@pytest.mark.faults
@pytest.mark.parametrize(
    ("round_", "phase", "newest"),
    [(1, "remember", 0), (3, "remember", 2), (2, "evaluate_central", 1)],
)
def test_no_room_at_all(
    make_grid: Any,
    config: dict[str, Any],
    unbroken: Any,
    limit: Limit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    round_: int,
    phase: str,
    newest: int,
) -> None:
    folder = folder_of(config)
    before: dict[str, bytes] = {}

    def full() -> None:
        before.update({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
        limit.set(0)

    with monkeypatch.context() as patched:
        at_phase(patched, round_, phase, full)
        with pytest.raises(FedZGEError) as caught:
            run_server(make_grid(config), config)
    limit.lift()
    line = f"run folder {folder} cannot be written (File too large); free space or set 'output-dir'"
    assert str(caught.value).startswith(line)
    assert lines_of(caplog) == [f"fedzge: {caught.value}"]
    # Every file is as it was; none is half there.
    for name, data in before.items():
        assert (folder / name).read_bytes() == data, name
    assert not [path.name for path in folder.rglob(".*")]
    assert CheckpointFolder(folder / "checkpoints").newest().round == newest
    unbroken()


@pytest.mark.faults
def test_no_room_for_a_model_at_the_end(
    make_grid: Any,
    config: dict[str, Any],
    unbroken: Any,
    limit: Limit,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whose library has an error of its own for that; the status says how the run has ended."""
    folder = folder_of(config)
    whole = RunFolder.on_end

    def on_end(self: RunFolder, *arguments: Any) -> None:
        limit.set(20_000)
        whole(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "on_end", on_end)
        with pytest.raises(RunFolderError) as caught:
            run_server(make_grid(config), config)
    limit.lift()
    assert str(caught.value).startswith(f"run folder {folder} cannot be written (")
    assert "File too large" in str(caught.value)
    assert lines_of(caplog) == [f"fedzge: {caught.value}"]
    status = json.loads((folder / "config.json").read_text())["status"]
    assert status == f"failed: RunFolderError: {caught.value}"
    assert not (folder / "central.safetensors").exists()
    unbroken()


def test_a_run_folder_that_cannot_be_made(
    make_grid: Any, config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    line = "cannot be written (Not a directory); name a folder that you may write to"
    for output_dir in ("file", "file/below"):
        caplog.clear()
        grid = make_grid({**config, "output-dir": str(tmp_path / output_dir)})
        with pytest.raises(RunFolderError) as caught:
            run_server(grid, {**config, "output-dir": str(tmp_path / output_dir)})
        assert str(caught.value) == f"'output-dir' = '{tmp_path / output_dir}' {line}"
        assert lines_of(caplog) == [f"fedzge: {caught.value}"]
        assert not grid.sent


@pytest.mark.parametrize(
    ("phase", "replaced"),
    [
        ("save_checkpoint", False),
        pytest.param("save_checkpoint", True, marks=pytest.mark.faults),
        pytest.param("ask_clients", False, marks=pytest.mark.faults),
        pytest.param("ask_clients", True, marks=pytest.mark.faults),
    ],
)
def test_a_run_folder_that_is_gone_in_mid_run(
    make_grid: Any,
    config: dict[str, Any],
    unbroken: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    replaced: bool,
    phase: str,
) -> None:
    """It has been moved away; a regular file may have taken its place."""
    folder = folder_of(config)
    moved = folder.with_name("moved")

    def move() -> None:
        folder.rename(moved)
        if replaced:
            folder.write_text("in the way")

    with monkeypatch.context() as patched:
        at_phase(patched, 2, phase, move)
        with pytest.raises(FedZGEError) as caught:
            run_server(make_grid(config), config)
    reason = "Not a directory" if replaced else "No such file or directory"
    assert str(folder) in str(caught.value)
    assert f"({reason}); " in str(caught.value)
    assert lines_of(caplog) == [f"fedzge: {caught.value}"]
    if replaced:
        assert folder.read_text() == "in the way"
        folder.unlink()
    assert not folder.exists()
    moved.rename(folder)
    assert CheckpointFolder(folder / "checkpoints").newest().round == 1
    unbroken()
