"""Run folders as files of someone else's: every value checked, every text cut, no link followed."""

from __future__ import annotations

import io
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from PIL import UnidentifiedImageError
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.reading import open_within, parse_json, read_within
from fedzge_flwr.common.text import printable
from fedzge_flwr.config.parsing import one_line
from fedzge_flwr.observers.recalls import Recalls
from fedzge_flwr.observers.round_row import RoundRow

_MOST_CONFIG_BYTES = 16_000_000
# Of K classes a row may hold K² counts, 3 MB at 1000; all but the newest are passed over.
_MOST_FILE_BYTES = 2_000_000_000
_MOST_LINE_BYTES = 16_000_000
_MOST_ROWS_BYTES = 64_000_000
_MOST_PICTURE_BYTES = 1_000_000
_MOST_PIXELS = 4_000_000
_MOST_PICTURES = 12
_MOST_LISTED = 1_000_000
_MOST_CHARACTERS = 200
_MOST_ENTRIES = 1000
_MOST_NAMES = 64
_MOST_NUMBER = 1e18
_LARGE_CONFUSION = re.compile(rb'"confusion": \[\[[0-9, \[\]]{100000,}\]\]')
_PICTURE = re.compile(r"round-(\d{1,9})\.png")


def _cut(text: str) -> str:
    return printable(text, _MOST_CHARACTERS)


def _scalar(value: object) -> object:
    """Return a value that a table can show: what is nested as the text that it is."""
    if isinstance(value, str):
        return _cut(value)
    return _cut(json.dumps(value)) if isinstance(value, (dict, list)) else value


def _even(counts: list[list[int]] | None) -> list[list[int]] | None:
    if counts and len({len(row) for row in counts}) > 1:
        raise ValueError("give as many classes for each client")
    return counts


_Text = Annotated[str, AfterValidator(_cut)]
_Count = Annotated[int, Field(ge=0)]
_Entries = Annotated[dict[_Text, _Text], Field(max_length=_MOST_ENTRIES)]


class _Config(BaseModel):
    """What is read of ``config.json``."""

    status: _Text
    settings: Annotated[
        dict[_Text, Annotated[Any, BeforeValidator(_scalar)]], Field(max_length=_MOST_ENTRIES)
    ]
    seed: int | _Text = "?"
    versions: _Entries = {}
    clients: Annotated[dict[_Text, _Text], Field(max_length=_MOST_LISTED)] = {}
    class_counts: Annotated[list[list[_Count]] | None, AfterValidator(_even)] = None
    started: _Text = ""
    seconds: float | _Text = ""


def read_config(folder: Path) -> dict[str, Any]:
    """Return what a run folder's ``config.json`` says, every text cut to 200 characters.

    Raises
    ------
    RunFolderError
        If it is not there, is no regular file of at most 16 MB, or says something else.
    """
    name = "config.json"
    try:
        content = parse_json(read_within(folder, name, _MOST_CONFIG_BYTES))
        if not isinstance(content, dict):
            raise ValueError("it is no dictionary")
        return _Config.model_validate(content).model_dump()
    except (OSError, ValueError) as error:
        raise _unreadable(folder, name, error) from error


