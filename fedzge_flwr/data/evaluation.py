"""Evaluation for the experimenter's sake: callables that the strategy is given, and checks of data.

This is the only place where the server's process touches data, and it reads the test set alone;
the check of the partition reads the training labels when they lie on this machine anyway.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, MetricRecord

from fedzge_flwr.common.arrays import IntArray
from fedzge_flwr.common.errors import MissingDataError
from fedzge_flwr.common.randomness import Purpose, seeded_default
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.partition import partition_indices
from fedzge_flwr.images.spec import OWN
from fedzge_flwr.learning.models.catalogue import rebuild_model
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.predict import evaluate_logits, predict
from fedzge_flwr.learning.tensors import to_tensor

LOGGER = logging.getLogger("flwr.fedzge")


@dataclass(frozen=True)
class TestSetEvaluation:
    """Scores models and logits on the common test set (a `fedzge_flwr.strategy.CommonTestSet`).

    Parameters
    ----------
    settings : Settings
        The run's settings.

    Raises
    ------
    DataError
        If the test set cannot be loaded.
    """

    __test__ = False  # not a test class, whatever its name begins with

    settings: Settings

    def __post_init__(self) -> None:
        load_split(self.settings.data, "test")

    def central(self, round_: int, arrays: ArrayRecord) -> MetricRecord:
        """Evaluate the central model with these arrays, in evaluation mode.

        Returns "loss", "accuracy" and "classes", its class of each test image.
        """
        spec = self.settings.data.spec
        with seeded_default(self.settings.run.seed, Purpose.INIT_CENTRAL):
            model = rebuild_model(
                self.settings.distillation.central_model,
                spec.image_shape,
                spec.num_classes,
                arrays.to_torch_state_dict(),
            )
        model.to(select_device(self.settings.run.server_device))
        images = load_split(self.settings.data, "test")
        logits_NK = predict(
            model,
            to_tensor(images.images_NCHW),
            self.settings.queries.query_batch_size,
        )
        outcome = evaluate_logits(logits_NK, to_tensor(images.labels_N))
        classes = logits_NK.argmax(dim=1).tolist()
        return MetricRecord(
            {"loss": outcome.loss, "accuracy": outcome.accuracy, "classes": classes}
        )

    @property
    def labels_M(self) -> IntArray:
        """Classes of the test images, int64 (M,)."""
        return load_split(self.settings.data, "test").labels_N


def data_digests(settings: Settings) -> dict[str, str]:
    """Return digests of the images that lie on this machine, by what they are.

    A checkpoint keeps them, so that nobody goes on with others unawares. What a deployment's
    clients have is their own affair: they say themselves whether it is what it was.

    Raises
    ------
    DataError
        As in `check_partition`.
    """
    if settings.data.dataset == OWN or not (settings.run.checkpoint_every or settings.run.resume):
        return {}
    found = {}
    if settings.run.server_evaluation == "test":
        found["test images"] = load_split(settings.data, "test").digest()
    try:
        parts = partition_indices(settings.data, settings.run.num_clients, settings.run.seed)
        images = load_split(settings.data, "train")
    except MissingDataError:
        return found
    of_clients = {f"client {n}": images.take(part).digest() for n, part in enumerate(parts)}
    return {**found, **of_clients}


def check_partition(settings: Settings) -> npt.NDArray[np.int64] | None:
    """Check, before any client starts, that the data can be divided as the settings ask.

    In a simulation the data lie on this machine, and a download happens here, once. In a deployment
    they may lie with the clients alone: then there is nothing to check here.

    Returns
    -------
    ndarray of int64, optional
        Images by client and class (clients, K); None if the data are not here.

    Raises
    ------
    DataError
        If there are too few images for so many clients, or files are malformed.
    """
    if settings.data.dataset == OWN:
        return None
    try:
        parts = partition_indices(settings.data, settings.run.num_clients, settings.run.seed)
    except MissingDataError as error:
        LOGGER.info("training images are not checked here, but by the clients (%s)", error)
        return None
    labels = load_split(settings.data, "train").labels_N
    num_classes = settings.data.spec.num_classes
    counts = np.array([np.bincount(labels[part], minlength=num_classes) for part in parts])
    absent = np.flatnonzero(counts.sum(axis=0) == 0)
    if len(absent):
        LOGGER.warning("no client has images of class %s", ", ".join(map(str, absent)))
    return counts
