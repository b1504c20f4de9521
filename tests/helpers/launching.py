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

from tests.helpers.paths import ROOT


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


def app_with_server(folder: Path, server_app: str) -> Path:
    """Make an app of this one's client and another server, which finds this one's beside it."""
    folder.mkdir()
    shutil.copy(ROOT / "server_app.py", folder / "real_server_app.py")
    shutil.copy(ROOT / "client_app.py", folder)
    (folder / "server_app.py").write_text(server_app)
    whole = (ROOT / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(
        "\n".join(line for line in whole.splitlines() if not line.startswith("fab-include"))
    )
    return folder


@pytest.fixture
def start() -> Any:
    """Start launches; afterwards nothing of them may be left, neither processes nor files."""
    # Short, since Ray's sockets are to live below it.
    place = Path(tempfile.mkdtemp(prefix="e2e-"))
    (place / "cwd").mkdir()

    def begin(config: dict[str, Any], *options: str) -> subprocess.Popen[str]:
        arguments = [] if "--app" in options else ["--app", str(ROOT)]
        arguments += ["--run-config", toml_pairs(config)] if config else []
        arguments += options
        return subprocess.Popen(
            [sys.executable, "-m", "fedzge_flwr.cli", "run", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A user's own working directory must not matter.
            cwd=place / "cwd",
            env={**os.environ, "TMPDIR": str(place)},
        )

    begin.place = place
    yield begin
    assert processes_below(place) == []
    assert [path.name for path in place.iterdir()] == ["cwd"]
    assert list((place / "cwd").iterdir()) == []
    shutil.rmtree(place)