def read_rows(folder: Path) -> list[RoundRow]:
    """Return the finished rows of a run folder's ``rounds.jsonl``.

    Where the counts of the confusion are 100 kB or more, the newest row that is evaluated alone has
    them.

    Raises
    ------
    RunFolderError
        If it is not there, is no regular file of at most 2 GB, has a line of over 16 MB or, those
        counts aside, over 64 MB in all, or a line is not the row of a later round than the one
        before.
    """
    name, rows = "rounds.jsonl", list[RoundRow]()
    newest, size = (0, b""), 0
    try:
        with open_within(folder, name) as file:
            for number, line in enumerate(_lines(file)):
                name = f"line {number + 1} of rounds.jsonl"
                if len(line) > _MOST_LINE_BYTES:
                    raise ValueError(_over(_MOST_LINE_BYTES))
                short = _LARGE_CONFUSION.sub(b'"confusion": []', line)
                rows.append(_row(short, rows[-1].round if rows else 0))
                if rows[-1].recalls != Recalls():
                    newest = (number, line if len(short) < len(line) else b"")
                name, size = "rounds.jsonl", size + len(short)
                if size > _MOST_ROWS_BYTES:
                    raise ValueError(f"without confusions {_over(_MOST_ROWS_BYTES)}")
        if newest[1]:
            name = f"line {newest[0] + 1} of rounds.jsonl"
            rows[newest[0]] = _row(newest[1], 0)
        name = "rounds.jsonl"
        _check_all(rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(folder, name, error) from error
    return rows


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of what a file has by now; of one that is too long, its beginning."""
    left = os.fstat(file.fileno()).st_size
    if left > _MOST_FILE_BYTES:
        raise ValueError(_over(_MOST_FILE_BYTES))
    while left > 0:
        line = file.readline(min(left, _MOST_LINE_BYTES + 1))
        # Of a run that goes on the last line may be half there.
        if not line.endswith(b"\n") and len(line) <= _MOST_LINE_BYTES:
            return
        left -= len(line)
        yield line


def _over(most: int) -> str:
    return f"it has over {most / 1e6:g} MB"


def read_pictures(folder: Path) -> dict[int, bytes]:
    """Return PNGs of synthetic images, by round; of many rounds twelve, evenly chosen.

    What is returned has been drawn anew from the pixels alone.

    Raises
    ------
    RunFolderError
        If one of them is no PNG of a modest size, or a link.
    """
    name = "generated"
    try:
        if not os.path.lexists(folder / name):
            return {}
        found = _pictures_in(folder / name)
        rounds = sorted(found)
        chosen = np.linspace(0, len(rounds) - 1, min(_MOST_PICTURES, len(rounds)))
        pictures = {}
        for at in dict.fromkeys(chosen.round().astype(int).tolist()):
            name = f"generated/{found[rounds[at]]}"
            pictures[rounds[at]] = _redrawn(read_within(folder, name, _MOST_PICTURE_BYTES))
    except Exception as error:  # Pillow raises whatever its parts suggest
        raise _unreadable(folder, name, error) from error
    return pictures


def _unreadable(folder: Path, name: str, error: Exception) -> RunFolderError:
    if not folder.is_dir():
        return RunFolderError(f"there is no folder {folder}: name that of a run")
    if isinstance(error, FileNotFoundError):
        return RunFolderError(
            f"{folder} is not the folder of a run with rounds: it has no {Path(name).name}; name "
            "one that is"
        )
    if isinstance(error, ValidationError):
        reason = one_line(error)
    elif isinstance(error, UnidentifiedImageError):
        # Its own text is the address of what was read.
        reason = "it is no PNG"
    elif isinstance(error, OSError):
        reason = error.strerror or str(error)
    else:
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
    return RunFolderError(
        f"{folder} cannot be read as a run: {name}: {printable(reason)}; mend or remove it"
    )


@cache
def _rows() -> TypeAdapter[RoundRow]:
    return TypeAdapter(RoundRow)


def _row(line: bytes, after: int) -> RoundRow:
    parsed = parse_json(line, _MOST_NUMBER)
    if not isinstance(parsed, dict):
        raise ValueError("it is no row of a run")
    # Infinite losses are null: see `RoundRow.to_json`.
    losses = parsed.get("loss")
    if isinstance(losses, dict):
        parsed["loss"] = {
            name: math.nan if value is None else value for name, value in losses.items()
        }
    row = _rows().validate_python(parsed)
    if row.round <= after:
        raise ValueError(f"round {row.round} comes after round {after}")
    return row


def _check_all(rows: Sequence[RoundRow]) -> None:
    """Check what figures of all rows depend on."""
    if len({len(row.answer_classes) for row in rows if row.answer_classes}) > 1:
        raise ValueError("its rows count answers in different numbers of classes")
    if any(count < 0 for row in rows for count in row.answer_classes):
        raise ValueError("a count of answers is below 0")
    names = {name for row in rows for name in row.phase_seconds}
    for traffic in (item for row in rows for item in row.client_bytes.values()):
        names.update(traffic.down, traffic.up)
    if len(names) > _MOST_NAMES:
        raise ValueError(f"it has {len(names)} phases and purposes, {_MOST_NAMES} at most are read")


def _pictures_in(folder: Path) -> dict[int, str]:
    if folder.is_symlink():
        raise ValueError("it is a link, which is not followed")
    found = {}
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            if number > _MOST_LISTED:
                raise ValueError("it holds too many files")
            if match := _PICTURE.fullmatch(entry.name):
                found[int(match.group(1))] = entry.name
    return found


def _redrawn(data: bytes) -> bytes:
    """Return a PNG with the pixels of another, and nothing else that it holds."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            if opened.width * opened.height > _MOST_PIXELS:
                raise ValueError(f"it has {opened.width}×{opened.height} pixels")
            image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
    drawn = io.BytesIO()
    image.save(drawn, "png")
    return drawn.getvalue()
