"""The server's whole state on disk, so that a run that was stopped goes on as if it had not been.

A checkpoint is one line and a ``torch.save`` of plain values, arrays and tensors, read without
running any code of it. The line says what it is: the number of its format, the version that wrote
it, and the SHA-256 of the rest. Another format is refused, since it holds other things; another
version of the same format is gone on from with a warning, since its numbers may differ.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fedzge_flwr.common.errors import CheckpointError
from fedzge_flwr.common.file_kinds import reason_of
from fedzge_flwr.common.files import atomic_path, make_folder, remove_remains
from fedzge_flwr.common.reading import place, read_file
from fedzge_flwr.common.text import printable
from fedzge_flwr.common.version import __version__
from fedzge_flwr.config.parsing import NUMBERS_DO_NOT_DEPEND_ON, one_line
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.tensors import to_tensor

LOGGER = logging.getLogger("flwr.fedzge")

FORMAT = 7
"""To be raised when a checkpoint comes to hold other things."""

_HEAD = re.compile(rb"fedzge-checkpoint (\d+) (?:(\S+) )?([0-9a-f]{64})")
_FILE = re.compile(r"round-(\d{6,})\.checkpoint")
_KEPT = 2
_ARRAY = "ndarray"
_MOST_NAMED = 5


@dataclass(frozen=True)
class Checkpoint:
    """All that a server needs to go on after a round.

    Parameters
    ----------
    round : int
        The last round that is done; 0: the clients are known, and nothing else has happened.
    settings : dict[str, Any]
        The run config, as `fedzge_flwr.config.sections.Settings.to_run_config` gives it.
    server, clients, strategy : dict[Any, Any]
        Plain values, NumPy arrays and tensors, each owner's own.
    rows : list[dict[str, Any]]
        The newest rounds' rows as JSON types (`fedzge_flwr.observers.base.RoundRow.to_json`), for
        a run folder that has lost them.
    data : dict[str, str]
        Digests of the images that the server's machine has, by what they are, e.g.
        ``{"test images": "…"}``.
    """

    # For `_read`, since what is read may be anything.
    __pydantic_config__ = ConfigDict(extra="forbid")

    round: Annotated[int, Field(ge=0, strict=True)]
    settings: dict[str, Any]
    server: dict[Any, Any]
    clients: dict[Any, Any]
    strategy: dict[Any, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)

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

    def check_data(self, now: Mapping[str, str], settings: Settings) -> None:
        """Refuse to go on with other images, or warn of them if ``data-changes`` says so.

        What is not known then and now is not compared.

        Parameters
        ----------
        now : Mapping[str, str]
            As `data`.
        settings : Settings
            The run's.

        Raises
        ------
        CheckpointError
            If images are others.
        """
        others = [name for name, digest in now.items() if self.data.get(name, digest) != digest]
        if not others:
            return
        told = ", ".join([*others[:_MOST_NAMED], *["…"] * (len(others) > _MOST_NAMED)])
        if settings.run.data_changes == "refuse":
            raise CheckpointError(
                f"'data-dir' = '{settings.data.data_dir}' has other images than the run to resume "
                f"began with ({told}): bring those back, start a new run, or go on with these by "
                "'data-changes' = \"warn\""
            )
        LOGGER.warning(
            "the run goes on with other images than it began with: %s ('data-changes' = \"warn\")",
            told,
        )


class CheckpointFolder:
    """The checkpoints of a run, of which the two newest are kept.

    One process at a time may write it; a `RunFolder` sees to that for its own.

    Parameters
    ----------
    path : str or Path
        Made if need be, in a folder that exists.
    data : Mapping[str, str], optional
        What each checkpoint says of the data (`Checkpoint.data`).
    """

    def __init__(self, path: str | Path, data: Mapping[str, str] | None = None) -> None:
        self.path = place(path)
        self._data = dict(data or {})

    def prepare(self) -> None:
        """Make the folder, if it is not there.

        Raises
        ------
        CheckpointError
            If it cannot be made.
        """
        try:
            # Not its parents: a run folder that is gone is not begun anew without its rows.
            make_folder(self.path, parents=False)
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
        torch.save(
            _pack(asdict(replace(checkpoint, data={**checkpoint.data, **self._data}))), payload
        )
        data = payload.getvalue()
        name = f"round-{checkpoint.round:06d}.checkpoint"
        try:
            make_folder(self.path, parents=False)
            with atomic_path(self.path / name) as temporary, temporary.open("wb") as file:
                digest = hashlib.sha256(data).hexdigest()
                file.write(f"fedzge-checkpoint {FORMAT} {__version__} {digest}\n".encode())
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
            If there is none, or if the newest is of another format.
        """
        files = self._files()
        for round_ in sorted(files, reverse=True):
            try:
                return _read(files[round_])
            except _OtherFormatError:
                # An older one that can be read would undo what another version has done since.
                raise
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
        try:
            found = [(_FILE.fullmatch(path.name), path) for path in self.path.iterdir()]
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be read ({error.strerror}); let this process's user read it"
            ) from error
        return {int(match.group(1)): path for match, path in found if match}


class _OtherFormatError(CheckpointError):
    """A whole checkpoint that another version has written and this one does not understand."""


def _read(path: Path) -> Checkpoint:
    try:
        # However large the memory and the models are: its digest says what it should be.
        head, _, data = read_file(path, sys.maxsize).partition(b"\n")
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror})") from error
    match = _HEAD.fullmatch(head)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint and is passed over")
    if hashlib.sha256(data).hexdigest().encode() != match[3]:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged and is passed over")
    version = printable(match[2].decode(errors="replace")) if match[2] else None
    if int(match[1]) != FORMAT:
        who = f"version {version}" if version else "an earlier version"
        raise _OtherFormatError(
            f"checkpoint {path} is of format {int(match[1])}, written by {who} of fedzge-flwr; "
            f"this is version {__version__}, which reads format {FORMAT}: resume with the version "
            "that wrote it"
        )
    try:
        content = _unpack(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        if not isinstance(content, dict):
            raise ValueError("no dictionary")
        checkpoint = TypeAdapter(Checkpoint).validate_python(content)
    except Exception as error:  # torch raises whatever a damaged file suggests
        reason = one_line(error) if isinstance(error, ValidationError) else reason_of(error)
        raise CheckpointError(
            f"{path} holds something else than a checkpoint ({printable(reason)}) and is passed "
            "over"
        ) from error
    if version != __version__:
        LOGGER.warning(
            "checkpoint %s was written by fedzge-flwr %s, and fedzge-flwr %s goes on from it: what "
            "follows may differ from a run by one version",
            path,
            version,
            __version__,
        )
    return checkpoint


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
