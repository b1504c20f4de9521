"""What a comparison keeps, shows, and goes on from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedzge_flwr.common.errors import ComparisonError, DataError
from fedzge_flwr.compare import command
from fedzge_flwr.compare.command import compare
from fedzge_flwr.compare.results import Result, all_in, kept, table, write
from fedzge_flwr.compare.session import Measured, Point
from fedzge_flwr.config.parsing import from_run_config

CONFIG: dict[str, Any] = {
    "num-clients": 2,
    "num-server-rounds": 2,
    "num-test-images": 40,
    "min-local-steps": 2,
    "client-distill-steps": 2,
}


def result(method: str, seed: int, accuracy: float) -> Result:
    central = accuracy if method != "fd" else None
    points = (
        Point(1, 0.9, None, 0.2, 10, 1e6, 2e6),
        Point(2, central, None, accuracy, 20, 3e6, 4e6),
    )
    settings = from_run_config({**CONFIG, "seed": seed})
    return Result.of(method, settings, Measured(points, 30.0, 1.5, 7, 2.5, 60.0))


def test_a_result_comes_back_as_it_was(tmp_path: Path) -> None:
    written = result("fedavg", 1, 0.75)
    write(tmp_path, written)
    settings = from_run_config({**CONFIG, "seed": 1})
    assert kept(tmp_path, "fedavg", 1, settings) == written
    assert kept(tmp_path, "fedavg", 2, settings) is None
    assert all_in(tmp_path) == [written]


def test_a_result_of_other_settings_is_not_taken(tmp_path: Path) -> None:
    write(tmp_path, result("fedavg", 0, 0.75))
    with pytest.raises(ComparisonError, match=r"'alpha' = \S+, not 3\.0; remove it"):
        kept(tmp_path, "fedavg", 0, from_run_config({**CONFIG, "alpha": 3.0}))
    # Where the data lie changes no number.
    assert kept(tmp_path, "fedavg", 0, from_run_config({**CONFIG, "data-dir": "/elsewhere"}))


@pytest.mark.parametrize("text", ["", "[]", '{"method": 3}', "{"])
def test_a_file_of_something_else_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "fedavg-s0.json").write_text(text)
    with pytest.raises(DataError, match=r"fedavg-s0\.json"):
        all_in(tmp_path)


def test_no_results_are_said(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="no results"):
        all_in(tmp_path)


def test_the_table_has_means_over_seeds_in_the_methods_order(tmp_path: Path) -> None:
    for one in (result("fd", 0, 0.5), result("fedavg", 0, 0.7), result("fedavg", 1, 0.8)):
        write(tmp_path, one)
    found = table(all_in(tmp_path))
    assert list(found["method"]) == ["FedAvg", "FD"]
    assert list(found["accuracy"]) == ["75.0 ± 5.0 %", "50.0 %"]
    assert list(found["of"]) == ["central model", "mean client"]
    assert list(found["best round"]) == ["90.0 ± 0.0 %", "50.0 %"]
    assert list(found["MB up"]) == ["4.0", "4.0"]
    assert list(found["several architectures"]) == ["no", "yes"]


def test_a_comparison_goes_on_with_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    shown = compare(["local", "fedavg"], [0], CONFIG, tmp_path, jobs=1, told=lines.append)
    assert shown.count("\n") == 2 + 2
    assert "FedAvg" in shown
    assert any(line.startswith("fedavg, seed 0: round 2/2: central ") for line in lines)
    frame = pd.read_csv(tmp_path / "table.csv")
    assert list(frame["method"]) == ["local only", "FedAvg"]
    assert len(json.loads((tmp_path / "table.json").read_text())) == 2
    page = (tmp_path / "comparison.html").read_text()
    assert "Accuracy against MB to and from a client" in page

    def never(*_arguments: object) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(command, "run_here", never)
    assert compare(["local", "fedavg"], [0], CONFIG, tmp_path, jobs=1, told=lines.append) == shown
    assert lines[-1].startswith("2 runs, 2 of them there already")


def test_results_of_other_settings_are_in_no_mean(tmp_path: Path) -> None:
    """Seed 0 at another alpha and seed 1 would make "70.0 ± 20.0": of nothing."""
    other = from_run_config({**CONFIG, "alpha": 0.1, "seed": 1})
    points = (Point(1, 0.5, None, 0.5, 0, 0.0, 0.0),)
    measured = Measured(points, 1.0, 1.0, 1, 1.0, 1.0)
    write(tmp_path, result("fedavg", 0, 0.9))
    write(tmp_path, Result.of("fedavg", other, measured))
    write(tmp_path, Result.of("local", other, measured))
    lines: list[str] = []
    shown = compare(["fedavg"], [0], CONFIG, tmp_path, jobs=1, told=lines.append)
    assert "90.0 %" in shown
    assert "±" not in shown
    assert "local" not in shown
    assert lines[1:] == [
        "left out: 2 results of other settings, as local-s1.json with 'alpha' = 0.1, not 1.0"
    ]
    assert list(pd.read_csv(tmp_path / "table.csv")["accuracy"]) == ["90.0 %"]
    assert "local only" not in (tmp_path / "comparison.html").read_text()


def test_what_is_wrong_with_a_run_is_said_with_its_name(tmp_path: Path) -> None:
    missing = {**CONFIG, "dataset": "fashionmnist", "data-dir": str(tmp_path / "none")}
    with pytest.raises(ComparisonError, match=r"^local, seed 0: no t10k-images"):
        compare(["local", "fd"], [0], missing, tmp_path / "out", jobs=1, told=lambda line: None)
    assert not list((tmp_path / "out").glob("*"))


def test_without_names_all_run_that_take_the_models(tmp_path: Path) -> None:
    several = {**CONFIG, "local-models": "cnn,resnet18"}
    wanted = {one.method for one in command._wanted([], [0], several)}
    assert "fedavg" not in wanted
    assert {"local", "pooled", "fd", "fedmd", "fedzge"} <= wanted


@pytest.mark.slow
def test_the_command_runs_side_by_side(tmp_path: Path) -> None:
    """The numbers are those of one process that runs one after another."""
    names, pairs = ["local", "fedavg"], " ".join(f"{key}={value}" for key, value in CONFIG.items())
    done = _fedzge(tmp_path, "--methods", "local,fedavg", "--run-config", pairs, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert "local, seed 0: round 2/2: mean client " in done.stdout
    assert "| local only | nothing | " in done.stdout
    compare(names, [0], CONFIG, tmp_path / "alone", jobs=1, told=lambda line: None)
    pairs_of = zip(all_in(tmp_path / "comparison"), all_in(tmp_path / "alone"), strict=True)
    for together, alone in pairs_of:
        assert together.measured.points == alone.measured.points


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    wrong = _fedzge(tmp_path, "--methods", "loacl")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: no method named 'loacl'; known: ")
    assert not list(tmp_path.iterdir())


def _fedzge(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedzge_flwr.cli", "compare", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
