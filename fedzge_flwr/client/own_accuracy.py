"""A model's accuracy on its client's own images, and what of it a distillation may cost."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedzge_flwr.black_boxes.contract import BlackBox

MOST_IMAGES = 1000
"""So many own images are asked about: a 5 % loss is then 50 of them, and a pass takes little."""

FEW_IMAGES = 7
"""A loss of so many images is never too much: 5 % of 140, below which an accuracy of 90 % is not
itself known to within 5 points (1.96·√(0.9·0.1/140) = 0.05)."""


class OwnAccuracy(NamedTuple):
    """How many of a client's own images its model classifies rightly, and of how many."""

    right: float
    images: int

    @property
    def share(self) -> float:
        """The accuracy, in [0, 1]; 0 without images."""
        return self.right / self.images if self.images else 0.0


NOT_MEASURED = OwnAccuracy(0.0, 0)


def own_accuracy(box: BlackBox) -> OwnAccuracy:
    """Return a model's accuracy on its client's own images, always on the same ones.

    As `fedzge_flwr.black_boxes.contract.KnowsItsOwn` says, or, of a black box that does not, by its
    evaluation on held-out images. Without images of either kind there are 0.
    """
    # Not isinstance: a box around another hands its attributes on.
    own_correct = getattr(box, "own_correct", None)
    if own_correct is not None:
        found = np.asarray(own_correct(MOST_IMAGES))
        if len(found):
            return OwnAccuracy(float(np.count_nonzero(found)), len(found))
    outcome = box.evaluate("held-out")
    images = int(outcome.num_examples)
    return OwnAccuracy(float(outcome.accuracy) * images, images)


def too_costly(best: float, had: OwnAccuracy, has: OwnAccuracy, most: float) -> bool:
    """Say whether a distillation has cost more than it may.

    It is measured against the best accuracy so far, not against that just before: many small losses
    are one large one. One that has made nothing worse is not blamed for what training had unlearnt.

    Parameters
    ----------
    best : float
        The best accuracy on own images up to now, in [0, 1].
    had, has : OwnAccuracy
        Before and after the distillation.
    most : float
        The part of own images, in [0, 1], that may be unlearnt; 1: any.
    """
    if most >= 1 or has.share >= had.share:
        return False
    # A margin for the rounding of shares: right is an integer.
    lost = best * has.images - has.right
    return lost > max(most * has.images, FEW_IMAGES) + 1e-6
