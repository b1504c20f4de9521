"""Run folders that are damaged, half there, elsewhere or read-only."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.launch.session import _mark_interrupted
from fedzge_flwr.observers.naming import config_of
from fedzge_flwr.report.runs import load_run
from tests.helpers.hostile.case import Place


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
