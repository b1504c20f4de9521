"""The demo of a deployment: the launcher's own federation, apart from the guide's."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.guided import PATIENCE_S, SETTINGS


@pytest.mark.faults
def test_the_demo_completes_and_leaves_nothing(tmp_path: Path, start: Any) -> None:
    config = {**SETTINGS, "output-dir": str(tmp_path), "run-name": "run"}
    config |= {"num-clients": 1, "num-server-rounds": 1, "client-evaluation": "test"}
    run = start(config, "--deployment")
    out, err = run.communicate(timeout=PATIENCE_S)
    assert run.returncode == 0, out + err
    assert "SuperNode 0 of 1 is connected" in out
    assert "ensemble mean client" in " ".join(out.split())
    assert re.search(r"1/1 +[\d.]+ % +[\d.]+ % +[\d.]+ %", out)
    assert out.strip().splitlines()[-1] == f"run folder: {tmp_path / 'run'}"
    # `start` then looks for processes and files.


@pytest.mark.faults
def test_an_interrupted_demo_leaves_nothing(tmp_path: Path, start: Any) -> None:
    config = {**SETTINGS, "output-dir": str(tmp_path), "run-name": "run"}
    run = start(config, "--deployment")
    while "SuperNode 0 of 3" not in (line := run.stdout.readline()):
        assert line, run.communicate()
    os.kill(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "interrupted" in err


@pytest.mark.faults
def test_a_failing_demo_says_why_in_one_line(tmp_path: Path, start: Any) -> None:
    config = {**SETTINGS, "output-dir": str(tmp_path), "run-name": "run", "num-clients": 1}
    out, err = (
        run := start({**config, "alpha": 1000.0, "min-partition-size": 1000}, "--deployment")
    ).communicate(timeout=PATIENCE_S)
    assert run.returncode == 1, out + err
    assert "error: 'num-clients' = 1 is too many for the 120 training images of digits" in err
    assert len(err.strip().splitlines()) == 1
