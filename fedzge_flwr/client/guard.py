"""What a node's owner allows its endpoints to do and to answer, checked before any work is done.

A refusal is an answer of its own kind; the server goes on without the client and says so. It names
the owner's key, and not what the owner has set, nor what the node has answered to others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from fedzge_flwr.client.account import Account, Tally, Work, own_images_token
from fedzge_flwr.client.noise import noise
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import RefusedError
from fedzge_flwr.config.owner import OwnerSettings

_SURE = 0.9
"""Probability of the class that is told where classes alone are: an ensemble weighs it by that."""


class Guard:
    """Admits queries, evaluations and training, and perturbs what is answered.

    Rounding and noise are *output perturbation*: they make each answer tell less, and promise
    nothing. The noise on an image is the same as long as the model is (`fedzge_flwr.client.noise`),
    but averages out over neighbours of the image, which the budget limits; neither is differential
    privacy.

    Parameters
    ----------
    settings : OwnerSettings
        The owner's limits.
    account : Account
        Keeps the tally, and the secret of the noise.
    clock : Callable[[], float]
        Seconds since 1970.
    """

    def __init__(
        self, settings: OwnerSettings, account: Account, clock: Callable[[], float] = time.time
    ) -> None:
        self._settings = settings
        self._account = account
        self._clock = clock

    def weigh(self, num_images: int) -> None:
        """Refuse a query for how much it asks, before anything is made of it; count nothing.

        Raises
        ------
        RefusedError
            If `admit` would refuse so many images now.
        StateError
            If the tally cannot be read.
        """
        limits = self._settings
        if limits.max_query_images and num_images > limits.max_query_images:
            raise RefusedError(
                f"{num_images} images in a query are more than this node answers "
                "('max-query-images')"
            )
        if limits.query_budget or limits.min_query_interval:
            with self._account.tally() as tally:
                self._check_interval(tally)
                self._check_budget(tally, num_images)

    def admit(self, images_BCHW: FloatArray) -> None:
        """Count a query, or refuse it; what is refused is not counted.

        It is counted before it is answered: no crash in between makes an answer free.

        Parameters
        ----------
        images_BCHW : ndarray of float32
            All images that are asked about, copies included.

        Raises
        ------
        RefusedError
            If there are too many of them, a pixel is out of range, the budget is spent, or the last
            query is too recent.
        StateError
            If the tally cannot be kept.
        """
        limits, num_images = self._settings, len(images_BCHW)
        self.weigh(num_images)
        if limits.query_range and num_images:
            largest = float(np.abs(images_BCHW).max())
            # Not '>': a pixel that is no number compares with nothing.
            if not largest <= limits.query_range:
                raise RefusedError(
                    f"a pixel of magnitude {largest:.3g} is beyond what this node answers "
                    "('query-range')"
                )
        if not (limits.query_budget or limits.min_query_interval):
            return
        with self._account.tally() as tally:
            self._check_interval(tally)
            self._check_budget(tally, num_images)
            tally.images += num_images
            tally.last = self._clock()

    def allow_evaluation(self, split: str) -> None:
        """Refuse an evaluation that the owner does not allow, before it is done."""
        allowed = self._settings.allow_evaluation
        if allowed != "any" and split != allowed:
            raise RefusedError(f"no evaluation on '{split}' images here ('allow-evaluation')")

    def weigh_evaluation(self, num_images: int) -> None:
        """Refuse an evaluation of at least so many images if they are too many now; count none."""
        if self._settings.query_budget:
            with self._account.tally() as tally:
                self._check_budget(tally, max(num_images, 1))

    def count_evaluation(self, num_images: int) -> None:
        """Count the images of an evaluation before what came of it is told, or refuse to tell.

        It is no query, so that it need keep no interval.
        """
        if not self._settings.query_budget:
            return
        with self._account.tally() as tally:
            self._check_budget(tally, num_images)
            tally.images += num_images

    def _check_interval(self, tally: Tally) -> None:
        passed = self._clock() - tally.last
        # A clock that was set back makes nobody wait for the difference.
        if 0 <= passed < self._settings.min_query_interval:
            raise RefusedError("asked again too soon ('min-query-interval')")

    def _check_budget(self, tally: Tally, num_images: int) -> None:
        budget = self._settings.query_budget
        if budget and tally.images + num_images > budget:
            raise RefusedError(
                f"{num_images} images are more than what is left of all that this node will "
                "answer ('query-budget')"
            )

    def trainings(self, work: Work, wanted: int) -> int:
        """Return in how many rounds a model may train now, of 1 and what is owed, and count them.

        Parameters
        ----------
        work : Work
            What has been done in this experiment.
        wanted : int
            The rounds, at least 1.
        """
        limits = self._settings
        allowed = min(wanted, 1 + limits.max_catch_up_rounds)
        if limits.max_trainings:
            allowed = min(allowed, max(limits.max_trainings - work.trainings, 0))
        work.trainings += allowed
        return allowed

    @property
    def limits_training(self) -> bool:
        """Whether trainings must be counted."""
        return self._settings.max_trainings > 0

    @property
    def allows_distillation(self) -> bool:
        """Whether the model may distill."""
        return self._settings.allow_distillation

    @property
    def max_accuracy_loss(self) -> float:
        """The part of own images, in [0, 1], that distillation may unlearn; 1: any."""
        return self._settings.max_accuracy_loss / 100

    def sealed(self, digest: str, purpose: str) -> str:
        """Return what may be told of a digest of own images (`own_images_token`).

        Empty where nothing is known, or no secret lasts for longer than a Flower run.
        """
        lasts = bool(digest) and self._account.lasts
        return own_images_token(self._account.secret(), digest, purpose) if lasts else ""

    def perturbed(
        self,
        logits_NK: FloatArray,
        keys: Callable[[], list[bytes]],
        model: Callable[[], bytes],
    ) -> FloatArray:
        """Return logits with noise added, then their class alone, then rounded, as the owner wants.

        Parameters
        ----------
        logits_NK : ndarray of float32
            (N, K).
        keys : Callable[[], list of bytes]
            Returns what each row is the answer to (`fedzge_flwr.client.noise.image_keys`).
        model : Callable[[], bytes]
            Returns the digest of the model that answers.

        Returns
        -------
        ndarray of float32
            (N, K).
        """
        scale, decimals = self._settings.logit_noise, self._settings.logit_decimals
        if scale and len(logits_NK):
            secret, num_classes = self._account.secret(), logits_NK.shape[1]
            drawn = scale * noise(secret, model(), keys(), num_classes)
            logits_NK = (logits_NK + drawn).astype(np.float32)
        if self._settings.label_only:
            logits_NK = _labels(logits_NK)
        if decimals < 0:
            return logits_NK
        # In float64, where a large logit times 10^8 does not overflow.
        return np.round(logits_NK.astype(np.float64), decimals).astype(np.float32)


def _labels(logits_NK: FloatArray) -> FloatArray:
    """Return logits by which the likeliest class has `_SURE`, and the others the same."""
    num_images, num_classes = logits_NK.shape
    labels_NK = np.zeros((num_images, num_classes), dtype=np.float32)
    size = math.log(_SURE / (1 - _SURE) * max(num_classes - 1, 1))
    labels_NK[np.arange(num_images), logits_NK.argmax(axis=1)] = size
    return labels_NK
