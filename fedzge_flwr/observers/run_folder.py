"""The run folder: what a run leaves behind, written as it happens."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tomli_w
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.files import atomic_path, atomic_write_text
from fedzge_flwr.common.version import __version__
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.tensors import state_arrays
from fedzge_flwr.observers.base import RoundRow
from fedzge_flwr.observers.naming import WARNINGS_FILE, free_run_folder, run_to_resume
from fedzge_flwr.server.round import RoundState, SyntheticBatch
from fedzge_flwr.server.state import ServerState

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

_LOGGER = logging.getLogger("flwr.fedzge")
_GRID_IMAGES_PER_CLASS = 10
_GRID_CLASSES = 20
_STRIP_CLASSES = 10


class _WarningsFile(logging.Handler):
    """Appends each warning to a file as a line; what cannot be written is in the log anyway."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._path = path
        self.addFilter(lambda record: record.levelno == logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(" ".join(record.getMessage().split()) + "\n")


class RunFolder:
    """An observer that writes a folder of its own for the run.

    ``config.json`` (settings, versions, seed, clients, status), ``resume.toml`` (the run config
    that goes on from its newest checkpoint), ``rounds.jsonl`` (a row a round),
    ``progress.json`` (round, phase and replies right now), ``warnings.log``, ``accuracy.csv``,
    and at the end ``central.safetensors``, ``generator.safetensors``, ``accuracy.png``,
    ``bytes.png`` and ``synthetic.png``. ``generated/`` has a picture a round: one generated image
    of each class.

    Parameters
    ----------
    settings : Settings
        The run's settings; ``output-dir`` and ``run-name`` say where, or ``resume`` does.
    resumed_after : int, optional
        With ``resume``: the round that the run goes on after. What the folder has of later rounds
        is dropped.
    class_counts : ndarray of int, optional
        Images by client and class (clients, K), where that is known, as in a simulation.

    Raises
    ------
    RunFolderError
        If the folder cannot be made, the name is taken, or there is nothing to resume.
    """

    def __init__(
        self,
        settings: Settings,
        resumed_after: int | None = None,
        class_counts: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self._settings = settings
        self._class_counts = class_counts
        self._rows: list[RoundRow] = []
        self._samples: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None = None
        self._clients: dict[int, str] = {}
        self._started = time.time()
        self._resumed: list[int] = []
        self._progress: dict[str, Any] = {}
        self._num_rounds = settings.run.num_server_rounds
        if resumed_after is None:
            self.path = _make_folder(settings)
        else:
            self.path = run_to_resume(settings)
            self._go_on_after(resumed_after)
        self._write_config(status="starting")
        self._warnings = _WarningsFile(self.path / WARNINGS_FILE)
        _LOGGER.addHandler(self._warnings)

    # -- Observer -----------------------------------------------------------------------------

    def on_start(self, server: ServerState, clients: Mapping[int, str]) -> None:
        """Write the clients and the device into ``config.json``."""
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
        """Append to ``rounds.jsonl`` and rewrite ``accuracy.csv``."""
        self._rows.append(row)
        with self._explained():
            if current.asked is not None and current.asked.generated is not None:
                self._samples = _labelled_samples(current.asked.generated.batch)
                self._draw_strip(row.round)
            with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row.to_json(), allow_nan=False) + "\n")
            with atomic_path(self.path / "accuracy.csv") as temporary:
                self.accuracies().to_csv(temporary)

    def on_end(self, server: ServerState, error: BaseException | None) -> None:
        """Write models and pictures, also of a run that an error ended."""
        _LOGGER.removeHandler(self._warnings)
        status = "finished" if error is None else f"failed: {type(error).__name__}: {error}"
        try:
            with self._explained():
                self._save_model("central", server.central)
                self._save_model("generator", server.generator)
                self._draw()
                (self.path / "progress.json").unlink(missing_ok=True)
        except RunFolderError as failure:
            if error is None:
                status = f"failed: {type(failure).__name__}: {failure}"
            raise
        finally:
            self._write_config(status=status)

    def _go_on_after(self, round_: int) -> None:
        """Drop the rows of later rounds, which will be done again."""
        with self._explained():
            path = self.path / "rounds.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            # Of a row that was being written when the run was stopped there may be a half.
            lines = lines[:round_]
            self._rows = [RoundRow.from_json(json.loads(line)) for line in lines]
            atomic_write_text(path, "".join(f"{line}\n" for line in lines))
            with suppress(FileNotFoundError, ValueError, KeyError):
                before = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
                self._resumed = [*before["resumed_after"], round_]

    # -- files --------------------------------------------------------------------------------

    def accuracies(self) -> pd.DataFrame:
        """Return accuracies in [0, 1], a row a round; columns "central", "client-0" and so on."""
        import pandas as pd

        table = {
            row.round: {
                "central": row.central_accuracy,
                **{
                    f"client-{partition}": value for partition, value in row.client_accuracy.items()
                },
            }
            for row in self._rows
        }
        columns = ["central", *(f"client-{p}" for p in range(self._settings.run.num_clients))]
        frame = pd.DataFrame.from_dict(table, orient="index", columns=columns, dtype=float)
        frame.index.name = "round"
        return frame

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

    def _draw_strip(self, round_: int) -> None:
        """Draw the first image of each class, side by side."""
        if self._samples is None:
            return
        images, labels = self._samples
        _, firsts = np.unique(labels, return_index=True)
        strip = np.concatenate(images[firsts[:_STRIP_CLASSES]].transpose(0, 2, 3, 1), axis=1)
        folder = self.path / "generated"
        folder.mkdir(exist_ok=True)
        with atomic_path(folder / f"round-{round_:06d}.png", durable=False) as temporary:
            Image.fromarray(strip.squeeze(-1) if strip.shape[-1] == 1 else strip).save(temporary)

    def _draw(self) -> None:
        from fedzge_flwr.observers.pictures import draw_accuracy, draw_bytes, draw_synthetic

        if self._rows:
            with atomic_path(self.path / "accuracy.png") as temporary:
                draw_accuracy(self._rows, temporary)
            with atomic_path(self.path / "bytes.png") as temporary:
                draw_bytes(self._rows, temporary)
        if self._samples is not None:
            with atomic_path(self.path / "synthetic.png") as temporary:
                draw_synthetic(*self._samples, temporary)

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
    folder = free_run_folder(settings)
    try:
        folder.mkdir(parents=True)
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


def _labelled_samples(
    batch: SyntheticBatch,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the first few images of each of the first classes, and their labels."""
    labels = batch.y_N.cpu().numpy()
    chosen = np.concatenate(
        [
            np.flatnonzero(labels == label)[:_GRID_IMAGES_PER_CLASS]
            for label in np.unique(labels)[:_GRID_CLASSES]
        ]
    )
    images = PIXEL_RANGE.to_uint8(batch.x_NCHW.detach()).cpu().numpy()
    return images[chosen], labels[chosen]


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "fedzge-flwr": __version__}
    for package in ("flwr", "ray", "torch", "torchvision", "numpy"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
