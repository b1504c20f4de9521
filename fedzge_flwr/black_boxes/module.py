"""A PyTorch model with training code of one's own as a black box."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox
from fedzge_flwr.black_boxes.contract import ClientEvaluation, EvaluationSplit, FitReport, State
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.randomness import Purpose, seeded_default, torch_stream
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.learning.distillation import distil
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.tensors import state_arrays, taken_over, to_numpy, to_tensor
from fedzge_flwr.learning.training import (
    MIN_TRAINING_IMAGES,
    OwnImages,
    log_class_prior,
    train_as_set,
)

if TYPE_CHECKING:
    from flwr.app import Context


class ModuleBlackBox(ClassifierBlackBox):
    """A PyTorch classifier that one's own function trains.

    Parameters
    ----------
    context : Context
        The node's.
    model : nn.Module
        Maps images (N, C, H, W) in the shared pixel range [−1, 1] to logits (N, K); on the device
        that it shall be used on. It is copied: a process serves many clients, and none may begin
        from what another has trained. One that wants another normalisation goes behind a first
        layer that makes it.
    train : Callable[[nn.Module], float | None], optional
        Trains the model in place for a round and returns its loss, if it has one (else 0 is told).
        What it draws from torch's default generator on the CPU, as a DataLoader's shuffling does,
        is a function of (``seed``, round, partition). None: trained on ``own`` as the settings say,
        with mixup and a loss adjusted for its class frequencies by default, which keep a model from
        being sure of images unlike its own, as the server's are.
    image_shape, num_classes, num_examples
        As for `ClassifierBlackBox`.
    own : ImageSet, optional
        Its own training images (`ImageSet.from_inputs` makes them of tensors). While the model
        distils, it goes on telling those apart, in as many more images a step
        (``client-rehearsal``); without them it forgets what it was trained on, the more so the
        fewer classes it has images of.
    test : Callable[[nn.Module], tuple[float, float]], optional
        Returns loss and accuracy on ``num_test_examples`` images of the client's own
        (``client-evaluation = "held-out"``).
    num_test_examples : int
        How many these are, above 0 with ``test``.
    settings : Settings, optional
        The run's, as the server's strategy has them, or a client's own; by default the defaults.
        ``client-distill-steps``, ``client-distill-lr``, ``client-rehearsal``,
        ``distill-batch-size``, ``class-balance``, the optimiser's and ``seed`` say how the
        ensemble's answers are distilled, ``local-rounds`` in how many rounds ``train`` is called,
        ``query-batch-size`` how many images are evaluated at once, and ``client-threads`` how many
        threads torch has here until `close`, which gives the process back those that it had.
        Without ``train``, ``local-epochs``, ``min-local-steps``, ``batch-size``, ``local-lr``,
        ``mixup`` and ``logit-adjustment`` say how it is trained. The others are the server's.
    **options
        As for `ClassifierBlackBox`.

    Raises
    ------
    ConfigError
        If there is neither ``train`` nor ``own``, or ``test`` and no number of its images.
    DataError
        If ``own`` has images of another shape, or a label that is not below K.
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module,
        train: Callable[[nn.Module], float | None] | None,
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_examples: int,
        *,
        own: ImageSet | None = None,
        test: Callable[[nn.Module], tuple[float, float]] | None = None,
        num_test_examples: int = 0,
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        settings = settings or Settings()
        options = {"local_rounds": settings.client.local_rounds, **options}
        super().__init__(context, image_shape, num_classes, num_examples, **options)
        if test is not None and num_test_examples < 1:
            raise ConfigError("num_test_examples: say on how many images `test` evaluates")
        if train is None and own is None:
            raise ConfigError("train = None: give `own`, the images that the model is trained on")
        if own is not None:
            own.check(image_shape, num_classes)
        self._own = own
        self._model = copy.deepcopy(model)
        self._train = train
        self._test = test
        self._num_test_examples = num_test_examples
        self._settings = settings
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(settings.client.client_threads)

    @property
    def device(self) -> str:
        """Where the model is."""
        parameter = next(self._model.parameters(), None)
        return "cpu" if parameter is None else str(parameter.device)

    def fit(self, round_: int) -> FitReport:
        """Train with one's own function, or as the settings say.

        Fewer than two images are not trained on then (batch norm cannot): 0 examples are reported.
        """
        if self._train is None:
            return self._fit_own(round_)
        with self._seeded(Purpose.LOCAL_TRAINING, round_):
            loss = self._train(self._model)
        self._model.eval()
        return FitReport(num_examples=self._num_examples, loss=max(float(loss or 0.0), 0.0))

    def _fit_own(self, round_: int) -> FitReport:
        own = self._own
        if own is None or len(own) < MIN_TRAINING_IMAGES:
            return FitReport(num_examples=0, loss=0.0)
        with self._seeded(Purpose.LOCAL_TRAINING, round_):
            loss = train_as_set(
                self._model,
                to_tensor(own.images_NCHW, self.device),
                to_tensor(own.labels_N, self.device),
                self.num_classes,
                self._settings,
                self._stream(Purpose.LOCAL_TRAINING, round_),
            )
        return FitReport(num_examples=len(own), loss=loss)

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Answer in evaluation mode, float32, a batch at a time."""
        batch_size = self._settings.client.query_batch_size
        return to_numpy(predict(self._model, to_tensor(images_NCHW), batch_size))

    def distill(
        self,
        round_: int,
        images_NCHW: FloatArray,
        teacher_logits_NK: FloatArray,
        temperature: float,
    ) -> float:
        """Take ``client_distill_steps`` steps with a fresh optimiser."""
        device, client = self.device, self._settings.client
        purpose = Purpose.CLIENT_DISTILLATION
        with self._seeded(purpose, round_):
            return distil(
                self._model,
                to_tensor(images_NCHW, device),
                to_tensor(teacher_logits_NK, device),
                steps=client.client_distill_steps,
                batch_size=client.distill_batch_size,
                temperature=temperature,
                lr=client.client_distill_lr,
                settings=self._settings.optimizer,
                stream=self._stream(purpose, round_),
                class_balance=client.class_balance,
                rehearsed=self._rehearsed() if client.client_rehearsal else None,
            )

    def _stream(self, purpose: Purpose, round_: int) -> torch.Generator:
        seed = self._settings.run.seed
        return torch_stream(seed, purpose, round_=round_, partition=self._partition)

    def _seeded(self, purpose: Purpose, round_: int) -> AbstractContextManager[None]:
        """Seed what layers and loaders draw from that take no stream."""
        seed = self._settings.run.seed
        return seeded_default(seed, purpose, round_=round_, partition=self._partition)

    def _rehearsed(self) -> OwnImages | None:
        if self._own is None or len(self._own) == 0:
            return None
        images = to_tensor(self._own.images_NCHW, self.device)
        labels_N = to_tensor(self._own.labels_N, self.device)
        # What others taught of classes that it has no image of is not unlearned.
        return OwnImages(images, labels_N, log_class_prior(labels_N, self.num_classes, unseen=0.0))

    def evaluate(self, split: EvaluationSplit) -> ClientEvaluation:
        """Evaluate with one's own function, or on the images given."""
        if split == "test" or self._test is None:
            return super().evaluate(split)
        loss, accuracy = self._test(self._model.eval())
        nothing = np.zeros((0, self.num_classes), dtype=np.float32)
        return ClientEvaluation(self._num_test_examples, float(loss), float(accuracy), nothing)

    def state(self) -> State:
        """Return the model's parameters and buffers."""
        return state_arrays(self._model)

    def load_state(self, state: State) -> None:
        """Load parameters and buffers.

        Raises
        ------
        ValueError
            If names or shapes are not this model's.
        """
        tensors = {name: taken_over(array) for name, array in state.items()}
        try:
            self._model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"not a state of this model: {error}") from error

    def close(self) -> None:
        """Leave nothing on a GPU that other clients share, and give threads back."""
        torch.set_num_threads(self._threads_before)
        if torch.cuda.is_available():
            self._model.cpu()
            torch.cuda.empty_cache()
