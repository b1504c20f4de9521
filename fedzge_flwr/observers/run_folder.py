"""The run folder: what a run leaves behind, written as it happens."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tomli_w
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.files import (
    atomic_path,
    atomic_write_text,
    make_folder,
    remove_remains,
)
from fedzge_flwr.common.version import __version__
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.tensors import state_arrays
from fedzge_flwr.observers.drawing import RunPictures
from fedzge_flwr.observers.lock import FolderLock
from fedzge_flwr.observers.naming import (
    WARNINGS_FILE,
    config_of,
    free_run_folder,
    reserved_run_folder,
    run_to_resume,
)
from fedzge_flwr.observers.round_row import RoundRow, rows_of
from fedzge_flwr.observers.rows import AccuracyTable, RowsFile
from fedzge_flwr.observers.warnings_file import WarningsFile
from fedzge_flwr.server.checkpoints import Checkpoint, CheckpointFolder
from fedzge_flwr.server.round import RoundState
from fedzge_flwr.server.state import ServerState

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn


class RunFolder:
    """An observer that writes a folder of its own for the run.

    ``config.json`` (settings, versions, seed, clients, status), ``resume.toml`` (the run config
    that goes on from its newest checkpoint), ``rounds.jsonl`` (a row a round),
    ``progress.json`` (round, phase and replies right now), ``warnings.log``, ``accuracy.csv``,
    ``checkpoints/``, and at the end ``central.safetensors``, ``generator.safetensors``,
    ``accuracy.png``, ``bytes.png`` and ``synthetic.png``. ``generated/`` has a picture a round: of
    each class one image that was asked about.

    One process at a time holds the folder, until the run's end. A run that goes on in a folder
    (``resume``) does so from its newest checkpoint; what the folder has of later rounds is dropped.

    Parameters
    ----------
    settings : Settings
        The run's settings; ``output-dir`` and ``run-name`` say where, or ``resume`` does.
    class_counts : ndarray of int, optional
        Images by client and class (clients, K), where that is known, as in a simulation.
    data : Mapping[str, str], optional
        Digests of the images that this machine has, by what they are; a run with others is not gone
        on with, unless ``data-changes`` says so.

    Raises
    ------
    RunFolderError
        If the folder cannot be made, the name is taken, there is no such run to resume, another
        process holds it, or a row is damaged that no checkpoint has.
    CheckpointError
        If there is no checkpoint to go on from, or it is of other settings or images.

    Attributes
    ----------
    path : Path
        The folder.
    checkpoints : CheckpointFolder
        Its checkpoints, for the strategy to write.
    resumed_from : Checkpoint, optional
        With ``resume``: what the run goes on from.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        class_counts: npt.NDArray[np.int64] | None = None,
        data: Mapping[str, str] | None = None,
    ) -> None:
        self._settings = settings
        self._data = dict(data or {})
        self._class_counts = class_counts
        self._clients: dict[int, str] = {}
        self._started = time.time()
        self._resumed: list[int] = []
        self._progress: dict[str, Any] = {}
        self._num_rounds = settings.run.num_server_rounds
        self._begun = False
        resumes = bool(settings.run.resume)
        self.path = run_to_resume(settings) if resumes else _make_folder(settings)
        self._lock = FolderLock(self.path)
        self._pictures = RunPictures(self.path)
        self._warnings = WarningsFile(self.path / WARNINGS_FILE)
        self._rows = RowsFile(self.path / "rounds.jsonl")
        self._accuracy = AccuracyTable(self.path / "accuracy.csv", settings.run.num_clients)
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", self._data)
        self.resumed_from: Checkpoint | None = None
        try:
            if resumes:
                self.resumed_from = self._take_up()
            self._write_config(status="starting")
            self._warnings.open()
        except BaseException:
            self._let_go()
            raise

    # -- Observer -----------------------------------------------------------------------------

    def on_start(self, server: ServerState, clients: Mapping[int, str]) -> None:
        """Write the clients and the device into ``config.json``."""
        self._begun = True
        self._clients = dict(clients)
        self._num_rounds = server.num_rounds
        self._write_config(status="running")

    def on_phase(self, round_: int, phase: str) -> None:
        """Replace ``progress.json``."""
        self._progress = {"round": round_, "phase": phase, "since": time.time()}
        self._write_progress()

    def on_replies(self, answered: int, asked: int) -> None:
        """Replace ``progress.json``."""
        # The first hellos are said before any phase.
        if self._progress:
            self._progress |= {"answered": answered, "asked": asked}
            self._write_progress()

    def on_round(self, server: ServerState, current: RoundState, row: RoundRow) -> None:
        """Append to ``rounds.jsonl`` and ``accuracy.csv``; the row is then on disk."""
        if current.asked is not None and current.answered is not None:
            images_NCHW = current.asked.question.base_NCHW
            self._pictures.of_round(row.round, images_NCHW, current.answered.logits_NK)
        with self._explained():
            self._rows.append(row)
            self._accuracy.append(row)

    def on_end(self, server: ServerState, error: BaseException | None) -> None:
        """Write models and pictures, also of a run that an error ended."""
        status = "finished" if error is None else f"failed: {type(error).__name__}: {error}"
        try:
            with self._explained():
                # A run that ends before has models without a round's work: none to keep, least of
                # all in the place of those of the run that it was to go on with.
                if self._begun:
                    self._accuracy.write(self._rows.read())
                    self._save_model("central", server.central)
                    self._save_model("generator", server.generator)
                    self._pictures.of_run(self._rows.read())
                (self.path / "progress.json").unlink(missing_ok=True)
        except RunFolderError as failure:
            if error is None:
                status = f"failed: {type(failure).__name__}: {failure}"
            raise
        finally:
            try:
                self._write_config(status=status)
            finally:
                self._let_go()

    def _take_up(self) -> Checkpoint:
        """Bring all files to where the newest checkpoint is, once nothing speaks against it."""
        checkpoint = self.checkpoints.newest()
        checkpoint.check_settings(self._settings)
        checkpoint.check_data(self._data, self._settings)
        rows_of(checkpoint)
        # What is not on this machine any more is still what the run began with.
        self.checkpoints = CheckpointFolder(
            self.checkpoints.path, {**checkpoint.data, **self._data}
        )
        with self._explained():
            self._rows.recover(checkpoint.round, checkpoint.rows)
            self._accuracy.write(self._rows.read())
            (self.path / "progress.json").unlink(missing_ok=True)
            self._pictures.drop_after(checkpoint.round)
            remove_remains(self.path)
        self._resumed = [*_resumed_before(config_of(self.path)), checkpoint.round]
        return checkpoint

    def _let_go(self) -> None:
        self._warnings.close()
        self._lock.release()

    # -- files --------------------------------------------------------------------------------

    def accuracies(self) -> pd.DataFrame:
        """Return accuracies in [0, 1], a row a round; columns "central", "client-0" and so on."""
        return self._accuracy.frame(self._rows.read())

    def _write_progress(self) -> None:
        with self._explained():
            # Of this moment only: not worth waiting for the disk a dozen times a round.
            text = json.dumps(self._progress)
            atomic_write_text(self.path / "progress.json", text, durable=False)

    def _write_config(self, status: str) -> None:
        # As many rounds as there are, should the strategy have been told another number.
        settings = {**self._settings.to_run_config(), "num-server-rounds": self._num_rounds}
        content: dict[str, Any] = {
            "status": status,
            "resumed_after": self._resumed,
            "seed": self._settings.run.seed,
            "settings": settings,
            "versions": _versions(),
            "clients": {str(partition): text for partition, text in self._clients.items()},
            "class_counts": None if self._class_counts is None else self._class_counts.tolist(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(self._started)),
            "seconds": round(time.time() - self._started, 1),
        }
        with self._explained():
            atomic_write_text(self.path / "config.json", json.dumps(content, indent=2) + "\n")
            overrides = {**settings, "resume": str(self.path)}
            atomic_write_text(self.path / "resume.toml", tomli_w.dumps(overrides))

    def _save_model(self, name: str, model: nn.Module) -> None:
        with atomic_path(self.path / f"{name}.safetensors") as temporary:
            save_file(state_arrays(model), temporary)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RunFolderError:
            raise
        except (OSError, SafetensorError) as error:  # safetensors has one of its own
            reason = getattr(error, "strerror", None) or error
            raise RunFolderError(
                f"run folder {self.path} cannot be written ({reason}); free space or set "
                "'output-dir' to a folder that you may write to"
            ) from error


def _make_folder(settings: Settings) -> Path:
    # Of two runs that take it over the lock lets one go on.
    if (reserved := reserved_run_folder(settings)) is not None:
        return reserved
    folder = free_run_folder(settings)
    try:
        make_folder(folder, exist_ok=False)
    except FileExistsError:
        if not folder.parent.is_dir():
            raise RunFolderError(
                f"'output-dir' = '{folder.parent}' is not a folder; name another"
            ) from None
        # Another run has just taken the name: there is a next one, or an explanation.
        return _make_folder(settings)
    except OSError as error:
        raise RunFolderError(
            f"'output-dir' = '{folder.parent}' cannot be written ({error.strerror}); name a folder "
            "that you may write to"
        ) from error
    return folder


def _resumed_before(config: Mapping[str, Any]) -> list[int]:
    """Return after which rounds a run has been resumed, as its ``config.json`` says."""
    try:
        return [int(item) for item in config.get("resumed_after", [])]
    except (ValueError, TypeError):
        return []


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "fedzge-flwr": __version__}
    for package in ("flwr", "ray", "torch", "torchvision", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
