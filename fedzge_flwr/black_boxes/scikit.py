"""scikit-learn classifiers as black boxes."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox, log_probabilities
from fedzge_flwr.black_boxes.contract import FitReport, State
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.randomness import Purpose, numpy_stream
from fedzge_flwr.common.registry import one_of
from fedzge_flwr.images.image_set import ImageSet

if TYPE_CHECKING:
    from flwr.app import Context

_FEW = 40

Distillation: TypeAlias = Literal["sampled-labels", "none"]


class SklearnBlackBox(ClassifierBlackBox):
    """A scikit-learn classifier on its own images, pixels flattened.

    It answers with the logarithms of ``predict_proba``. A classifier that answers in steps (trees,
    neighbours) does not move at a small ε: the server sees that, names the client, and leaves it
    out of the gradient estimate but not out of the ensemble.

    It cannot take steps of distillation. With ``"sampled-labels"`` it is *refitted* instead: on its
    own images and on those of the newest distillation, each with labels drawn from the ensemble's
    softened probabilities. With ``"none"`` it ignores what the others know.

    Parameters
    ----------
    context : Context
        The node's.
    classifier : sklearn.base.ClassifierMixin
        Unfitted, with ``fit`` and, once fitted, ``predict_proba``; give it a ``random_state``.
        XGBoost's and LightGBM's are such. One that wants labels without gaps gets them. It is
        copied: a process serves many clients, and none may go on from what another has learned.
    train : ImageSet
        The client's own images.
    num_classes : int
        Number of classes K; the client need not have images of all. One with images of a single
        class, which no classifier can be fitted to, answers with that until it has distilled; one
        without images, with all classes alike.
    distillation : {"sampled-labels", "none"}
        What becomes of the ensemble's answers.
    labels_per_image : int
        Labels that are drawn for an image, at least 1.
    seed : int
        Of these draws.
    **options
        As for `ClassifierBlackBox`.

    Raises
    ------
    ConfigError
        If the classifier has no ``predict_proba`` or is a class, or an option is not as above.
    DataError
        If a label is not below K.
    """

    def __init__(
        self,
        context: Context,
        classifier: Any,
        train: ImageSet,
        num_classes: int,
        *,
        distillation: Distillation = "sampled-labels",
        labels_per_image: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(context, train.images_NCHW.shape[1:], num_classes, len(train), **options)
        one_of(distillation, Distillation, "distillation")
        if labels_per_image < 1:
            raise ConfigError(f"labels_per_image = {labels_per_image}: give at least 1")
        if isinstance(classifier, type) or not _has_probabilities(classifier):
            raise ConfigError(_no_probabilities(classifier))
        train.check(self.image_shape, num_classes)
        classes = np.unique(train.labels_N)
        self._only_class = classes if len(classes) == 1 else None
        self._given = classifier
        self._classifier = _own_copy(classifier)
        self._train = train
        self._distillation = distillation
        self._labels_per_image = labels_per_image
        self._seed = seed
        self._fitted = False
        # The classes by the classifier's own numbers, if those are others.
        self._numbered: npt.NDArray[np.int64] | None = None

    def fit(self, round_: int) -> FitReport:
        """Fit the classifier the first time; its data stay the same until it distills."""
        inputs, labels = _flat(self._train.inputs_NCHW), self._train.labels_N
        if len(labels) and not self._fitted and self._only_class is None:
            self._refit(inputs, labels)
        return FitReport(num_examples=len(self._train), loss=self._loss())

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Return clamped log-probabilities; of an unfitted classifier, all alike.

        Of one that cannot be fitted, since it has a single class, that class.
        """
        if not self._fitted and self._only_class is not None:
            return log_probabilities(
                np.ones((len(images_NCHW), 1)), self._only_class, self.num_classes
            )
        if not self._fitted:
            return np.full((len(images_NCHW), self.num_classes), -np.log(self.num_classes), "f4")
        found = self._classifier.predict_proba(_flat(images_NCHW))
        classes = np.asarray(self._classifier.classes_, dtype=np.int64)
        if self._numbered is not None:
            classes = self._numbered[classes]
        return log_probabilities(found, classes, self.num_classes)

    def distill(
        self,
        round_: int,
        images_NCHW: FloatArray,
        teacher_logits_NK: FloatArray,
        temperature: float,
    ) -> float:
        """Refit with labels drawn from the teacher's softened probabilities."""
        if self._distillation == "none":
            return 0.0
        stream = numpy_stream(
            self._seed, Purpose.CLIENT_DISTILLATION, round_=round_, partition=self._partition
        )
        # Gumbel's trick: the largest of log p + Gumbel noise is a draw from p.
        images = np.repeat(_flat(images_NCHW), self._labels_per_image, axis=0)
        scaled = np.repeat(teacher_logits_NK / temperature, self._labels_per_image, axis=0)
        labels = (scaled + stream.gumbel(size=scaled.shape)).argmax(axis=1)
        labels = np.concatenate([self._train.labels_N, labels])
        if len(np.unique(labels)) == 1:
            return 0.0
        self._refit(np.concatenate([_flat(self._train.inputs_NCHW), images]), labels)
        return self._loss()

    def _refit(self, inputs: FloatArray, labels: Any) -> None:
        classes, numbers = np.unique(labels, return_inverse=True)
        self._numbered = None
        try:
            self._classifier.fit(inputs, labels)
        except ValueError:
            # XGBoost takes no labels but 0 … k-1, and a client may lack a class.
            if classes[-1] == len(classes) - 1:
                raise
            self._classifier.fit(inputs, numbers)
            self._numbered = classes
        if not hasattr(self._classifier, "predict_proba"):
            raise ConfigError(_no_probabilities(self._classifier))
        self._fitted = True

    def _loss(self) -> float:
        """Mean cross-entropy on its own images; 0 without any."""
        if len(self._train) == 0:
            return 0.0
        logits_NK = self.logits(self._train.inputs_NCHW)
        return float(-logits_NK[np.arange(len(self._train)), self._train.labels_N].mean())

    def trained_on(self) -> ImageSet:
        """Return the images that it is fitted to."""
        return self._train

    def state(self) -> State:
        """Return the fitted classifier, pickled: it stays with its owner."""
        if not self._fitted:
            return {}
        pickled = np.frombuffer(pickle.dumps(self._classifier), dtype=np.uint8)
        numbered = {} if self._numbered is None else {"numbered": self._numbered}
        return {"pickle": pickled, **numbered}

    def load_state(self, state: State) -> None:
        """Unpickle what `state` returned. Nothing of a message gets here."""
        self._fitted = "pickle" in state
        if self._fitted:
            self._classifier = pickle.loads(state["pickle"].tobytes())
            self._numbered = np.asarray(state["numbered"]) if "numbered" in state else None
        else:
            self._classifier = _own_copy(self._given)


