"""Where a client keeps what is its own between messages: its model, and how much it has trained.

Flower's ``context.state`` starts empty in every run and dies with a SuperNode. If the node's owner
names a folder, states are kept there instead, by experiment and under names of the client's own,
until the server holds a checkpoint that is newer: a server that goes on from an older one finds the
model that it knew. Nothing that a message says becomes part of a path, and how many states and
experiments are kept is bounded by the owner. What a node has answered is kept apart
(`fedzge_flwr.client.account`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedzge_flwr.black_boxes.contract import State
from fedzge_flwr.client.account import Work, filed_counts, recorded_counts
from fedzge_flwr.common.arrays import ByteArray
from fedzge_flwr.common.errors import RefusedError
from fedzge_flwr.common.files import atomic_path, make_folder, remove_remains
from fedzge_flwr.common.node_folder import NODE_FOLDER, explained, locked
from fedzge_flwr.common.reading import place
from fedzge_flwr.wire.codec import from_array, to_array

LOGGER = logging.getLogger("flwr.fedzge")

_MODEL = "fedzge-private-model"
_ASKED = "fedzge-asked"
_PROGRESS = "fedzge-progress"
_WORK = "fedzge-work"
_EXPERIMENT = "fedzge-experiment"

_STATE_FILE = re.compile(r"(?P<number>\d{8})-(?P<name>[0-9a-f]{16})\.safetensors")
_EXPERIMENT_FOLDER = re.compile(r"[0-9a-f]{16}")
_RESTED_S = 86400.0
"""An experiment that has rested for so long may give way to a new one."""


@dataclass(frozen=True)
class Progress:
    """What a model has been through.

    Parameters
    ----------
    distilled : int
        The newest round whose targets it has distilled; 0: none.
    trained : int
        In how many rounds it has been trained on the client's own data.
    best : float
        Its best accuracy on own images so far, in [0, 1], as far as that was measured.
    """

    distilled: int = 0
    trained: int = 0
    best: float = 0.0


@dataclass(frozen=True)
class Kept:
    """A state of a client.

    Parameters
    ----------
    name : str
        16 hexadecimal digits of the client's choice; empty for the initial state.
    model : State, optional
        What `fedzge_flwr.black_boxes.contract.BlackBox.load_state` takes; None: the initial model.
    progress : Progress
        What it has been through.
    """

    name: str = ""
    model: State | None = None
    progress: Progress = Progress()


class StateStore(Protocol):
    """What a client keeps in one experiment."""

    def load(self, name: str) -> Kept:
        """Return the state of a name; without it the newest one, without any the initial one."""
        ...

    def keep(self, model: State, progress: Progress) -> str:
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

    def keep_at_most(self, number: int, *, spare: str) -> None:
        """Drop the oldest states above a number of at least 1, but for the one of a name."""
        ...

    def load_asked(self) -> dict[str, ByteArray]:
        """Return the images last asked about, as levels, by digest, if they are to be distilled."""
        ...

    def keep_asked(self, asked: dict[str, ByteArray]) -> None:
        """Keep these instead."""
        ...

    def work(self) -> AbstractContextManager[Work]:
        """Give what has been done in this experiment; raised, it is kept when the block ends.

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
        arrays = {key: from_array(array) for key, array in model.items()}
        of_model = dict(self._records.config_records[_PROGRESS])
        name = str(of_model.pop("name"))
        return Kept(name, arrays, Progress(**cast("dict[str, int]", of_model)))

    def keep(self, model: State, progress: Progress) -> str:
        """Keep a state in the place of the one before."""
        name = secrets.token_hex(8)
        self._records[_MODEL] = ArrayRecord({key: to_array(item) for key, item in model.items()})
        self._records[_PROGRESS] = ConfigRecord({"name": name, **asdict(progress)})
        return name

    def forget_before(self, name: str) -> None:
        """Do nothing: there is one state only."""

    def keep_at_most(self, number: int, *, spare: str) -> None:
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
    def work(self) -> Iterator[Work]:
        """Give what has been done in this run."""
        with recorded_counts(self._records, _WORK, Work) as work:
            yield work


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
        with explained(folder):
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

    def keep(self, model: State, progress: Progress) -> str:
        """Write a new state."""
        from safetensors.numpy import save_file

        name = secrets.token_hex(8)
        files = self._files()
        number = int(files[-1].name.split("-")[0]) + 1 if files else 1
        path = self._folder / f"{number:08d}-{name}.safetensors"
        # Not ascontiguousarray, which makes a vector of a scalar.
        arrays = {key: np.asarray(item, order="C") for key, item in model.items()}
        through = {key: repr(value) for key, value in asdict(progress).items()}
        with explained(self._folder):
            with atomic_path(path) as temporary:
                save_file(arrays, temporary, metadata=through)
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

    def keep_at_most(self, number: int, *, spare: str) -> None:
        """Remove the files of the oldest states."""
        files = self._files()
        for path in files[: max(len(files) - number, 0)]:
            if _name(path) != spare:
                path.unlink(missing_ok=True)

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
        with explained(self._folder):
            if not asked:
                path.unlink(missing_ok=True)
                return
            with atomic_path(path) as temporary:
                save_file(asked, temporary)

    @contextmanager
    def work(self) -> Iterator[Work]:
        """Give what has been done, to one message at a time."""
        with filed_counts(self._folder / "work.json", Work) as work:
            yield work

    def _files(self) -> list[Path]:
        """Return the files of states, oldest first."""
        with explained(self._folder):
            return sorted(p for p in self._folder.iterdir() if _STATE_FILE.fullmatch(p.name))

    def _read(self, path: Path) -> Kept | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                through = file.metadata() or {}
                distilled, trained = (int(through[key]) for key in ("distilled", "trained"))
                # Earlier versions did not write it.
                progress = Progress(distilled, trained, float(through.get("best", 0.0)))
                names = file.keys()
                arrays = {name: file.get_tensor(name) for name in names}
                return Kept(_name(path), arrays, progress)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            LOGGER.warning("%s cannot be read and is passed over: %s", path, error)
            return None


def _name(path: Path) -> str:
    return path.stem.partition("-")[2]


def open_store(
    records: RecordDict, state_dir: str, client: object, experiment: str, max_experiments: int = 0
) -> StateStore:
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
    max_experiments : int
        Most experiments in the folder; 0: any number.

    Raises
    ------
    RefusedError
        If this Flower run belongs to another experiment: what an owner limits by experiment is for
        a run, and no server shall get it again by naming another; or if there is no room for it.
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
    folder = place(state_dir, "state-dir") / parts[0][:16]
    _enter(folder, max_experiments)
    return FolderStore(folder / name)


def _enter(folder: Path, most: int) -> None:
    """Note that an experiment is going on; make its folder, if there is room for it."""
    root, account = folder.parent, folder.parent / NODE_FOLDER
    with explained(folder):
        if folder.is_dir():
            os.utime(folder)
            return
        make_folder(account, mode=0o700)
        with locked(account / "experiments.lock"):
            found = [p for p in root.iterdir() if _EXPERIMENT_FOLDER.fullmatch(p.name)]
            longest_first = sorted(found, key=lambda path: path.stat().st_mtime)
            too_many = max(len(found) - most + 1, 0) if most else 0
            for path in longest_first[:too_many]:
                if time.time() - path.stat().st_mtime < _RESTED_S:
                    raise RefusedError(
                        "this node keeps the models of as many experiments as its owner allows "
                        "('max-experiments')"
                    )
                LOGGER.warning("%s: removed for a new experiment ('max-experiments')", path)
                shutil.rmtree(path)
            make_folder(folder, mode=0o700)
