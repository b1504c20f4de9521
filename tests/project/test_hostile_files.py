"""Hundreds of files of someone who means harm, each opened as a user would open it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hostile.case import Place, make_outside
from tests.helpers.hostile.pickles import acting
from tests.helpers.hostile.process import MOST_SECONDS, all_cases
from tests.helpers.paths import ROOT

_MOST_PAGE_MB = 15
_MOST_MORE_MB = 800


def open_all(folder: Path, step: int) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.hostile.process", str(folder), str(step)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        cwd=ROOT,
        timeout=600,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def problems(found: dict[str, Any]) -> list[str]:
    """Return what an attack has achieved."""
    wanted = {"refused": {1}, "harmless": {0}, "either": {0, 1}}[found["outcome"]]
    page = found["page"].split("<script>")[0]
    achieved = {
        "something was run": found["canary"] or found["acts"],
        "something outside was read": found["outside"] and not found["leads_out"],
        "a secret was shown": found["secret"],
        f"exit code {found['code']}, {found['lines']}": found["code"] not in wanted,
        f"a traceback: {found['failure']}": found["failure"],
        f"not one line: {found['lines']}": len(found["lines"]) != found["code"],
        "a long line": any(len(line) > 4200 for line in found["lines"]),
        "a line that is not only text": not all(line.isprintable() for line in found["lines"]),
        "it took long": found["seconds"] > MOST_SECONDS,
        "the page is large": found["page_mb"] > _MOST_PAGE_MB,
        "the page has markup of others": re.search(r"<(img src=x|a href|svg|iframe)", page)
        or found["page"].count("</script>") not in (0, 2),
    }
    return [what for what, so in achieved.items() if so]


def check(found: list[dict[str, Any]]) -> None:
    achieved = {item["name"]: problems(item) for item in found}
    assert {name: what for name, what in achieved.items() if what} == {}
    peaks = [item["peak_mb"] for item in found]
    assert max(peaks) - peaks[0] < _MOST_MORE_MB


def test_there_are_enough_of_each() -> None:
    by_how: dict[str, int] = {}
    for case in all_cases():
        by_how[case.how] = by_how.get(case.how, 0) + 1
    assert sum(by_how.values()) > 400
    assert min(by_how.values()) > 80


def test_some_hostile_files_do_nothing(tmp_path: Path) -> None:
    """Every thirtieth; the next test has all."""
    found = open_all(tmp_path, 30)
    assert len(found) == len(all_cases()[::30])
    check(found)


@pytest.mark.faults
def test_all_hostile_files_do_nothing(tmp_path: Path) -> None:
    found = open_all(tmp_path, 1)
    assert [item["name"] for item in found] == [case.name for case in all_cases()]
    check(found)


def command(place: Place, name: str) -> tuple[list[str], str]:
    """Return a command that opens an attack, and what it is to say."""
    if name == "doctor":
        act = next(case for case in acting() if "protocol 2 with os.system" in case.name)
        return ["doctor", "--preset", str(act.make(place))], "wants posix.system, which is not run"
    run = place.run()
    picture = run / "generated" / "round-000002.png"
    picture.unlink()
    picture.symlink_to(place.outside / "picture.png")
    page = place.folder / "page.html"
    return ["report", str(run), "-o", str(page)], "generated/round-000002.png: is a link"


@pytest.mark.parametrize("name", ["report", pytest.param("doctor", marks=pytest.mark.faults)])
def test_the_commands_themselves(name: str, tmp_path: Path) -> None:
    place = Place(tmp_path / "here", tmp_path / "outside", tmp_path / "canary")
    place.folder.mkdir()
    make_outside(place.outside)
    arguments, wrong = command(place, name)
    done = subprocess.run(
        [sys.executable, "-m", "fedzge_flwr.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert len([line for line in said.splitlines() if wrong in line]) == 1
    assert "Traceback" not in said
    assert not (place.folder / "page.html").exists()
    assert not place.canary.exists()
