"""What black boxes of other models have in common. Plain NumPy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedzge_flwr.black_boxes.contract import (
    ClientEvaluation,
    ClientProfile,
    EvaluationSplit,
    FitReport,
    State,
)
from fedzge_flwr.black_boxes.judging import right_on_own
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import ConfigError, DataError
from fedzge_flwr.common.registry import one_of
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.images.spec import shape_of

if TYPE_CHECKING:
    from flwr.app import Context


SMALLEST_PROBABILITY = 1e-4
"""What a probability of 0 counts as: the logarithm must be finite."""

Output: TypeAlias = Literal["logits", "probabilities"]
"""What a model returns. Of one that ends in a softmax it is probabilities: taken for logits, they
would say that all classes are nearly alike."""

_AXES = 2

_ROUNDING = 1e-3
"""By how much a probability in float16 may be above 1."""


class ClassifierBlackBox(ABC):
    """A `BlackBox` of which a subclass gives `logits`, and what else it can.

    As it is, it is inference-only: it answers, but neither trains nor distills, and keeps nothing.

    Parameters
    ----------
    context : Context
        The node's, of which ``partition-id`` and ``num-partitions`` are read.
    image_shape : tuple of int
        (C, H, W) of the images that it takes, in the shared pixel range [−1, 1].
    num_classes : int
        Number of logits K.
    num_examples : int
        Images that the model was or will be trained on: its weight in some ensembles.
    evaluation : Mapping[{"test", "held-out"}, ImageSet], optional
        What it is evaluated on. Without, ``client-evaluation`` reports nothing of this client.
    max_query_images : int
        Most images that it answers in one message, perturbed copies included.
    local_rounds : int
        Rounds in which `fit` is called; 0: all.

    Raises
    ------
    ConfigError
        If the node config lacks ``partition-id`` or ``num-partitions``, a shape or number is none,
        ``evaluation`` has another key, or a subclass trains or distills without `state` and
        `load_state`: a black box is made for each message, and what is not kept is lost.
    DataError
        If images of ``evaluation`` have another shape, or a label is not below K.
    """

    def __init__(
        self,
        context: Context,
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_examples: int,
        *,
        evaluation: Mapping[EvaluationSplit, ImageSet] | None = None,
        max_query_images: int = 200_000,
        local_rounds: int = 0,
    ) -> None:
        self._partition = _number(context, "partition-id")
        self._num_partitions = _number(context, "num-partitions")
        self._image_shape = _shape(image_shape)
        self._num_classes = _at_least(2, "num_classes", num_classes, "")
        self._num_examples = _at_least(0, "num_examples", num_examples, "a number of images, ")
        self._evaluation = evaluation or {}
        for split, images in self._evaluation.items():
            one_of(split, EvaluationSplit, "evaluation")
            try:
                images.check(self._image_shape, num_classes)
            except DataError as error:
                raise DataError(f"evaluation, '{split}': {error}") from None
        kind, base = type(self), ClassifierBlackBox
        learns = kind.fit is not base.fit or kind.distill is not base.distill
        if learns and (kind.state is base.state or kind.load_state is base.load_state):
            raise ConfigError(
                f"{kind.__name__} trains or distills but does not say what of it is to be kept: "
                "override `state` and `load_state` too, since one is made for each message"
            )
        self._max_query_images = max_query_images
        self._local_rounds = local_rounds

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that it takes."""
        return self._image_shape

    @property
    def num_classes(self) -> int:
        """Number of logits K."""
        return self._num_classes

    @property
    def max_query_images(self) -> int:
        """Most images that it answers in one message."""
        return self._max_query_images

    @property
    def local_rounds(self) -> int:
        """Rounds of local training; 0: all rounds."""
        return self._local_rounds

    def profile(self) -> ClientProfile:
        """Say partition and training examples."""
        own = self.trained_on()
        data = "" if own is None else own.digest()
        return ClientProfile(
            self._partition, self._num_partitions, self._num_examples, self.device, 0.0, data
        )

    @property
    def device(self) -> str:
        """Where it computes."""
        return "cpu"

    @abstractmethod
    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Answer a query.

        Parameters
        ----------
        images_NCHW : ndarray of float32
            Images in the shared pixel range; perturbed ones are a little beyond.

        Returns
        -------
        ndarray of float32
            (N, K), finite and of magnitude at most 10⁶; each image's as if it had been asked about
            alone.
        """

    def fit(self, round_: int) -> FitReport:
        """Train on one's own data for a round. This one does not."""
        return FitReport(num_examples=0, loss=0.0)

    def distill(
        self,
        round_: int,
        images_NCHW: FloatArray,
        teacher_logits_NK: FloatArray,
        temperature: float,
    ) -> float:
        """Learn from the ensemble's logits. This one does not.

        Parameters
        ----------
        round_ : int
            The round whose answers they are, from 1.
        images_NCHW : ndarray of float32
            Images in the shared pixel range.
        teacher_logits_NK : ndarray of float32
            The ensemble's logits.
        temperature : float
            T > 0 that both are to be divided by.

        Returns
        -------
        float
            The loss, at least 0; 0: nothing was learned.
        """
        return 0.0

    def evaluate(self, split: EvaluationSplit) -> ClientEvaluation:
        """Evaluate the answers on the images given for a split."""
        given = self._evaluation.get(split)
        if given is None or len(given) == 0:
            nothing = np.zeros((0, self._num_classes), dtype=np.float32)
            return ClientEvaluation(0, 0.0, 0.0, nothing)
        from scipy.special import log_softmax

        logits_NK = self.logits(given.inputs_NCHW)
        own = log_softmax(logits_NK, axis=1)[np.arange(len(given)), given.labels_N]
        return ClientEvaluation(
            num_examples=len(given),
            loss=float(-own.mean()),
            accuracy=float(np.mean(logits_NK.argmax(axis=1) == given.labels_N)),
            # Those on images of one's own are nobody's business.
            logits_NK=logits_NK if split == "test" else logits_NK[:0],
            images_NCHW=given.images_NCHW if split == "test" else None,
        )

    def held_out(self) -> ImageSet | None:
        """Return own images that it is not trained on, if there are any: the split "held-out"."""
        return self._evaluation.get("held-out")

    def trained_on(self) -> ImageSet | None:
        """Return the own images that it is trained on, if they are known. Here they are not."""
        return None

    def own_correct(self, most: int) -> npt.NDArray[np.bool_]:
        """Say whether the model knows its own images (`right_on_own`)."""
        return right_on_own(self.logits, self.held_out(), self.trained_on(), most)

    def state(self) -> State:
        """Return what is to be kept between messages: arrays of numbers. This one keeps nothing."""
        return {}

    def load_state(self, state: State) -> None:  # noqa: B027 - there is nothing to do
        """Take up what `state` returned."""

    def close(self) -> None:  # noqa: B027
        """Give back what is held."""


