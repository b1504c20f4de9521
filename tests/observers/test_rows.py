"""``rounds.jsonl`` after a loss: each round up to the checkpoint's once, or one clear line."""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.files import append_line
from fedzge_flwr.observers.recalls import Recalls
from fedzge_flwr.observers.round_row import RoundRow
from fedzge_flwr.observers.rows import RowsFile
from fedzge_flwr.wire.traffic import MissingReply, Traffic

ROUNDS = 6


def row(round_: int) -> RoundRow:
    return RoundRow(
        round=round_,
        central_accuracy=0.1 * round_,
        central_loss=None,
        ensemble_accuracy=0.5,
        mean_client_accuracy=0.25,
        client_accuracy={0: 0.3, 11: 0.2},
        sampled=(0, 11),
        participants=(0,),
        unmoved=(),
        missing=(MissingReply(11, "train.round", "no reply: ‘späť’"),),
        skipped=None,
        queries_per_client=3 * round_,
        queries=6 * round_,
        bytes_down=1,
        bytes_up=2,
        bytes_down_total=round_,
        bytes_up_total=2 * round_,
        evaluation_bytes_down=0,
        evaluation_bytes_up=0,
        seconds=1.5,
        client_bytes={0: Traffic({"images": 4}, {"logits": 2})},
        loss={"fidelity": 1 / 3, "total": float("inf")},
        recalls=Recalls((0.5, None), (1.0, None), ((1, 1), (0, 2))),
    )


KEPT = [row(number).to_json() for number in (4, 5, 6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "rounds.jsonl"
    for number in range(1, ROUNDS + 1):
        RowsFile(path).append(row(number))
    return path


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Any:
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_figure_that_json_does_not_have_is_null(path: Path) -> None:
    odd = replace(row(ROUNDS + 1), central_accuracy=math.nan, central_loss=-math.inf)
    RowsFile(path).append(odd)
    found = RowsFile(path).read()[-1]
    assert (found.central_accuracy, found.central_loss) == (None, None)


def test_a_row_comes_back_as_it_was(path: Path) -> None:
    assert [item.round for item in RowsFile(path).read()] == list(range(1, ROUNDS + 1))
    first = RowsFile(path).read()[0]
    assert first.to_json() == row(1).to_json()


def test_cut_at_every_byte_of_the_last_two_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rounds.jsonl"
    for number in (1, 2, 3):
        RowsFile(path).append(row(number))
    kept = [row(number).to_json() for number in (2, 3)]
    # The same bytes are written with and without these; thousands of times they take long.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(logging.getLogger("flwr.fedzge"), "disabled", True)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    up_to_2 = b"".join(lines[:2])
    for length in range(len(lines[0]), len(whole) + 1):
        for last, wanted in ((3, whole), (2, up_to_2))[: 1 + (length % 7 == 0)]:
            path.write_bytes(whole[:length])
            RowsFile(path).recover(last, kept)
            assert path.read_bytes() == wanted, (length, last)


def test_what_is_lost_comes_back_and_is_named(path: Path, warned: Any) -> None:
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    RowsFile(path).recover(6, KEPT)
    assert path.read_bytes() == whole
    assert warned() == ["rounds.jsonl had lost rounds 5 and 6: back from the checkpoint"]
    path.unlink()
    RowsFile(path).recover(3, [row(number).to_json() for number in (1, 2, 3)])
    assert path.read_bytes() == b"".join(lines[:3])


@pytest.mark.parametrize(
    "rows",
    [
        # Of earlier versions: a row was lost, and the run went on.
        (1, 2, 4, 5, 6, 5, 6),
        (1, 2, 3, 4, 5, 6, 7, 8),
        (6, 5, 4, 3, 2, 1),
    ],
)
def test_rows_are_there_once_and_in_order(tmp_path: Path, rows: tuple[int, ...]) -> None:
    path = tmp_path / "rounds.jsonl"
    for number in rows:
        RowsFile(path).append(row(number))
    kept = [row(number).to_json() for number in (3, 4)]
    RowsFile(path).recover(4, kept)
    assert [item.round for item in RowsFile(path).read()] == [1, 2, 3, 4]


def test_what_is_whole_is_not_written_again(path: Path) -> None:
    before = path.stat().st_mtime_ns, path.stat().st_ino
    RowsFile(path).recover(6, KEPT)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == before


DAMAGES = {
    "cut and glued to the next": lambda line: line[:40],
    "not JSON": lambda line: b"hello\n",
    "zeros": lambda line: b"\0" * 30 + b"\n",
    "not UTF-8": lambda line: b'{"round": "\xff"}\n',
    "another object": lambda line: b'{"round": 2}\n',
    "a list": lambda line: b"[1, 2]\n",
    "a number": lambda line: b"7\n",
    "a round that is none": lambda line: line.replace(b'"round": ', b'"round": -'),
    "nested without end": lambda line: b"[" * 200_000 + b"\n",
    "a field more": lambda line: line.replace(b"{", b'{"more": 1, ', 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_that_the_checkpoint_has_comes_back(path: Path, damage: str) -> None:
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    lines[4] = DAMAGES[damage](lines[4])
    path.write_bytes(b"".join(lines))
    RowsFile(path).recover(6, KEPT)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_row_that_nobody_has_is_one_line(path: Path, damage: str) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = DAMAGES[damage](lines[1])
    spoilt = b"".join(lines)
    path.write_bytes(spoilt)
    with pytest.raises(RunFolderError) as caught:
        RowsFile(path).recover(6, KEPT)
    lost = "rounds 2 and 3" if damage == "cut and glued to the next" else "round 2"
    assert str(caught.value) == (
        f"{path}, line 2: the row is damaged, and the checkpoint does not have it ({lost}): "
        "restore the line from a copy, or remove it; the run then goes on without that round's "
        "figures"
    )
    assert path.read_bytes() == spoilt


def test_rows_that_nobody_has_are_named(path: Path, warned: Any) -> None:
    """What the line before advises."""
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], *lines[3:]]))
    RowsFile(path).recover(6, KEPT)
    assert [item.round for item in RowsFile(path).read()] == [1, 4, 5, 6]
    assert warned() == [
        "rounds.jsonl has no row of rounds 2 and 3, nor has the checkpoint: their figures are left "
        "out"
    ]


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(path: Path) -> None:
    import resource

    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_line(path, json.dumps(row(7).to_json()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
