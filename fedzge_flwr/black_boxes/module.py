"""A PyTorch model with training code of one's own as a black box."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox, Output
from fedzge_flwr.black_boxes.contract import (
    ClientEvaluation,
    ClientProfile,
    EvaluationSplit,
    FitReport,
    State,
)
from fedzge_flwr.black_boxes.draws import seed_of_draws
from fedzge_flwr.black_boxes.shown import loss_of, warn_of_images, warn_of_test, watched
from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.randomness import Purpose, seeded_default, torch_stream
from fedzge_flwr.common.registry import one_of
from fedzge_flwr.common.text import error_line
from fedzge_flwr.config.agreement import distilling_by, training_by
from fedzge_flwr.config.node import rehearses
from fedzge_flwr.config.sections import MIN_TRAINING_IMAGES, Settings
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.learning.distillation import distill
from fedzge_flwr.learning.fixed_steps import OfProbabilities
from fedzge_flwr.learning.numerics import keep_freed_memory
from fedzge_flwr.learning.outputs import check_aside, check_model
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.tensors import (
    device_of,
    load_arrays,
    state_arrays,
    to_numpy,
    to_tensor,
)
from fedzge_flwr.learning.training import OwnImages, log_class_prior, train_locally

if TYPE_CHECKING:
    from flwr.app import Context


class ModuleBlackBox(ClassifierBlackBox):
    """A PyTorch classifier that one's own function trains.

    Parameters
    ----------
    context : Context
        The node's.
    model : nn.Module or Callable[[], nn.Module]
        Maps images (N, C, H, W) in the shared pixel range [−1, 1] to logits (N, K); on the device
        that it shall be used on. It is copied: a process serves many clients, and none may begin
        from what another has trained. `Normalized` gives one that was made for another
        normalisation its images. A function makes the model when it is first needed.
    train : Callable[[nn.Module], float | None], optional
        Trains the model in place for a round and returns its loss, if it has one (else 0 is told).
        A warning says if it shows the model other images than the model is asked about.
        What it draws from torch's default generator on the CPU, as a DataLoader's shuffling does,
        is a function of (``seed``, round, partition). None: trained on ``own`` as the settings say:
        by default so that it is not sure of images unlike its own, as the server's are.
    image_shape, num_classes, num_examples, **options
        As for `ClassifierBlackBox`.
    own : ImageSet or Callable[[], ImageSet], optional
        Its own training images (`ImageSet.from_inputs` makes them of tensors), or a function that
        returns them. While the model distills, it goes on telling those apart, in as many more
        images a step (``client-rehearsal``, or ``rehearsal`` of the node config); without them it
        forgets what it was trained on.
    test, num_test_examples : Callable[[nn.Module], tuple[float, float]], optional, and int
        Returns loss and accuracy on so many images of the client's own
        (``client-evaluation = "held-out"``).
    output : {"logits", "probabilities"}
        What the model returns. Of one that ends in a softmax give "probabilities"; ``train`` and
        ``test`` get it as it is.
    settings : Settings, optional
        The run's, as the server's strategy has them, or a client's own; by default the defaults.
        *Distillation* and *Optimizers*, ``seed``, ``local-rounds``, ``query-batch-size`` and
        ``client-threads`` (torch's here, until `close`) are read; without ``train`` *Local
        training* too. The others are the server's.

    Raises
    ------
    ConfigError, DataError
        If there is neither ``train`` nor ``own``, ``test`` and no number of its images, or ``own``
        has images of another shape, or a label that is not below K.
    """

    def __init__(
        self,
        context: Context,
        model: nn.Module | Callable[[], nn.Module],
        train: Callable[[nn.Module], float | None] | None,
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_examples: int,
        *,
        own: ImageSet | Callable[[], ImageSet] | None = None,
        test: Callable[[nn.Module], tuple[float, float]] | None = None,
        num_test_examples: int = 0,
        output: Output = "logits",
        settings: Settings | None = None,
        **options: Any,
    ) -> None:
        settings = settings or Settings()
        options = {"local_rounds": settings.training.local_rounds, **options}
        super().__init__(context, image_shape, num_classes, num_examples, **options)
        if test is not None and num_test_examples < 1:
            raise ConfigError("num_test_examples: say on how many images `test` evaluates")
        if train is None and own is None:
            raise ConfigError("train = None: give `own`, the images that the model is trained on")
        if isinstance(own, ImageSet):
            own.check(image_shape, num_classes)
        self._own_given = own
        one_of(output, Output, "output")
        make = partial(_copied, model) if isinstance(model, nn.Module) else model
        self._make = make if output == "logits" else partial(_of_probabilities, make)
        self._built: nn.Module | None = None
        self._train = train
        self._test, self._num_test_examples = test, num_test_examples
        self._settings = settings
        self._rehearses = rehearses(context.node_config, settings)
        # Called with the first draw: a node's secret is made then.
        self._seed = cache(partial(seed_of_draws, context.node_config, settings.run.seed))
        keep_freed_memory()
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(settings.run.client_threads)

    @property
    def _model(self) -> nn.Module:
        """The model, made when it is first needed."""
        if self._built is None:
            self._built = self._make()
        return self._built

    @property
    def _given(self) -> nn.Module:
        """The model as it was given, without what stands for its softmax."""
        model = self._model
        return model.net if isinstance(model, OfProbabilities) else model

    def learns_by(self) -> dict[str, object]:
        """Return the settings by which it distills, and trains if it has no training of its own."""
        found = distilling_by(self._settings)
        return found if self._train is not None else {**found, **training_by(self._settings)}

    def trained_on(self) -> ImageSet | None:
        """Return the client's own training images, if it was given them."""
        own = self._own_given() if callable(self._own_given) else self._own_given
        if own is not None:
            own.check(self.image_shape, self.num_classes)
        return own

    @property
    def device(self) -> str:
        """Where the model is."""
        return str(device_of(self._model))

    def profile(self) -> ClientProfile:
        """Say partition and training examples; ConfigError if the model is no classifier."""
        _check_made(self._make, self._model, self.image_shape, self.num_classes)
        return super().profile()

    def fit(self, round_: int) -> FitReport:
        """Train with one's own function, or as the settings say.

        Fewer than two images are not trained on then (batch norm cannot): 0 examples are reported.
        """
        purpose, own = Purpose.LOCAL_TRAINING, self.trained_on
        if self._train is None:
            with self._seeded(purpose, round_):
                stream = self._stream(purpose, round_)
                return _fit_on(own(), self._model, self.num_classes, self._settings, stream)
        with self._seeded(purpose, round_), watched(self._given) as shown:
            loss = loss_of(self._train(self._given))
        self._model.eval()
        warn_of_images(shown, self._given, self.image_shape, own)
        return FitReport(num_examples=self._num_examples, loss=loss)

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Answer in evaluation mode, float32, a batch at a time."""
        return to_numpy(self._predict(images_NCHW))

    def _predict(self, images: FloatArray | ByteArray) -> torch.Tensor:
        return predict(self._model, to_tensor(images), self._settings.queries.query_batch_size)

    def distill(
        self,
        round_: int,
        images_NCHW: FloatArray,
        teacher_logits_NK: FloatArray,
        temperature: float,
    ) -> float:
        """Take ``client-distill-steps`` steps with a fresh optimiser."""
        distillation, purpose = self._settings.distillation, Purpose.CLIENT_DISTILLATION
        with self._seeded(purpose, round_):
            return distill(
                self._model,
                to_tensor(images_NCHW, self.device),
                to_tensor(teacher_logits_NK, self.device),
                steps=distillation.client_distill_steps,
                batch_size=distillation.distill_batch_size,
                temperature=temperature,
                lr=distillation.client_distill_lr,
                settings=self._settings.optimizer,
                stream=self._stream(purpose, round_),
                class_balance=distillation.class_balance,
                rehearsed=_rehearsed(self.trained_on(), self._model, self.num_classes)
                if self._rehearses
                else None,
                max_norm=distillation.client_distill_max_norm,
            )

    def _stream(self, purpose: Purpose, round_: int) -> torch.Generator:
        return torch_stream(self._seed(), purpose, round_=round_, partition=self._partition)

    def _seeded(self, purpose: Purpose, round_: int) -> AbstractContextManager[None]:
        """Seed what layers and loaders draw from that take no stream."""
        return seeded_default(self._seed(), purpose, round_=round_, partition=self._partition)

    def evaluate(self, split: EvaluationSplit) -> ClientEvaluation:
        """Evaluate with one's own function, or on the images given."""
        if split == "test" or self._test is None:
            return super().evaluate(split)
        self._model.eval()
        loss, accuracy = self._test(self._given)
        warn_of_test(float(accuracy), self.logits, self.trained_on)
        nothing = np.zeros((0, self.num_classes), dtype=np.float32)
        return ClientEvaluation(self._num_test_examples, float(loss), float(accuracy), nothing)

    def state(self) -> State:
        """Return the model's parameters and buffers."""
        return state_arrays(self._model)

    def load_state(self, state: State) -> None:
        """Load parameters and buffers; ValueError if names or shapes are not this model's."""
        load_arrays(self._model, state)

    def close(self) -> None:
        """Let the model go, leave nothing on a GPU that other clients share, give threads back."""
        self._built = None
        torch.set_num_threads(self._threads_before)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _fit_on(
    own: ImageSet | None,
    model: nn.Module,
    num_classes: int,
    settings: Settings,
    stream: torch.Generator,
) -> FitReport:
    """Train a model on own images as the settings say."""
    if own is None or len(own) < MIN_TRAINING_IMAGES:
        return FitReport(num_examples=0, loss=0.0)
    device = device_of(model)
    images_NCHW, labels_N = to_tensor(own.images_NCHW, device), to_tensor(own.labels_N, device)
    loss = train_locally(model, images_NCHW, labels_N, num_classes, settings, stream)
    return FitReport(num_examples=len(own), loss=loss)


def _rehearsed(own: ImageSet | None, model: nn.Module, num_classes: int) -> OwnImages | None:
    if own is None or len(own) == 0:
        return None
    device = device_of(model)
    labels_N = to_tensor(own.labels_N, device)
    # What others taught of classes that it has no image of is not unlearned.
    prior_K = log_class_prior(labels_N, num_classes, unseen=0.0)
    return OwnImages(to_tensor(own.images_NCHW, device), labels_N, prior_K)


def _check_made(
    make: Callable[[], nn.Module],
    made: nn.Module,
    image_shape: tuple[int, int, int],
    num_classes: int,
) -> None:
    """Check what a function makes, which has made a module before.

    Raises
    ------
    ConfigError
        If it is no classifier (`check_model`), or the same module again.
    """
    with torch.random.fork_rng(devices=[]):
        model = make()
        if model is made:
            raise ConfigError(
                "the function that makes the model gives the same one each time, which all clients "
                "of a process would share: make it within the function"
            )
        with check_aside(model) as checked:
            check_model(checked, image_shape, num_classes, "the client's model")


def _of_probabilities(make: Callable[[], nn.Module]) -> nn.Module:
    return OfProbabilities(make())


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ConfigError(
            f"the model cannot be copied ({error_line(error)}): give a function that makes it"
        ) from error
