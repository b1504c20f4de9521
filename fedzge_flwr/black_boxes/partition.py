"""The PyTorch black box: any ``nn.Module`` on a partition of a data set."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fedzge_flwr.black_boxes.contract import (
    ClientEvaluation,
    ClientProfile,
    EvaluationSplit,
    FitReport,
    State,
)
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import DataError
from fedzge_flwr.common.randomness import Purpose, seeded_default, torch_stream
from fedzge_flwr.common.registry import lookup
from fedzge_flwr.config.node import from_node_config
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.own import own_data
from fedzge_flwr.data.partition import ClientData, client_data
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.learning.distillation import distil
from fedzge_flwr.learning.models.catalogue import MODELS, build_model, rebuild_model
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.predict import evaluate_logits, predict
from fedzge_flwr.learning.tensors import state_arrays, taken_over, to_numpy, to_tensor
from fedzge_flwr.learning.training import (
    MIN_TRAINING_IMAGES,
    OwnImages,
    log_class_prior,
    train_as_set,
)

if TYPE_CHECKING:
    from flwr.app import Context

LOGGER = logging.getLogger("flwr.fedzge")


class TorchBlackBox:
    """A PyTorch classifier with its own data.

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
    ) -> None:
        self._settings = settings
        self._partition = partition
        self._num_partitions = num_partitions
        self._data_path = data_path
        self._device = select_device(settings.client.client_device)
        self._model_name = model_name or settings.client.model_of(partition)
        lookup(MODELS, self._model_name, "model")
        self._built: nn.Module | None = None
        # Last: one that is not wholly made is never closed, and would keep the process's threads.
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(settings.client.client_threads)

    @property
    def _model(self) -> nn.Module:
        """The model; initialised when first needed, since a hello needs none."""
        if self._built is None:
            run = self._settings.run
            with seeded_default(run.seed, Purpose.INIT_CLIENT, partition=self._partition):
                model = build_model(self._model_name, self.image_shape, self.num_classes)
            self._built = model.eval().to(self._device)
        return self._built

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the data set's images."""
        return self._settings.data.spec.image_shape

    @property
    def num_classes(self) -> int:
        """Number of classes K of the data set."""
        return self._settings.data.spec.num_classes

    @property
    def max_query_images(self) -> int:
        """Images of the largest query that the run's settings allow."""
        return self._settings.server.max_query_images

    @property
    def local_rounds(self) -> int:
        """Rounds of local training; 0: all rounds."""
        return self._settings.client.local_rounds

    def _data(self) -> ClientData:
        run, data, number = self._settings.run, self._settings.data, self._partition
        hold_out = run.client_evaluation == "held-out"
        if self._data_path is None:
            return client_data(data, run.num_clients, run.seed, number, hold_out=hold_out)
        try:
            return own_data(self._data_path, data, run.seed, number, hold_out=hold_out)
        except DataError as error:
            # What an exception says goes to the server; names of files are the owner's affair.
            LOGGER.error("client %d: %s", number, error)
            raise DataError(
                "the images at this node's 'data-path' cannot be used; its own log says why"
            ) from None

    def profile(self) -> ClientProfile:
        """Say partition, training examples, device and share of the GPU."""
        # A partition that the settings do not know has no data; the server refuses it by name.
        known = self._partition < self._settings.run.num_clients
        return ClientProfile(
            partition=self._partition,
            num_partitions=self._num_partitions,
            num_examples=len(self._data().train) if known else 0,
            device=str(self._device),
            gpu_share=gpu_share(),
        )

    def fit(self, round_: int) -> FitReport:
        """Train as the settings say (`fedzge_flwr.learning.training.train_as_set`).

        A partition of fewer than two images is not trained on (batch norm cannot): the model stays
        as it is and the report says 0 examples.
        """
        data = self._data().train
        if len(data) < MIN_TRAINING_IMAGES:
            return FitReport(num_examples=0, loss=0.0)
        with self._seeded(Purpose.LOCAL_TRAINING, round_):
            loss = train_as_set(
                self._model,
                to_tensor(data.images_NCHW, self._device),
                to_tensor(data.labels_N, self._device),
                self.num_classes,
                self._settings,
                self._stream(Purpose.LOCAL_TRAINING, round_),
            )
        return FitReport(num_examples=len(data), loss=loss)

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Answer in evaluation mode, float32, ``query-batch-size`` images at a time."""
        return to_numpy(
            predict(
                self._model,
                to_tensor(images_NCHW),
                self._settings.client.query_batch_size,
            )
        )

    def distill(
        self,
        round_: int,
        images_NCHW: FloatArray,
        teacher_logits_NK: FloatArray,
        temperature: float,
    ) -> float:
        """Take ``client-distill-steps`` steps with a fresh optimiser."""
        client = self._settings.client
        with self._seeded(Purpose.CLIENT_DISTILLATION, round_):
            return distil(
                self._model,
                to_tensor(images_NCHW, self._device),
                to_tensor(teacher_logits_NK, self._device),
                steps=client.client_distill_steps,
                batch_size=client.distill_batch_size,
                temperature=temperature,
                lr=client.client_distill_lr,
                settings=self._settings.optimizer,
                stream=self._stream(Purpose.CLIENT_DISTILLATION, round_),
                class_balance=client.class_balance,
                rehearsed=self._rehearsed() if client.client_rehearsal else None,
            )

    def evaluate(self, split: EvaluationSplit) -> ClientEvaluation:
        """Evaluate on the common test set or on the client's own held-out images."""
        images = (
            load_split(self._settings.data, "test") if split == "test" else self._data().held_out
        )
        no_logits = np.zeros((0, self.num_classes), dtype=np.float32)
        if len(images) == 0:
            return ClientEvaluation(num_examples=0, loss=0.0, accuracy=0.0, logits_NK=no_logits)
        logits_NK = self._predict(images)
        outcome = evaluate_logits(logits_NK, to_tensor(images.labels_N))
        return ClientEvaluation(
            num_examples=len(images),
            loss=outcome.loss,
            accuracy=outcome.accuracy,
            logits_NK=to_numpy(logits_NK) if split == "test" else no_logits,
        )

    def _rehearsed(self) -> OwnImages | None:
        data = self._data().train
        if len(data) == 0:
            return None
        labels_N = to_tensor(data.labels_N, self._device)
        # What others taught of classes that it has no image of is not unlearned.
        prior_K = log_class_prior(labels_N, self.num_classes, unseen=0.0)
        return OwnImages(to_tensor(data.images_NCHW, self._device), labels_N, prior_K)

    def _stream(self, purpose: Purpose, round_: int) -> torch.Generator:
        seed = self._settings.run.seed
        return torch_stream(seed, purpose, round_=round_, partition=self._partition)

    def _seeded(self, purpose: Purpose, round_: int) -> AbstractContextManager[None]:
        """Seed what layers draw from that take no stream, as dropout does."""
        seed = self._settings.run.seed
        return seeded_default(seed, purpose, round_=round_, partition=self._partition)

    def _predict(self, images: ImageSet) -> torch.Tensor:
        batch_size = self._settings.client.query_batch_size
        return predict(self._model, to_tensor(images.images_NCHW), batch_size)

    def state(self) -> State:
        """Return the model's parameters and buffers."""
        return state_arrays(self._model)

    def load_state(self, state: State) -> None:
        """Load parameters and buffers; arrays that may be written become the model's own memory.

        Raises
        ------
        ValueError
            If names or shapes are not this model's.
        """
        tensors = {name: taken_over(array) for name, array in state.items()}
        model = rebuild_model(self._model_name, self.image_shape, self.num_classes, tensors)
        self._built = model.eval().to(self._device)

    def close(self) -> None:
        """Let the model go, leave nothing on a GPU that other clients share, give threads back."""
        self._built = None
        torch.set_num_threads(self._threads_before)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def cap_memory(device: torch.device, share: float) -> None:
    """Let this process allocate no more of a shared GPU's memory than its share of the GPU.

    What CUDA itself takes, some hundred megabytes a process, is not counted.
    """
    if device.type == "cuda" and 0 < share < 1:
        # Refuses a device without a number.
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(share, number)


def torch_black_box(context: Context, settings: Settings | None = None) -> TorchBlackBox:
    """Make the black box of the node that a Flower ``Context`` belongs to.

    Parameters
    ----------
    context : Context
        Its node config has what the node's owner says (``partition-id``, ``model``, ``data-path``).
    settings : Settings, optional
        The run's; by default those that the context's run config holds, which may then have no
        other keys.

    Raises
    ------
    ConfigError
        If a setting of the run or of the node is wrong or missing.
    """
    if settings is None:
        settings = from_run_config(context.run_config)
    node = from_node_config(context.node_config, settings)
    model_name = node.model
    if node.partition_id >= settings.run.num_clients and model_name is None:
        # Refused by the server; any model will do until then.
        model_name = settings.client.model_of(0)
    cap_memory(select_device(settings.client.client_device), gpu_share())
    return TorchBlackBox(
        settings, node.partition_id, node.num_partitions, model_name, node.data_path
    )


def gpu_share() -> float:
    """Return this process's share of a GPU: Ray's grant, or all of a visible one without Ray."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        resources = ray.get_runtime_context().get_assigned_resources()
        return float(resources.get("GPU", 0.0))
    return 1.0 if torch.cuda.is_available() else 0.0
