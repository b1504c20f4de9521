"""Two processes and one run folder: the second is told, and changes nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedzge_flwr.common.errors import FedZGEError, RunFolderError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.launch.session import LaunchError, session
from fedzge_flwr.observers.lock import FolderLock
from fedzge_flwr.observers.run_folder import RunFolder
from tests.helpers.paths import ROOT
from tests.helpers.resuming import assert_same_results, resume, unbroken
from tests.helpers.running import folder_of, run_server


@contextmanager
def holder(what: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder; afterwards it is gone, by kill -9."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.holding", str(what)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line == "holding\n":
                break
        assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def content(folder: Path) -> dict[str, Any]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refusal(folder: Path, pid: int) -> str:
    return (
        re.escape(
            f"run folder {folder} is being written by process {pid} on {socket.gethostname()}"
        )
        + r" since \S+: wait until that has ended, or end it$"
    )


def test_a_folder_is_one_processs_until_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"status": "running"}')
    (tmp_path / "progress.json").write_text("{}")
    with holder(tmp_path) as process:
        before = content(tmp_path)
        with pytest.raises(RunFolderError, match=refusal(tmp_path, process.pid)):
            FolderLock(tmp_path)
        # Before anything is started.
        with (
            pytest.raises(RunFolderError, match=refusal(tmp_path, process.pid)),
            session({"resume": str(tmp_path)}, lambda _: {}),
        ):
            pytest.fail("the launch goes on")
        assert content(tmp_path) == before
    with FolderLock(tmp_path), pytest.raises(RunFolderError, match=refusal(tmp_path, os.getpid())):
        FolderLock(tmp_path)
    FolderLock(tmp_path).release()


def test_a_launch_that_fails_leaves_another_processs_folder_alone(tmp_path: Path) -> None:
    """Which has taken the folder, or the name, after the launch had looked."""
    folder = tmp_path / "run"
    for given in ({"output-dir": str(tmp_path), "run-name": "run"}, {"resume": str(folder)}):
        with ExitStack() as stack:
            stack.enter_context(pytest.raises(LaunchError))
            launch = stack.enter_context(session(given, lambda _: {}))
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text('{"status": "running"}')
            (folder / "progress.json").write_text("{}")
            launch.log("flower").write_text("a log")
            lock = FolderLock(folder)
            before = content(folder)
            raise LaunchError("'run-name' = 'run' exists already")
        assert content(folder) == before
        lock.release()


@pytest.mark.faults
def test_a_second_resume_is_refused_and_after_a_kill_one_goes_on(
    make_grid: Any,
    efficient_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {**efficient_config, "num-server-rounds": 3}
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "states"))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    folder = folder_of(config)
    with holder(file) as process:
        before = content(folder)
        with pytest.raises(RunFolderError, match=refusal(folder, process.pid)) as caught:
            resume(make_grid, config)
        # Nor may a fresh one take the name.
        with pytest.raises(RunFolderError, match="exists already; choose another name"):
            run_server(make_grid(config), config)
        assert content(folder) == before
    assert caplog.records[-2].getMessage() == f"fedzge: {caught.value}"
    resume(make_grid, config)
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "other states"))
    assert_same_results(folder, unbroken(config))


def test_whoever_only_looks_does_not_get_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, tries = fcntl.flock, []

    def at_the_third_try(handle: int, flags: int) -> None:
        tries.append(handle)
        if len(tries) < 3:
            raise BlockingIOError(errno.EWOULDBLOCK, "busy")
        flock(handle, flags)

    monkeypatch.setattr(fcntl, "flock", at_the_third_try)
    FolderLock(tmp_path).release()
    assert len(tries) == 3


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(handle: int, flags: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    FolderLock(tmp_path).release()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"run folder {tmp_path} cannot be locked (No locks available): see to it that one process "
        "alone writes it"
    )


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("whoever holds it would write here")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(outside)
    with pytest.raises(RunFolderError, match="cannot be written"):
        FolderLock(tmp_path / "run")
    assert outside.read_text() == "whoever holds it would write here"


def test_a_run_that_does_not_begin_lets_go(tmp_path: Path) -> None:
    settings = from_run_config({"resume": str(tmp_path)})
    (tmp_path / "config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(FedZGEError, match="no whole checkpoint"):
            RunFolder(settings)
