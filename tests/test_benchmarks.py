from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gradient_fidelity
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


def test_gradient_fidelity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a tiny setting: all rows, and a second call that only reads what the first one kept."""
    arguments = (
        "--dataset digits --draws 1 --clients 2 --train-images 200 --test-images 100 --images 10 "
        "--local-epochs 3 --transfer-images 100 --central-steps 40 --generator-steps 2 "
        f"--cache {tmp_path / 'cache'} --json {tmp_path / 'found.json'}"
    ).split()
    gradient_fidelity.main(arguments)
    first = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["tables"]["estimators"]
    assert len(rows) == 3 * len(gradient_fidelity.cases()["estimators"])
    assert "**steps and formats**" in first.out
    assert "| half (" in first.out
    by_name = {
        name: sum(row["cosine"] for row in rows if row["case"]["estimator"] == name)
        for name in ("batch-difference", "guided")
    }
    assert by_name["guided"] > by_name["batch-difference"]
    # What rounding erases has no direction left, and that is no error.
    assert all(-1.0 <= row["cosine"] <= 1.0 for table in found["tables"].values() for row in table)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}
    gradient_fidelity.main(arguments)
    assert capsys.readouterr().out == first.out
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
