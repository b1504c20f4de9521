"""What a node has given away and must not forget: a tally, and the secret behind its noise.

They are the node's, not an experiment's: a server gets no second budget, and no second draw of the
noise, by opening another experiment. With a ``state-dir`` they are files there, under a lock, and
on disk before an answer leaves; without one they last as long as a Flower run.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from flwr.app import ConfigRecord, RecordDict

from fedzge_flwr.common.errors import StateError
from fedzge_flwr.common.files import atomic_write_text, make_folder
from fedzge_flwr.common.node_folder import NODE_FOLDER, explained, locked, new_secret, node_secret
from fedzge_flwr.common.reading import place

_TALLY = "fedzge-tally"
_SECRET = "fedzge-secret"


@dataclass
class Tally:
    """How much a node has answered: images, and when it was last asked (seconds since 1970)."""

    images: int = 0
    last: float = 0.0


@dataclass
class Work:
    """How much a client has done in one experiment: rounds of local training."""

    trainings: int = 0


C = TypeVar("C", Tally, Work)


class Account(Protocol):
    """What a node keeps over all experiments."""

    @property
    def lasts(self) -> bool:
        """Whether it is kept for longer than a Flower run."""
        ...

    def tally(self) -> AbstractContextManager[Tally]:
        """Give the tally to be read and raised; it is kept when the block ends, before an answer.

        It is apart from models: going back to an older state does not lower it.
        """
        ...

    def secret(self) -> bytes:
        """Return 32 bytes that nobody else knows, the same each time."""
        ...


class ContextAccount:
    """An account in Flower's ``context.state``: for as long as the node and the run live.

    Parameters
    ----------
    records : RecordDict
        ``context.state``.
    """

    lasts = False

    def __init__(self, records: RecordDict) -> None:
        self._records = records

    @contextmanager
    def tally(self) -> Iterator[Tally]:
        """Give the tally."""
        with recorded_counts(self._records, _TALLY, Tally) as tally:
            yield tally

    def secret(self) -> bytes:
        """Return the secret of this run."""
        if _SECRET not in self._records:
            self._records[_SECRET] = ConfigRecord({"bytes": new_secret()})
        return cast(bytes, self._records.config_records[_SECRET]["bytes"])


class FolderAccount:
    """An account in a folder, for all processes and runs that use it.

    Parameters
    ----------
    folder : Path
        Made if need be, for its owner alone.

    Raises
    ------
    StateError
        If it cannot be made.
    """

    lasts = True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with explained(folder):
            make_folder(folder, mode=0o700)

    @contextmanager
    def tally(self) -> Iterator[Tally]:
        """Give the tally, to one message at a time."""
        with filed_counts(self._folder / "tally.json", Tally) as tally:
            yield tally

    def secret(self) -> bytes:
        """Return the secret; the first to ask makes it."""
        return node_secret(self._folder)


def open_account(records: RecordDict, state_dir: str) -> Account:
    """Open a node's account, in the owner's folder if there is one, else in Flower's context."""
    if not state_dir:
        return ContextAccount(records)
    return FolderAccount(place(state_dir, "state-dir") / NODE_FOLDER)


def own_images_token(secret: bytes, digest: str, purpose: str) -> str:
    """Return what tells a client's images from others, and not which they are.

    Parameters
    ----------
    secret : bytes
        The account's.
    digest : str
        The images' digest.
    purpose : str
        What else it depends on: tokens of two purposes cannot be compared.

    Returns
    -------
    str
        As `fedzge_flwr.wire.messages.HelloReply.data`.
    """
    key = hmac.digest(secret, b"key of own images", "sha256")
    token = hmac.digest(key, f"{purpose}/{digest}".encode(), "sha256")
    return hashlib.sha256(key).hexdigest()[:16] + token.hex()[:32]


@contextmanager
def recorded_counts(records: RecordDict, key: str, kind: type[C]) -> Iterator[C]:
    """Give counts that Flower's context keeps."""
    known: Mapping[str, Any] = records.config_records.get(key, ConfigRecord())
    counts = kind(**known)
    yield counts
    records[key] = ConfigRecord(asdict(counts))


@contextmanager
def filed_counts(path: Path, kind: type[C]) -> Iterator[C]:
    """Give counts that a file keeps, to one process at a time; written if they change.

    Raises
    ------
    StateError
        If the file cannot be read or written. What cannot be read is not taken for none: a budget
        must not begin anew.
    """
    with explained(path.parent), locked(path.with_suffix(".lock")):
        counts = kind()
        if path.exists():
            try:
                counts = _parsed(path.read_text(encoding="utf-8"), kind)
            except (ValueError, TypeError) as error:
                raise StateError(
                    f"{path} is not a tally ({error}): it tells how much this client has "
                    "answered; restore it, or remove it to begin anew"
                ) from error
        before = asdict(counts)
        yield counts
        if asdict(counts) != before:
            atomic_write_text(path, json.dumps(asdict(counts)))


def _parsed(text: str, kind: type[C]) -> C:
    counts = kind(**json.loads(text))
    for name, value in asdict(counts).items():
        if name == "last":
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} at {value!r}")
        elif type(value) is not int or value < 0:
            raise ValueError(f"{value!r} {name}")
    return counts