def logits_of_output(found_NK: npt.NDArray[Any], output: Output, what: str) -> FloatArray:
    """Return logits for what a model returned.

    Parameters
    ----------
    found_NK : ndarray
        (N, K).
    output : {"logits", "probabilities"}
        What it is.
    what : str
        What the error calls it.

    Raises
    ------
    DataError
        If it is no probabilities, where it should be.
    """
    if output == "logits":
        return np.asarray(found_NK, dtype=np.float32)
    if found_NK.ndim != _AXES:
        raise DataError(
            f"{what} has shape {found_NK.shape}; of probabilities give (N, K), one of each class "
            "for each image"
        )
    if len(found_NK) and not 0 <= found_NK.min() <= found_NK.max() <= 1 + _ROUNDING:
        raise DataError(
            f"{what} is no probabilities: it goes from {found_NK.min():g} to {found_NK.max():g}; "
            "without `output` it is taken for logits"
        )
    return log_probabilities(found_NK, np.arange(found_NK.shape[1]), found_NK.shape[1])


def log_probabilities(
    probabilities_NC: npt.NDArray[np.floating], classes_C: npt.NDArray[np.integer], num_classes: int
) -> FloatArray:
    """Return logits for the probabilities of some of the classes.

    Parameters
    ----------
    probabilities_NC : ndarray
        Of C ≤ K classes.
    classes_C : ndarray of int
        Which classes: a client has not always images of all.
    num_classes : int
        K.

    Returns
    -------
    ndarray of float32
        (N, K): logarithms, with `SMALLEST_PROBABILITY` for what is less, unknown classes included.

    Examples
    --------
    >>> log_probabilities(np.array([[0.25, 0.75]]), np.array([0, 2]), 3).round(2).tolist()[0][::2]
    [-1.3899999856948853, -0.28999999165534973]
    """
    whole_NK = np.zeros((len(probabilities_NC), num_classes))
    whole_NK[:, classes_C] = probabilities_NC
    found: FloatArray = np.log(np.maximum(whole_NK, SMALLEST_PROBABILITY)).astype(np.float32)
    return found


def _shape(given: object) -> tuple[int, int, int]:
    found = shape_of(given)
    if found is None:
        raise ConfigError(f"image_shape = {given!r}: give (C, H, W), three numbers from 1")
    return found


def _at_least(least: int, name: str, value: int, what: str) -> int:
    if value < least:
        raise ConfigError(f"{name} = {value!r}: give {what}at least {least}")
    return value


def _number(context: Context, key: str) -> int:
    value = context.node_config.get(key)
    if type(value) is not int or value < 0:
        raise ConfigError(
            f"node config: '{key}' = {value!r}: give this node a number from 0 (flower-supernode "
            '--node-config "partition-id=0 num-partitions=2")'
        )
    return value
