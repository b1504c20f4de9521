"""Scores against closed forms, and against simulated models whose best attack is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import logit, softmax
from scipy.stats import norm

from fedzge_flwr.audit.membership import margins, offline_lira, online_lira, rmia
from fedzge_flwr.audit.rates import auc
from fedzge_flwr.common.arrays import BoolArray, Float64Array

Score = Callable[[Float64Array, Float64Array, BoolArray], Float64Array]


def test_margins_are_the_log_odds_of_the_class() -> None:
    logits = np.random.default_rng(0).normal(0, 3, (50, 7)).astype(np.float32)
    labels = np.arange(50) % 7
    p = softmax(logits.astype(np.float64), axis=1)[np.arange(50), labels]
    np.testing.assert_allclose(margins(logits, labels), logit(p), rtol=1e-9, atol=1e-9)


def test_margins_lose_nothing_where_a_model_is_sure() -> None:
    """A probability of 1 − e⁻⁸⁰ is 1 in any floating-point type."""
    logits = np.array([[80.0, 0.0], [900.0, -900.0]], dtype=np.float32)
    assert margins(logits, np.array([0, 1])).tolist() == [80.0, -1800.0]


def test_online_lira_is_the_ratio_of_two_densities() -> None:
    shadows = np.array([[1.0, 5.0], [2.0, 1.0], [-1.0, 3.0], [0.0, 1.0]])
    had = np.array([[True, True], [True, False], [False, True], [False, False]])
    target = np.array([1.2, 2.0])
    # Of two values each around their mean: over both images 2·0.5² and 2·1² with the image, 2·0.5²
    # and 0 without; each mean took a degree of freedom of four.
    with_image = np.sqrt((0.5 + 2.0) / 2)
    without = np.sqrt((0.5 + 0.0) / 2)
    wanted = norm.logpdf(target, [1.5, 4.0], with_image) - norm.logpdf(target, [-0.5, 1.0], without)
    np.testing.assert_allclose(online_lira(target, shadows, had), wanted)
    np.testing.assert_allclose(offline_lira(target, shadows, had), (target - [-0.5, 1.0]) / without)


def test_rmia_is_the_share_of_images_that_are_beaten() -> None:
    """Counted pair by pair."""
    stream = np.random.default_rng(0)
    target, shadows = stream.normal(0, 2, 30), stream.normal(0, 2, (4, 30))
    had = np.zeros((4, 30), dtype=bool)
    had[:2, ::2] = had[2:, 1::2] = True
    p, of_shadows = 1 / (1 + np.exp(-target)), 1 / (1 + np.exp(-shadows))
    mean_in = np.array([of_shadows[had[:, i], i].mean() for i in range(30)])
    mean_out = np.array([of_shadows[~had[:, i], i].mean() for i in range(30)])
    ratio = p / ((mean_in + mean_out) / 2)
    for gamma in (1.0, 2.0):
        wanted = [
            np.mean([ratio[x] / ratio[z] >= gamma for z in range(30) if z != x]) for x in range(30)
        ]
        np.testing.assert_allclose(rmia(target, shadows, had, gamma=gamma), wanted)


def simulated(effect: float) -> tuple[Float64Array, BoolArray, Float64Array, BoolArray]:
    """Margins of a target and 8 shadows: images differ, and being trained on adds ``effect``."""
    stream, num = np.random.default_rng(0), 20_000
    ease = stream.normal(3, 4, num)
    member = stream.random(num) < 0.5
    had = np.zeros((8, num), dtype=bool)
    for first in range(0, 8, 2):
        had[first] = stream.random(num) < 0.5
        had[first + 1] = ~had[first]
    target = ease + effect * member + stream.normal(0, 1, num)
    shadows = ease + effect * had + stream.normal(0, 1, (8, num))
    return target, member, shadows, had


def test_of_simulated_models_lira_comes_near_the_best_attack() -> None:
    """Who knew each image's means would have an area of Φ(effect/√2); four shadows blur them."""
    target, member, shadows, had = simulated(1.5)
    best = norm.cdf(1.5 / np.sqrt(2))
    # The mean of four values has a variance of 1/4 beside the target's 1.
    offline = norm.cdf(1.5 / np.sqrt(2 * (1 + 1 / 4)))
    assert auc(offline_lira(target, shadows, had), member) == pytest.approx(offline, abs=0.01)
    assert offline - 0.01 < auc(online_lira(target, shadows, had), member) < best
    # The margin alone does not know which images are easy.
    assert auc(target, member) == pytest.approx(norm.cdf(1.5 / np.sqrt(2 * 17)), abs=0.01)


@pytest.mark.parametrize("score", [online_lira, offline_lira, rmia])
def test_where_training_leaves_no_trace_no_score_finds_any(score: Score) -> None:
    target, member, shadows, had = simulated(0.0)
    assert auc(score(target, shadows, had), member) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("score", [online_lira, offline_lira, rmia])
def test_a_higher_score_speaks_for_a_member(score: Score) -> None:
    target, member, shadows, had = simulated(3.0)
    assert auc(score(target, shadows, had), member) > 0.75
