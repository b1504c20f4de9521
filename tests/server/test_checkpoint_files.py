"""Checkpoint files that hold anything: one line each, and the one before is used."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedzge_flwr.common.errors import CheckpointError
from fedzge_flwr.common.version import __version__
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.server.checkpoints import FORMAT, Checkpoint, CheckpointFolder

WHOLE: dict[str, Any] = {
    "round": 2,
    "settings": {},
    "server": {},
    "clients": {},
    "strategy": {},
    "rows": [],
    "data": {},
}


def write(folder: Path, data: bytes) -> Path:
    """Write a checkpoint of round 2 whose digest is right, over one of round 1."""
    CheckpointFolder(folder).save(Checkpoint(1, {}, {}, {}, {}))
    head = f"fedzge-checkpoint {FORMAT} {__version__} {hashlib.sha256(data).hexdigest()}\n"
    path = folder / "round-000002.checkpoint"
    path.write_bytes(head.encode() + data)
    return path


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({**WHOLE, "settings": []}, "'settings' = []: input should be a valid dictionary"),
        ({**WHOLE, "round": "2"}, "'round' = '2': input should be a valid integer"),
        ({**WHOLE, "round": -1}, "'round' = -1: input should be greater than or equal to 0"),
        ({**WHOLE, "round": True}, "'round' = True: input should be a valid integer"),
        ({**WHOLE, "server": None}, "'server' = None: input should be a valid dictionary"),
        ({**WHOLE, "rows": [1]}, "'rows' = 1: input should be a valid dictionary"),
        ({**WHOLE, "more": 1}, "'more' = 1: unexpected keyword argument"),
        ({"round": 2}, "'settings' = "),
        ([1, 2], "no dictionary"),
        (None, "no dictionary"),
        ({**WHOLE, "server": {"x": {"ndarray": 3}}}, ""),
        ({**WHOLE, "server": np.float64}, ""),
    ],
)
def test_what_is_no_checkpoint_is_named_and_passed_over(
    content: object, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, saved(content))
    assert CheckpointFolder(tmp_path).newest().round == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{path} holds something else than a checkpoint ({reason}")
    assert line.endswith(" and is passed over")
    assert "\n" not in line


def test_a_damaged_archive_is_passed_over(tmp_path: Path) -> None:
    whole, rng = saved(WHOLE), np.random.default_rng(0)
    for number in range(60):
        changed = bytearray(whole)
        at = int(rng.integers(len(whole)))
        if number % 3 == 0:
            del changed[at:]
        else:
            changed[at] ^= 1 << int(rng.integers(8))
        write(tmp_path, bytes(changed))
        assert CheckpointFolder(tmp_path).newest().round in (1, 2)


def test_one_of_the_format_before_is_gone_on_from(tmp_path: Path) -> None:
    data = saved({key: value for key, value in WHOLE.items() if key != "data"})
    path = write(tmp_path, data)
    path.write_bytes(path.read_bytes().replace(b"checkpoint 3 ", b"checkpoint 2 ", 1))
    found = CheckpointFolder(tmp_path).newest()
    assert (found.round, found.data) == (2, {})
    found.check_data({"test images": "a"}, from_run_config({}))


def test_other_images_are_refused_by_name_or_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    then = {"test images": "a", **{f"client {n}": str(n) for n in range(9)}}
    CheckpointFolder(tmp_path, then).save(Checkpoint(1, {}, {}, {}, {}))
    found = CheckpointFolder(tmp_path).newest()
    assert found.data == then
    settings = from_run_config({"data-dir": "/x"})
    found.check_data({**then, "more": "b"}, settings)
    found.check_data({}, settings)
    with pytest.raises(CheckpointError) as caught:
        found.check_data({**then, "client 3": "b"}, settings)
    assert str(caught.value) == (
        "'data-dir' = '/x' has other images than the run to resume began with (client 3): bring "
        "those back, start a new run, or go on with these by 'data-changes' = \"warn\""
    )
    with pytest.raises(CheckpointError, match=r"\(test images, client 0, .* client 3, …\)"):
        found.check_data(dict.fromkeys(then, "b"), settings)
    found.check_data({"client 3": "b"}, from_run_config({"data-changes": "warn"}))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("the run goes on with other images than it began with: client 3 (")
