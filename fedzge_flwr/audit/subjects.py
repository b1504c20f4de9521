"""The models of an audit: the client's own and its shadows, trained as a client of the run is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from safetensors.numpy import load_file, save_file

from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.black_boxes.private import PrivateBlackBox, Releases
from fedzge_flwr.client.account import ContextAccount
from fedzge_flwr.client.guard import Guard
from fedzge_flwr.client.noise import image_keys, model_digest
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import AuditError
from fedzge_flwr.common.file_kinds import unreadable
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.common.randomness import Purpose, derive_seed
from fedzge_flwr.compare.plan import training_rounds
from fedzge_flwr.config.node import NodeSettings
from fedzge_flwr.config.owner import owner_settings
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.image_set import ImageSet

_SEEDS = 2**31
"""A run's seed is below."""


@dataclass(frozen=True)
class Subject:
    """A client of the run on images of an audit's choice.

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
    node : NodeSettings
        The owner's: which model, and whether it is trained privately.
    max_trainings : int
        The owner's too: rounds after which it trains no more; 0: any number.
    """

    settings: Settings
    partition: int
    images: ImageSet
    number: int
    node: NodeSettings
    max_trainings: int = 0

    def trained(self, folder: Path) -> TorchBlackBox:
        """Train as often as the run's client does, or take the model that was kept.

        Raises
        ------
        AuditError, DataError
            If the model cannot be kept, or what was kept is none.
        """
        box, path = self._box(), self.path(folder)
        if path.exists():
            try:
                box.load_state({name: array.copy() for name, array in load_file(path).items()})
            except Exception as error:
                fix = "remove it, or name another folder"
                raise unreadable(path, "a model of an audit", error, fix) from error
            return box
        for round_ in range(1, self.rounds + 1):
            box.fit(round_)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            state = {name: np.ascontiguousarray(array) for name, array in box.state().items()}
            with atomic_path(path) as temporary:
                save_file(state, temporary)
        except OSError as error:
            raise AuditError(f"{path} cannot be written: {error.strerror or error}") from error
        return box

    def path(self, folder: Path) -> Path:
        """Return where the model is kept: a name that no other model of the folder has."""
        run, data = self.settings.run, self.settings.data
        private = self.node.dp_epsilon and (self.node.dp_epsilon, self.node.dp_delta)
        whose = (run.seed, self.partition, data.partition, self.number)
        trained = (self.model, data.spec, self.rounds, self.settings.training, private)
        text = f"{whose!r}{trained!r}{self.settings.optimizer!r}{self.images.digest()}"
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"

    @property
    def rounds(self) -> int:
        """The rounds of its training: those of a client that takes part in every round.

        One that is left out of some (``fraction-train``) may have trained less, and tells less.
        """
        rounds = training_rounds(self.settings)
        return min(rounds, self.max_trainings or rounds)

    @property
    def model(self) -> str:
        """The name of its model."""
        return self.node.model or self.settings.training.model_of(self.partition)

    def _box(self) -> TorchBlackBox:
        settings, number, partition = self.settings, self.number, self.partition
        num_clients = settings.run.num_clients
        if number:
            seed = derive_seed(settings.run.seed, Purpose.AUDIT, round_=number, partition=partition)
            settings = from_run_config({**settings.to_run_config(), "seed": seed % _SEEDS})
        if self.node.dp_epsilon is not None:
            # A look of the audit's own: nothing of it leaves the owner's folder.
            releases = Releases(self.node.dp_epsilon, self.node.dp_delta, None)
            return PrivateBlackBox(settings, partition, num_clients, releases, images=self.images)
        return TorchBlackBox(settings, partition, num_clients, self.model, images=self.images)


class Endpoint:
    """A model behind its owner's guards: what a server hears of it.

    Parameters
    ----------
    model : TorchBlackBox
        The model.
    node_config : Mapping[str, object]
        The owner's keys (`fedzge_flwr.config.owner`). Budgets and intervals count nothing here.

    Raises
    ------
    ConfigError
        If a key is wrong.
    """

    def __init__(self, model: TorchBlackBox, node_config: Mapping[str, object]) -> None:
        self._model = model
        self._guard = Guard(owner_settings(node_config, {}), ContextAccount(RecordDict()))
        self._digest = model_digest(model.state())

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Return logits (N, K) on images (N, C, H, W), as they leave the node."""
        logits_NK = self._model.logits(images_NCHW)
        return self._guard.perturbed(
            logits_NK, lambda: image_keys(images_NCHW), lambda: self._digest
        )
