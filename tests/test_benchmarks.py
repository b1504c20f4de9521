from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.running import run_server

ROOT = Path(__file__).parent.parent


def test_run_table(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    folder = run_server(make_grid(tiny_config), tiny_config)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.run_table", str(folder), "--rounds", "2"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    *_, last = run.stdout.strip().splitlines()
    assert len(run.stdout.strip().splitlines()) == 3
    assert last.startswith("| 2 | ")
    assert " | 72 | " in last
