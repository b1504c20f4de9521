"""The server's whole state on disk, so that a run that was stopped goes on as if it had not been.

A checkpoint is one line (what it is, and the SHA-256 of the rest) and a ``torch.save`` of plain
values, arrays and tensors, read without running any code of it.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedzge_flwr.common.errors import CheckpointError
from fedzge_flwr.common.files import atomic_path, remove_remains
from fedzge_flwr.config.parsing import NUMBERS_DO_NOT_DEPEND_ON
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.tensors import to_tensor

LOGGER = logging.getLogger("flwr.fedzge")

_MAGIC = b"fedzge-checkpoint 1 "
_FILE = re.compile(r"round-(\d{6,})\.checkpoint")
_KEPT = 2
_ARRAY = "ndarray"


@dataclass(frozen=True)
class Checkpoint:
    """All that a server needs to go on after a round.

    Parameters
    ----------
    round : int
        The last round that is done; 0: the clients are known, and nothing else has happened.
    settings : dict[str, Any]
        The run config, as `fedzge_flwr.config.sections.Settings.to_run_config` gives it.
    server, clients, strategy : dict[str, Any]
        Plain values, NumPy arrays and tensors, each owner's own.
    """

    round: int
    settings: dict[str, Any]
    server: dict[str, Any]
    clients: dict[str, Any]
    strategy: dict[str, Any]

    def check_settings(self, settings: Settings) -> None:
        """Refuse to go on under other settings.

        Raises
        ------
        CheckpointError
            If a setting that the numbers depend on is another.
        """
        now = settings.to_run_config()
        for key in sorted(now.keys() | self.settings.keys()):
            then, here = self.settings.get(key), now.get(key)
            if then != here and key not in NUMBERS_DO_NOT_DEPEND_ON:
                raise CheckpointError(
                    f"the run to resume has '{key}' = {then!r}, this one {here!r}: go on with its "
                    "own settings (--run-config <its folder>/resume.toml)"
                )


class CheckpointFolder:
    """The checkpoints of a run, of which the two newest are kept.

    Parameters
    ----------
    path : str or Path
        Made if need be, in a folder that exists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()

    def prepare(self) -> None:
        """Make the folder, if it is not there.

        Raises
        ------
        CheckpointError
            If it cannot be made.
        """
        try:
            # Not its parents: a run folder that is gone is not begun anew without its rows.
            self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"checkpoints cannot be kept in {self.path} ({error.strerror or error}): make the "
                "folder above it, or name another"
            ) from error

    def save(self, checkpoint: Checkpoint) -> list[int]:
        """Write a checkpoint, remove those that are no longer needed, and return which remain.

        Returns
        -------
        list[int]
            Rounds, ascending.

        Raises
        ------
        CheckpointError
            If it cannot be written; those before it are then still there.
        """
        payload = io.BytesIO()
        torch.save(_pack(asdict(checkpoint)), payload)
        data = payload.getvalue()
        name = f"round-{checkpoint.round:06d}.checkpoint"
        try:
            self.path.mkdir(exist_ok=True)
            with atomic_path(self.path / name) as temporary, temporary.open("wb") as file:
                file.write(_MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n")
                file.write(data)
            remove_remains(self.path)
            files = self._files()
            # Those of later rounds are of a run that this one has taken the place of.
            kept = [round_ for round_ in sorted(files) if round_ <= checkpoint.round][-_KEPT:]
            for round_, file_path in files.items():
                if round_ not in kept:
                    file_path.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint of round {checkpoint.round} cannot be written to {self.path} "
                f"({error.strerror or error}); free space, then resume from the one before"
            ) from error
        return kept

    def newest(self) -> Checkpoint:
        """Return the newest checkpoint that is whole; the log names those that are not.

        Raises
        ------
        CheckpointError
            If there is none.
        """
        files = self._files()
        for round_ in sorted(files, reverse=True):
            try:
                return _read(files[round_])
            except CheckpointError as error:
                LOGGER.warning("%s", error)
        raise CheckpointError(
            f"no whole checkpoint in {self.path}: there is nothing to resume from; name the folder "
            "of a run with 'checkpoint-every' above 0, or start a new run"
        )

    def _files(self) -> dict[int, Path]:
        """Return the files by round."""
        if not self.path.is_dir():
            return {}
        found = ((_FILE.fullmatch(path.name), path) for path in self.path.iterdir())
        return {int(match.group(1)): path for match, path in found if match}


def _read(path: Path) -> Checkpoint:
    try:
        head, _, data = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror})") from error
    if not head.startswith(_MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of this version of fedzge-flwr")
    if hashlib.sha256(data).hexdigest().encode() != head.removeprefix(_MAGIC):
        raise CheckpointError(f"checkpoint {path} is truncated or damaged and is passed over")
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return Checkpoint(**_unpack(content))
    except (pickle.UnpicklingError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds something else than a checkpoint") from error


def _pack(value: Any) -> Any:
    """Replace NumPy arrays by what may be read back without running code."""
    if isinstance(value, np.ndarray):
        return {_ARRAY: to_tensor(value)}
    if isinstance(value, Mapping):
        return {key: _pack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_pack(item) for item in value)
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return value[_ARRAY].numpy()
        return {key: _unpack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_unpack(item) for item in value)
    return value
