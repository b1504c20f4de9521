"""scikit-learn classifiers as black boxes."""

from __future__ import annotations

import math
import pickle
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox, log_probabilities
from fedzge_flwr.black_boxes.contract import FitReport, State
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.randomness import Purpose, numpy_stream
from fedzge_flwr.common.registry import one_of
from fedzge_flwr.images.image_set import ImageSet

if TYPE_CHECKING:
    from flwr.app import Context

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
        Unfitted, with ``fit`` and ``predict_proba``; give it a ``random_state``.
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
        if isinstance(classifier, type) or not hasattr(classifier, "predict_proba"):
            name = getattr(classifier, "__name__", type(classifier).__name__)
            raise ConfigError(
                f"classifier {name}: give an instance that has predict_proba (of SVC with "
                "probability=True, of others in CalibratedClassifierCV)"
            )
        train.check(self.image_shape, num_classes)
        classes = np.unique(train.labels_N)
        self._only_class = classes if len(classes) == 1 else None
        self._classifier = classifier
        self._train = train
        self._distillation = distillation
        self._labels_per_image = labels_per_image
        self._seed = seed
        self._fitted = False

    def fit(self, round_: int) -> FitReport:
        """Fit the classifier the first time; its data stay the same until it distills."""
        inputs, labels = _flat(self._train.inputs_NCHW), self._train.labels_N
        if len(labels) and not self._fitted and self._only_class is None:
            self._classifier.fit(inputs, labels)
            self._fitted = True
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
        return log_probabilities(found, self._classifier.classes_, self.num_classes)

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
        self._classifier.fit(np.concatenate([_flat(self._train.inputs_NCHW), images]), labels)
        self._fitted = True
        return self._loss()

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
        return {"pickle": np.frombuffer(pickle.dumps(self._classifier), dtype=np.uint8)}

    def load_state(self, state: State) -> None:
        """Unpickle what `state` returned. Nothing of a message gets here."""
        if "pickle" in state:
            self._classifier = pickle.loads(state["pickle"].tobytes())
            self._fitted = True


def _flat(images_NCHW: FloatArray) -> FloatArray:
    return images_NCHW.reshape(len(images_NCHW), math.prod(images_NCHW.shape[1:]))
