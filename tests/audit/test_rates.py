"""Rates against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, norm

from fedzge_flwr.audit.rates import Rate, auc, roc, threshold_at, true_positives

SCORES = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])
MEMBER = np.array([True, True, False, True, False, True, False, False])


def test_members_are_counted_above_the_threshold() -> None:
    # None of the four others may be called a member: two lie above the best of them.
    assert true_positives(SCORES, MEMBER, 0.0) == Rate(2, 4)
    assert true_positives(SCORES, MEMBER, 0.2) == Rate(2, 4)
    assert true_positives(SCORES, MEMBER, 0.25) == Rate(3, 4)
    assert true_positives(SCORES, MEMBER, 1.0) == Rate(4, 4)


def test_equal_scores_call_no_member() -> None:
    """A score that says nothing finds nobody, whatever the order of the images."""
    assert true_positives(np.zeros(8), MEMBER, 0.25) == Rate(0, 4)


def test_a_hundredth_of_a_hundred_is_one() -> None:
    """No rounding of 0.01 · 100 below 1."""
    scores = np.arange(200.0)
    member = np.arange(200) >= 100
    assert threshold_at(scores, member, 0.01) == 98.0
    assert threshold_at(scores, member, 0.29) == 70.0


@pytest.mark.parametrize(("hits", "total"), [(0, 20), (3, 20), (20, 20)])
def test_intervals_are_clopper_and_pearsons(hits: int, total: int) -> None:
    low, high = Rate(hits, total).interval
    assert low == pytest.approx(0.0 if hits == 0 else beta.ppf(0.025, hits, total - hits + 1))
    assert high == pytest.approx(1.0 if hits == total else beta.ppf(0.975, hits + 1, total - hits))


def test_the_area_is_the_share_of_ordered_pairs() -> None:
    pairs = [float(a > b) + 0.5 * float(a == b) for a in SCORES[MEMBER] for b in SCORES[~MEMBER]]
    assert auc(SCORES, MEMBER) == pytest.approx(np.mean(pairs))
    assert auc(np.zeros(8), MEMBER) == 0.5


def test_of_two_normal_distributions_the_curve_is_known() -> None:
    """True positives are Φ(d + Φ⁻¹(false positives)), the area Φ(d/√2)."""
    stream, distance = np.random.default_rng(0), 1.5
    scores = np.concatenate((stream.normal(distance, 1, 40_000), stream.normal(0, 1, 40_000)))
    member = np.arange(80_000) < 40_000
    assert auc(scores, member) == pytest.approx(norm.cdf(distance / np.sqrt(2)), abs=0.005)
    for most in (0.001, 0.01, 0.1):
        wanted = norm.cdf(distance + norm.ppf(most))
        assert true_positives(scores, member, most).value == pytest.approx(wanted, rel=0.12)
    curve = roc(scores, member)
    assert (curve.false_positive[0], curve.true_positive[0]) == (0.0, 0.0)
    assert (curve.false_positive[-1], curve.true_positive[-1]) == (1.0, 1.0)
