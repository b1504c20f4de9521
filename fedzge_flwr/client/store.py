"""Where a client keeps what is its own between messages: its model, and how much it has answered.

Flower's ``context.state`` starts empty in every run and dies with a SuperNode. If the node's owner
names a folder, states are kept there instead, by experiment and under names of the client's own,
until the server holds a checkpoint that is newer: a server that goes on from an older one finds the
model that it knew. Nothing that a message says becomes part of a path.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedzge_flwr.black_boxes.contract import State
from fedzge_flwr.common.arrays import ByteArray
from fedzge_flwr.common.errors import RefusedError, StateError
from fedzge_flwr.common.files import atomic_path, atomic_write_text, make_folder, remove_remains
from fedzge_flwr.wire.codec import from_array, to_array

LOGGER = logging.getLogger("flwr.fedzge")

_MODEL = "fedzge-private-model"
_ASKED = "fedzge-asked"
_PROGRESS = "fedzge-progress"
_TALLY = "fedzge-tally"
_EXPERIMENT = "fedzge-experiment"

_STATE_FILE = re.compile(r"(?P<number>\d{8})-(?P<name>[0-9a-f]{16})\.safetensors")


@dataclass(frozen=True)
class Kept:
    """A state of a client.

    Parameters
    ----------
    name : str
        16 hexadecimal digits of the client's choice; empty for the initial state.
    model : State, optional
        What `fedzge_flwr.black_boxes.contract.BlackBox.load_state` takes; None: the initial model.
    distilled : int
        The newest round whose targets this model has distilled; 0: none.
    trained : int
        In how many rounds it has been trained on the client's own data.
    """

    name: str = ""
    model: State | None = None
    distilled: int = 0
    trained: int = 0


@dataclass
class Tally:
    """How much a client has answered: images, and when it was last asked (seconds since 1970)."""

    images: int = 0
    last: float = 0.0


class StateStore(Protocol):
    """What a client keeps in one experiment."""

    def load(self, name: str) -> Kept:
        """Return the state of a name; without it the newest one, without any the initial one."""
        ...

    def keep(self, model: State, *, distilled: int, trained: int) -> str:
        """Keep a new state and return its name.

        Raises
        ------
        StateError
            If it cannot be kept; those before it still are.
        """
        ...

    def forget_before(self, name: str) -> None:
        """Drop the states that were kept before the one of this name, if that is here."""
        ...

    def load_asked(self) -> dict[str, ByteArray]:
        """Return the images last asked about, as levels, by digest, if they are to be distilled."""
        ...

    def keep_asked(self, asked: dict[str, ByteArray]) -> None:
        """Keep these instead."""
        ...

    def tally(self) -> AbstractContextManager[Tally]:
        """Give the tally to be read and raised; it is kept when the block ends, before an answer.

        It is apart from the model: going back to an older state does not lower it.
        """
        ...


class ContextStore:
    """A store in Flower's ``context.state``: the newest state only, for as long as the node runs.

    Parameters
    ----------
    records : RecordDict
        ``context.state``.
    """

    def __init__(self, records: RecordDict) -> None:
        self._records = records

    def load(self, name: str) -> Kept:
        """Return the newest state, whatever its name."""
        model = self._records.array_records.get(_MODEL)
        if model is None:
            return Kept()
        progress = self._records.config_records[_PROGRESS]
        arrays = {key: from_array(array) for key, array in model.items()}
        distilled, trained = (int(cast(int, progress[key])) for key in ("distilled", "trained"))
        return Kept(str(progress["name"]), arrays, distilled, trained)

    def keep(self, model: State, *, distilled: int, trained: int) -> str:
        """Keep a state in the place of the one before."""
        name = secrets.token_hex(8)
        self._records[_MODEL] = ArrayRecord({key: to_array(item) for key, item in model.items()})
        self._records[_PROGRESS] = ConfigRecord(
            {"name": name, "distilled": distilled, "trained": trained}
        )
        return name

    def forget_before(self, name: str) -> None:
        """Do nothing: there is one state only."""

    def load_asked(self) -> dict[str, ByteArray]:
        """Return the images last asked about."""
        asked = self._records.array_records.get(_ASKED, ArrayRecord())
        return {digest: cast(ByteArray, from_array(array)) for digest, array in asked.items()}

    def keep_asked(self, asked: dict[str, ByteArray]) -> None:
        """Keep these instead."""
        self._records.pop(_ASKED, None)
        if asked:
            arrays = {digest: to_array(images) for digest, images in asked.items()}
            self._records[_ASKED] = ArrayRecord(arrays)

    @contextmanager
    def tally(self) -> Iterator[Tally]:
        """Give the tally."""
        record = self._records.config_records.get(_TALLY, ConfigRecord())
        tally = Tally(
            int(cast(int, record.get("images", 0))), float(cast(float, record.get("last", 0.0)))
        )
        yield tally
        self._records[_TALLY] = ConfigRecord({"images": tally.images, "last": tally.last})


class FolderStore:
    """A store in a folder of the owner's.

    A file a state, written atomically, numbered in order; ``client.safetensors`` is the newest one,
    for the owner to use.

    Parameters
    ----------
    folder : Path
        Of one client in one experiment; made if need be, for its owner alone.

    Raises
    ------
    StateError
        If it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with self._explained():
            make_folder(folder, mode=0o700)

    def load(self, name: str) -> Kept:
        """Return the state of a name; without it the newest one that is whole."""
        if not name:
            return Kept()
        files = self._files()
        for path in [p for p in files if _name(p) == name] + files[::-1]:
            kept = self._read(path)
            if kept is not None:
                return kept
        return Kept()

    def keep(self, model: State, *, distilled: int, trained: int) -> str:
        """Write a new state."""
        from safetensors.numpy import save_file

        name = secrets.token_hex(8)
        files = self._files()
        number = int(files[-1].name.split("-")[0]) + 1 if files else 1
        path = self._folder / f"{number:08d}-{name}.safetensors"
        # Not ascontiguousarray, which makes a vector of a scalar.
        arrays = {key: np.asarray(item, order="C") for key, item in model.items()}
        progress = {"distilled": str(distilled), "trained": str(trained)}
        with self._explained():
            with atomic_path(path) as temporary:
                save_file(arrays, temporary, metadata=progress)
            # The same content. Its new name is on disk, too, before the server hears of the state:
            # else a loss of power might leave the owner the model before it, for good.
            with atomic_path(self._folder / "client.safetensors") as temporary:
                temporary.unlink()
                try:
                    os.link(path, temporary)
                except OSError:  # a file system without links
                    shutil.copy(path, temporary)
        return name

    def forget_before(self, name: str) -> None:
        """Remove the files of older states."""
        files = self._files()
        at = next((number for number, path in enumerate(files) if _name(path) == name), 0)
        for path in files[:at]:
            path.unlink(missing_ok=True)
        remove_remains(self._folder)

    def load_asked(self) -> dict[str, ByteArray]:
        """Return the images last asked about."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return cast("dict[str, ByteArray]", load_file(self._folder / "asked.safetensors"))
        except (OSError, SafetensorError):
            return {}

    def keep_asked(self, asked: dict[str, ByteArray]) -> None:
        """Keep these instead."""
        from safetensors.numpy import save_file

        path = self._folder / "asked.safetensors"
        with self._explained():
            if not asked:
                path.unlink(missing_ok=True)
                return
            with atomic_path(path) as temporary:
                save_file(asked, temporary)

    @contextmanager
    def tally(self) -> Iterator[Tally]:
        """Give the tally, to one message at a time."""
        path = self._folder / "tally.json"
        with self._explained(), (self._folder / "tally.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tally = Tally()
            if path.exists():
                # A tally that cannot be read is not taken for none: a budget must not begin anew.
                try:
                    tally = _parsed_tally(path.read_text(encoding="utf-8"))
                except (ValueError, TypeError) as error:
                    raise StateError(
                        f"{path} is not a tally ({error}): it tells how much this client has "
                        "answered; restore it, or remove it to begin anew"
                    ) from error
            yield tally
            atomic_write_text(path, json.dumps(asdict(tally)))

    def _files(self) -> list[Path]:
        """Return the files of states, oldest first."""
        with self._explained():
            return sorted(p for p in self._folder.iterdir() if _STATE_FILE.fullmatch(p.name))

    def _read(self, path: Path) -> Kept | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                progress = file.metadata() or {}
                distilled, trained = (int(progress[key]) for key in ("distilled", "trained"))
                names = file.keys()
                arrays = {name: file.get_tensor(name) for name in names}
                return Kept(_name(path), arrays, distilled, trained)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            LOGGER.warning("%s cannot be read and is passed over: %s", path, error)
            return None

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from safetensors import SafetensorError

        try:
            yield
        except StateError:
            raise
        except (OSError, SafetensorError) as error:  # safetensors has an error of its own for both
            reason = getattr(error, "strerror", None) or error
            raise StateError(
                f"'state-dir': {self._folder} cannot be written ({reason}); free space, or name a "
                "folder that the node may write to"
            ) from error


def _parsed_tally(text: str) -> Tally:
    tally = Tally(**json.loads(text))
    if type(tally.images) is not int or tally.images < 0:
        raise ValueError(f"{tally.images!r} images")
    if not isinstance(tally.last, (int, float)) or not math.isfinite(tally.last):
        raise ValueError(f"last at {tally.last!r}")
    return tally


def _name(path: Path) -> str:
    return path.stem.partition("-")[2]


def open_store(records: RecordDict, state_dir: str, client: object, experiment: str) -> StateStore:
    """Open what a client keeps in an experiment.

    Parameters
    ----------
    records : RecordDict
        Flower's ``context.state``.
    state_dir : str
        The owner's folder; empty: Flower's context holds the state.
    client : object
        Tells the clients of one folder apart: the ``partition-id`` of the node config.
    experiment : str
        As the request says, checked by the protocol.

    Raises
    ------
    RefusedError
        If this Flower run belongs to another experiment: a budget is for a run, and no server shall
        get another by naming another experiment.
    StateError
        If the folder cannot be made.
    """
    known = records.config_records.get(_EXPERIMENT)
    if known is None:
        records[_EXPERIMENT] = ConfigRecord({"id": experiment})
    elif known["id"] != experiment:
        raise RefusedError("this run began with another experiment: submit it anew")
    if not state_dir:
        return ContextStore(records)
    parts = [hashlib.sha256(str(part).encode()).hexdigest() for part in (experiment, client)]
    name = f"client-{client}" if isinstance(client, int) else f"client-{parts[1][:16]}"
    return FolderStore(Path(state_dir).expanduser().absolute() / parts[0][:16] / name)
