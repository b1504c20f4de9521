"""The models of an audit: the client's own and its shadows, trained as a client of the run is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from safetensors.numpy import load_file, save_file

from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.client.account import ContextAccount
from fedzge_flwr.client.guard import Guard
from fedzge_flwr.client.noise import image_keys, model_digest
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import AuditError
from fedzge_flwr.common.file_kinds import unreadable
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.common.randomness import Purpose, derive_seed
from fedzge_flwr.config.owner import owner_settings
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.partition import ClientData
from fedzge_flwr.images.image_set import ImageSet

_SEEDS = 2**31
"""A run's seed is below."""


class Subject(TorchBlackBox):
    """A client of the run on images of its own choice.

    Parameters
    ----------
    settings : Settings
        The run's.
    partition : int
        The client whose model it has.
    images : ImageSet
        What it is trained on.
    number : int
        0: initialised and trained with the client's own seed; from 1: with others.
    """

    def __init__(self, settings: Settings, partition: int, images: ImageSet, number: int) -> None:
        if number:
            seed = derive_seed(settings.run.seed, Purpose.AUDIT, round_=number, partition=partition)
            settings = from_run_config({**settings.to_run_config(), "seed": seed % _SEEDS})
        super().__init__(settings, partition, settings.run.num_clients)
        self._images = images

    def _data(self) -> ClientData:
        return ClientData(self._images, self._images.take(np.zeros(0, dtype=np.int64)))

    def train(self, folder: Path) -> bool:
        """Train in all rounds of local training, or take the model that was kept.

        Returns
        -------
        bool
            Whether it was trained.

        Raises
        ------
        AuditError, DataError
            If the model cannot be kept, or what was kept is none.
        """
        path = folder / f"{self._key()}.safetensors"
        if path.exists():
            try:
                self.load_state({name: array.copy() for name, array in load_file(path).items()})
            except Exception as error:
                fix = "remove it, or name another folder"
                raise unreadable(path, "a model of an audit", error, fix) from error
            return False
        settings = self._settings
        rounds = settings.training.local_rounds or settings.run.num_server_rounds
        for round_ in range(1, rounds + 1):
            self.fit(round_)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            state = {name: np.ascontiguousarray(array) for name, array in self.state().items()}
            with atomic_path(path) as temporary:
                save_file(state, temporary)
        except OSError as error:
            raise AuditError(f"{path} cannot be written: {error.strerror or error}") from error
        return True

    def _key(self) -> str:
        """Return what tells this model from others of the folder."""
        run, of_data = self._settings.run, self._settings.data.spec
        trained = (run.seed, self._model_name, of_data, self._settings.training)
        text = f"{trained!r}{self._settings.optimizer!r}{self._images.digest()}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class Endpoint:
    """A model behind its owner's guards: what a server hears of it.

    Parameters
    ----------
    subject : Subject
        The model.
    node_config : Mapping[str, object]
        The owner's keys (`fedzge_flwr.config.owner`). Budgets and intervals count nothing here.

    Raises
    ------
    ConfigError
        If a key is wrong.
    """

    def __init__(self, subject: Subject, node_config: Mapping[str, object]) -> None:
        self._subject = subject
        self._guard = Guard(owner_settings(node_config, {}), ContextAccount(RecordDict()))
        self._digest = model_digest(subject.state())

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Return logits (N, K) on images (N, C, H, W), as they leave the node."""
        logits_NK = self._subject.logits(images_NCHW)
        return self._guard.perturbed(
            logits_NK, lambda: image_keys(images_NCHW), lambda: self._digest
        )