def _own_copy(classifier: Any) -> Any:
    """Return a classifier as it was given, for one client: a process serves many.

    What a warm start goes on from, and what a ``RandomState`` has come to, is another client's.
    """
    from sklearn.base import clone

    try:
        return clone(classifier)
    except (TypeError, RuntimeError):  # no estimator of scikit-learn's kind, or not quite
        return copy.deepcopy(classifier)


def _has_probabilities(classifier: Any) -> bool:
    """Say whether a classifier has ``predict_proba``; some have it once they are fitted."""
    if hasattr(classifier, "predict_proba"):
        return True
    if not hasattr(type(classifier), "predict_proba"):
        return False
    drawn = np.random.default_rng(0).normal(size=(_FEW, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fitted = _own_copy(classifier).fit(drawn, np.arange(_FEW) % 2)
        except Exception:  # noqa: BLE001 - of whatever such images do not suit: known when fitted
            return True
    return hasattr(fitted, "predict_proba")


def _no_probabilities(classifier: Any) -> str:
    name = getattr(classifier, "__name__", type(classifier).__name__)
    return (
        f"classifier {name}: give an instance that has predict_proba (SVC and others get it in "
        "CalibratedClassifierCV(classifier); loss='log_loss' or voting='soft' gives it to some)"
    )


def _flat(images_NCHW: FloatArray) -> FloatArray:
    return images_NCHW.reshape(len(images_NCHW), math.prod(images_NCHW.shape[1:]))
