"""The PyTorch black box of this repository's app: a named model on a partition of a data set."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from fedzge_flwr.black_boxes.contract import (
    ClientEvaluation,
    ClientProfile,
    EvaluationSplit,
    State,
)
from fedzge_flwr.black_boxes.module import ModuleBlackBox
from fedzge_flwr.common.randomness import Purpose, seeded_default
from fedzge_flwr.common.registry import lookup
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.own import own_data
from fedzge_flwr.data.partition import ClientData, client_data
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.learning.models.catalogue import MODELS, build_model, model_ways, rebuild_model
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.predict import evaluate_logits
from fedzge_flwr.learning.tensors import own_tensor, to_numpy, to_tensor
from fedzge_flwr.query.copies import copies_asked

if TYPE_CHECKING:
    from flwr.app import Context


class _Node(NamedTuple):
    """A node, as far as a black box reads its context."""

    node_config: Mapping[str, object]


class TorchBlackBox(ModuleBlackBox):
    """A `ModuleBlackBox` with a model of the registry on a partition of the data set.

    Parameters
    ----------
    settings : Settings
        The run's settings.
    partition : int
        This client's partition, from 0.
    num_partitions : int
        Number of partitions that the node was told of.
    model_name : str, optional
        Overrides the run's ``local-models`` for this client.
    data_path : str, optional
        Where its own images lie (`fedzge_flwr.data.own.load_own`), in place of the partition's.
    rehearsal : bool, optional
        Overrides the run's ``client-rehearsal`` for this client.
    images : ImageSet, optional
        All its own images, in place of the partition's.
    state_dir : str
        The owner's folder, if it has a secret to draw from (`seed_of_draws`).

    Raises
    ------
    ConfigError
        If there is no such model.
    """

    def __init__(
        self,
        settings: Settings,
        partition: int,
        num_partitions: int,
        model_name: str | None = None,
        data_path: str | None = None,
        rehearsal: bool | None = None,
        images: ImageSet | None = None,
        state_dir: str = "",
    ) -> None:
        self._data_path = data_path
        self._images = images
        self._device = select_device(settings.run.client_device)
        self._model_name = model_name or settings.training.model_of(partition)
        lookup(MODELS, self._model_name, "model")
        spec, queries = settings.data.spec, settings.queries
        copies = copies_asked(queries.estimator, queries.q, queries.differences)
        node: dict[str, object] = {"partition-id": partition, "num-partitions": num_partitions}
        node["state-dir"] = state_dir
        if rehearsal is not None:
            node["rehearsal"] = rehearsal
        # Last: one that is not wholly made is never closed, and would keep the process's threads.
        super().__init__(
            cast("Context", _Node(node)),
            self._built_anew,
            None,
            spec.image_shape,
            spec.num_classes,
            # Its images are read when they are first needed.
            num_examples=0,
            own=self._train_images,
            settings=settings,
            max_query_images=copies * settings.images.synthetic_batch_size,
        )

    def _built_anew(self) -> nn.Module:
        with self._initial():
            return self._ready(build_model(self._model_name, self.image_shape, self.num_classes))

    def _initial(self) -> AbstractContextManager[None]:
        """Seed what the model's first values are drawn from."""
        return seeded_default(self._seed(), Purpose.INIT_CLIENT, partition=self._partition)

    def _ready(self, model: nn.Module) -> nn.Module:
        model.eval()
        return model.to(self._device)

    def _train_images(self) -> ImageSet:
        return self._data().train

    @property
    def device(self) -> str:
        """Where the model is, or will be."""
        return str(self._device)

    def _data(self) -> ClientData:
        run, data, partition = self._settings.run, self._settings.data, self._partition
        if self._images is not None:
            return ClientData(self._images, self._images.take(np.zeros(0, dtype=np.int64)))
        if self._data_path is None:
            return client_data(data, run.num_clients, run.seed, partition, hold_out=self.holds_out)
        return own_data(self._data_path, data, run.seed, partition, hold_out=self.holds_out)

    @property
    def holds_out(self) -> bool:
        """Whether a part of its own images is kept for evaluation."""
        return self._settings.run.client_evaluation == "held-out"

    def profile(self) -> ClientProfile:
        """Say partition, training examples, device and share of the GPU.

        Raises
        ------
        ConfigError
            If the model is one from outside, and no classifier.
        """
        if self._model_name in MODELS.added():
            model_ways(self._model_name, self.image_shape, self.num_classes)
        # A partition that the settings do not know has no data; the server refuses it by name.
        known = self._partition < self._settings.run.num_clients
        data = self._data() if known else None
        return ClientProfile(
            partition=self._partition,
            num_partitions=self._num_partitions,
            num_examples=len(data.train) if data else 0,
            device=str(self._device),
            gpu_share=gpu_share(),
            data=data.train.digest() + data.held_out.digest() if data else "",
        )

    def evaluate(self, split: EvaluationSplit) -> ClientEvaluation:
        """Evaluate on the common test set or on the client's own held-out images."""
        images = (
            load_split(self._settings.data, "test") if split == "test" else self._data().held_out
        )
        no_logits = np.zeros((0, self.num_classes), dtype=np.float32)
        if len(images) == 0:
            return ClientEvaluation(num_examples=0, loss=0.0, accuracy=0.0, logits_NK=no_logits)
        logits_NK = self._predict(images.images_NCHW)
        outcome = evaluate_logits(logits_NK, to_tensor(images.labels_N))
        return ClientEvaluation(
            num_examples=len(images),
            loss=outcome.loss,
            accuracy=outcome.accuracy,
            logits_NK=to_numpy(logits_NK) if split == "test" else no_logits,
            images_NCHW=images.images_NCHW if split == "test" else None,
        )

    def held_out(self) -> ImageSet:
        """Return the images of the partition that are held out, if any."""
        return self._data().held_out

    def load_state(self, state: State) -> None:
        """Load parameters and buffers; arrays that may be written become the model's own memory.

        Raises
        ------
        ValueError
            If names or shapes are not this model's.
        """
        tensors = {name: own_tensor(array) for name, array in state.items()}
        with self._initial():
            self._built = self._ready(
                rebuild_model(self._model_name, self.image_shape, self.num_classes, tensors)
            )


def cap_memory(device: torch.device, share: float) -> None:
    """Let this process allocate no more of a shared GPU's memory than its share of the GPU.

    What CUDA itself takes, some hundred megabytes a process, is not counted.
    """
    if device.type == "cuda" and 0 < share < 1:
        # Refuses a device without a number.
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(share, number)


def gpu_share() -> float:
    """Return this process's share of a GPU: Ray's grant, or all of a visible one without Ray."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        resources = ray.get_runtime_context().get_assigned_resources()
        return float(resources.get("GPU", 0.0))
    return 1.0 if torch.cuda.is_available() else 0.0
