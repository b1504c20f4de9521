"""Starting real launches, and seeing that nothing of them is left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parent.parent


def processes_below(folder: Path) -> list[str]:
    """Processes that work in a folder: a launch and all that it starts, whatever their titles."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder) and process.status() != "zombie":
                found.append(f"{process.pid} {process.cmdline()}")
        except psutil.Error:
            continue
    return found


def toml_pairs(config: dict[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())


@pytest.fixture
def start() -> Any:
    """Start launches; afterwards nothing of them may be left, neither processes nor files."""
    # Short, since Ray's sockets are to live below it.
    place = Path(tempfile.mkdtemp(prefix="e2e-"))
    (place / "cwd").mkdir()

    def begin(config: dict[str, Any], *options: str) -> subprocess.Popen[str]:
        arguments = ["--app", str(ROOT), "--run-config", toml_pairs(config), *options]
        return subprocess.Popen(
            [sys.executable, "-m", "fedzge_flwr.cli", "run", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A user's own working directory must not matter.
            cwd=place / "cwd",
            env={**os.environ, "TMPDIR": str(place)},
        )

    yield begin
    assert processes_below(place) == []
    assert [path.name for path in place.iterdir()] == ["cwd"]
    assert list((place / "cwd").iterdir()) == []
    shutil.rmtree(place)
