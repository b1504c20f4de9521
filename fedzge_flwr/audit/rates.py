"""How well a score tells members from others: rates, intervals and curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedzge_flwr.common.arrays import BoolArray, Float64Array

CONFIDENCE = 0.95
"""Of all intervals."""


@dataclass(frozen=True)
class Rate:
    """A share of images, with its interval.

    Parameters
    ----------
    hits, total : int
        Images for which it holds, of how many; at least one.
    """

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The exact 95 % interval of Clopper and Pearson (1934, Biometrika 26)."""
        from scipy.stats import binomtest

        found = binomtest(self.hits, self.total).proportion_ci(CONFIDENCE, method="exact")
        return float(found.low), float(found.high)


class Roc(NamedTuple):
    """True against false positive rates, from (0, 0) to (1, 1): float64 (M,) each, in [0, 1]."""

    false_positive: Float64Array
    true_positive: Float64Array


def roc(scores_N: Float64Array, member_N: BoolArray) -> Roc:
    """Return the rates of all thresholds; a higher score speaks for a member.

    Parameters
    ----------
    scores_N, member_N
        A finite score (N,) of each image, and whether it is a member (N,); there are both.
    """
    from sklearn.metrics import roc_curve

    false_positive, true_positive, _ = roc_curve(member_N, scores_N, drop_intermediate=False)
    return Roc(false_positive, true_positive)


def auc(scores_N: Float64Array, member_N: BoolArray) -> float:
    """Return the chance that a member's score is above another image's, ties counted half."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(member_N, scores_N))


def threshold_at(scores_N: Float64Array, member_N: BoolArray, most: float) -> float:
    """Return the lowest score above which at most a share ``most`` of the others lie; may be −∞."""
    others = np.sort(scores_N[~member_N])[::-1]
    allowed = int(np.floor(most * len(others) + 1e-9))
    return float(others[allowed]) if allowed < len(others) else -np.inf


def found_at(scores_N: Float64Array, member_N: BoolArray, most: float) -> BoolArray:
    """Return which images (N,) are called members at a false positive rate of at most ``most``."""
    found_N: BoolArray = scores_N > threshold_at(scores_N, member_N, most)
    return found_N


def true_positives(scores_N: Float64Array, member_N: BoolArray, most: float) -> Rate:
    """Return how many members are found at a false positive rate of at most ``most``."""
    found_N = found_at(scores_N, member_N, most)
    return Rate(int((found_N & member_N).sum()), int(member_N.sum()))
