"""Ctrl-C at any moment of ``fedzge run``: a clean stop within ten seconds, and a way to go on."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.launching import app_with_server, processes_below
from tests.helpers.resuming import PHASES, assert_same_results, unbroken

STOP_S = 10.0
PATIENCE_S = 120.0

# The app itself, whose run folder, which hears of every phase, dwells on the one that is wanted.
DWELLING = """
import os, time
from pathlib import Path

import real_server_app


class Dwelling(real_server_app.RunFolder):
    def on_phase(self, round_, phase):
        super().on_phase(round_, phase)
        wanted = Path(os.environ["PHASE_TO_DWELL_ON"])
        while wanted.read_text() == f"{round_} {phase}":
            time.sleep(0.1)


real_server_app.RunFolder = Dwelling
app = real_server_app.app
"""


def until(reached: Callable[[], bool], run: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def interrupt(run: Any) -> tuple[str, float]:
    """Send Ctrl-C; return what was printed, and how long it took."""
    os.kill(run.pid, signal.SIGINT)
    sent = time.monotonic()
    out, err = run.communicate(timeout=60)
    took = time.monotonic() - sent
    assert run.returncode == 130, out + err
    # Before anything was started there is nothing to say.
    assert not err or err.startswith("interrupted; all processes"), out + err
    assert took < STOP_S
    return out, took


@pytest.mark.slow
def test_ctrl_c_in_every_phase_and_on_from_there(
    tmp_path: Path, efficient_config: dict[str, Any], start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**efficient_config, "num-server-rounds": 3, "client-distill-rounds": 0}
    app = app_with_server(tmp_path / "app", DWELLING)
    wanted = tmp_path / "wanted"
    monkeypatch.setenv("PHASE_TO_DWELL_ON", str(wanted))
    folder = Path(config["output-dir"]) / "run"
    options = ["--app", str(app), "--client-cpus", str(os.cpu_count())]
    for phase in PHASES:
        wanted.write_text(f"2 {phase}")
        progress = folder / "progress.json"

        def dwells(progress: Path = progress, phase: str = phase) -> bool:
            try:
                now = json.loads(progress.read_text())
            except OSError:
                return False
            return (now["round"], now["phase"]) == (2, phase)

        resumed = ["--resume", str(folder)] if folder.exists() else []
        run = start({} if resumed else config, *options, *resumed)
        until(dwells, run)
        out, took = interrupt(run)
        print(f"{phase}: {took:.1f} s")
        assert processes_below(start.place) == []
        assert json.loads((folder / "config.json").read_text())["status"] == "interrupted"
        assert (folder / "checkpoints" / "round-000001.checkpoint").is_file()
        assert f"make run RESUME='{folder}'" in out
    wanted.write_text("")
    run = start({}, *options, "--resume", str(folder))
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, out + err
    assert_same_results(folder, unbroken(config))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["import", "engine.py", "raylet"])
def test_ctrl_c_before_the_first_round(
    tiny_config: dict[str, Any], start: Any, moment: str
) -> None:
    run = start(tiny_config)

    def reached() -> bool:
        if moment == "import":
            return time.monotonic() > begun + 0.4
        children = psutil.Process(run.pid).children(recursive=True)
        return any(moment in " ".join((c.name(), *_command(c))) for c in children)

    begun = time.monotonic()
    until(reached, run)
    out, took = interrupt(run)
    print(f"{moment}: {took:.1f} s")
    assert "RESUME" not in out


def _command(process: psutil.Process) -> list[str]:
    try:
        found: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return found
