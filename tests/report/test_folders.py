"""Run folders that are damaged, half there, elsewhere or read-only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.launch.session import _mark_interrupted
from fedzge_flwr.observers.naming import config_of
from fedzge_flwr.observers.recalls import Recalls
from fedzge_flwr.report import reading
from fedzge_flwr.report.page import write_report
from fedzge_flwr.report.runs import load_run
from tests.helpers.hostile.case import Place, row


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Place(tmp_path, tmp_path, tmp_path).run()


def emptied(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


def write(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda run: (run / name).write_bytes(data)


def a_file(run: Path) -> None:
    shutil.rmtree(run)
    run.write_text("x")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "there is no folder RUN: name that of a run"),
    "a file": (a_file, "there is no folder RUN: name that of a run"),
    "empty": (emptied, "RUN is not the folder of a run with rounds: it has no config.json; name"),
    "no rows": (
        lambda run: (run / "rounds.jsonl").unlink(),
        "RUN is not the folder of a run with rounds: it has no rounds.jsonl; name",
    ),
    "no round": (write("rounds.jsonl", b""), "RUN has no finished round yet; come back after"),
    "half a config": (
        write("config.json", b'{"status": "run'),
        "RUN cannot be read as a run: config.json: ",
    ),
    "a config of zeros": (write("config.json", bytes(50)), "RUN cannot be read as a run: config."),
    "a list": (
        write("config.json", b"[]"),
        "RUN cannot be read as a run: config.json: it is no dictionary; mend or remove it",
    ),
    "rows of zeros": (
        write("rounds.jsonl", bytes(50) + b"\n"),
        "RUN cannot be read as a run: line 1 of rounds.jsonl: ",
    ),
    "no picture": (
        write("generated/round-000002.png", b"x"),
        "RUN cannot be read as a run: generated/round-000002.png: it is no PNG; mend or remove it",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_told_of_in_one_line(kind: str, run: Path) -> None:
    damage, message = DAMAGES[kind]
    damage(run)
    with pytest.raises(RunFolderError) as caught:
        load_run(run)
    assert str(caught.value).startswith(message.replace("RUN", str(run)))
    assert "\n" not in str(caught.value)


def test_folders_by_other_paths(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run.parent / "link").symlink_to(run)
    run.chmod(0o555)
    monkeypatch.chdir(run.parent)
    for path in ("run", "./run/", "../" + run.parent.name + "/run", "link"):
        assert len(load_run(Path(path)).rows) == 3
    run.rename("moved")
    assert len(load_run(Path("moved")).rows) == 3


@pytest.mark.parametrize("content", [b"[]", b"3", b"{}", b"{", b"\xff", b'{"status": []}', b""])
def test_a_status_that_is_none_is_left_as_it_is(content: bytes, run: Path) -> None:
    (run / "config.json").write_bytes(content)
    assert config_of(run).get("status") in (None, [])
    _mark_interrupted(run)
    assert (run / "config.json").read_bytes() == content


def grown(run: Path, number: int, recalls: Recalls, **more: object) -> None:
    """Give a run so many rows with these recalls."""
    line = json.dumps({**row(1).to_json(), "recalls": asdict(recalls), **more})
    head, tail = line.split('"round": 1,')
    with (run / "rounds.jsonl").open("w") as file:
        for round_ in range(1, number + 1):
            file.write(f'{head}"round": {round_},{tail}\n')


def test_a_run_of_a_thousand_classes_can_be_read(run: Path) -> None:
    """Of what the central model takes for what, 3 MB a round, a page shows the newest alone."""
    counts = tuple((7, *[0] * 998, at) for at in range(1000))
    recalls = Recalls((0.5,) * 1000, (0.25,) * 1000, counts)
    grown(run, 23, recalls)
    assert (run / "rounds.jsonl").stat().st_size > 64_000_000
    rows = load_run(run).rows
    assert [found.round for found in rows] == list(range(1, 24))
    assert rows[-1].recalls == recalls
    assert {found.recalls for found in rows[:-1]} == {replace(recalls, confusion=())}
    # What is not read of others is still looked at where it is shown.
    text = (run / "rounds.jsonl").read_text()
    (run / "rounds.jsonl").write_text(text[:-100].rpartition("7, 0")[0] + "7, 0]]}}\n")
    with pytest.raises(RunFolderError, match=r"line 23 of rounds\.jsonl: "):
        load_run(run)


@pytest.mark.parametrize(
    ("limit", "most", "said"),
    [
        ("_MOST_LINE_BYTES", 2000, "line 1 of rounds.jsonl: it has over 0.002 MB"),
        ("_MOST_ROWS_BYTES", 20_000, "rounds.jsonl: without confusions it has over 0.02 MB"),
        ("_MOST_FILE_BYTES", 30_000, "rounds.jsonl: it has over 0.03 MB"),
    ],
)
def test_rows_without_end_are_refused(
    limit: str, most: int, said: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown(run, 20, Recalls(), skipped="x" * 2500)
    assert len(load_run(run).rows) == 20
    monkeypatch.setattr(reading, limit, most)
    with pytest.raises(RunFolderError) as caught:
        load_run(run)
    assert f"{run} cannot be read as a run: {said}" in str(caught.value)


def test_a_folder_whose_name_is_no_text_is_shown(run: Path, tmp_path: Path) -> None:
    other = run.rename(run.with_name(os.fsdecode(b"caf\xe9")))
    write_report([other], tmp_path / "page.html")
    assert r"caf\udce9" in (tmp_path / "page.html").read_text()
