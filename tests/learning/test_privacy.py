"""The arithmetic of privacy against calculus, and what an image moves against its bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import dblquad, quad
from scipy.stats import kstest, norm

from fedzge_flwr.learning import privacy
from fedzge_flwr.learning.privacy import (
    clipped_gradient,
    delta_of,
    epsilon_of,
    mu_of,
    released,
    secure_normal,
    steps_of,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("mu", "epsilon"), [(0.3, 0.5), (1.0, 1.0), (1.7, 8.0), (3.0, 2.0)])
def test_delta_is_the_integral_of_what_exceeds(mu: float, epsilon: float) -> None:
    """δ(ε) = ∫ max(p − exp(ε) q, 0) of normal densities p and q that lie μ apart."""

    def exceeding(x: float) -> float:
        return float(max(norm.pdf(x, mu) - math.exp(epsilon) * norm.pdf(x), 0.0))

    # They are equal at ε/μ + μ/2, and p is the larger one beyond.
    whole, _ = quad(exceeding, epsilon / mu + mu / 2, mu + 40, epsabs=1e-14)
    assert delta_of(mu, epsilon) == pytest.approx(whole, rel=1e-8, abs=1e-13)


def test_squares_of_mu_add_up() -> None:
    """The δ of two releases together is that of one of √(μ₁² + μ₂²)."""
    first, second, epsilon = 0.8, 0.6, 0.7

    def density(x: float, mean: float = 0.0) -> float:
        # Not SciPy's, which takes eight seconds of a million points.
        return math.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi)

    def exceeding(y: float, x: float) -> float:
        p = density(x, first) * density(y, second)
        return max(p - math.exp(epsilon) * density(x) * density(y), 0.0)

    whole, _ = dblquad(exceeding, -7, 8, -7, 8, epsabs=1e-7)
    assert delta_of(math.hypot(first, second), epsilon) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 2.0, 8.0, 100.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-5, 0.1])
def test_a_budget_is_used_and_never_exceeded(epsilon: float, delta: float) -> None:
    mu = mu_of(epsilon, delta)
    assert delta_of(mu, epsilon) <= delta
    assert delta_of(mu * (1 + 1e-6), epsilon) > delta
    assert epsilon_of(mu, delta) == pytest.approx(epsilon, abs=1e-6)


def test_what_is_private_enough_without_noise_needs_no_epsilon() -> None:
    assert epsilon_of(1e-7, 1e-5) == 0.0


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100.0), st.floats(0.1, 30.0))
def test_no_image_moves_a_step_by_more_than_one(seed: int, scale: float, length: float) -> None:
    rng = np.random.default_rng(seed)
    weights = scale * rng.normal(size=(4, 6))
    features = length * rng.normal(size=(9, 6))
    classes = np.eye(4)[rng.integers(4, size=9)]
    prior = rng.normal(size=4)
    whole = clipped_gradient(weights, features, classes, prior)
    without = clipped_gradient(weights, features[1:], classes[1:], prior)
    assert np.linalg.norm(whole - without) <= 1 + 1e-9


def test_a_gradient_that_need_not_be_cut_is_autograds() -> None:
    """And one that is longer is cut to the length of its features, here 1."""
    features = RNG.normal(size=(60, 5))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    labels, prior = RNG.integers(3, size=60), np.log(np.array([0.05, 0.25, 0.7]))
    start = RNG.normal(size=(3, 5))
    each = []
    for feature, label in zip(features, labels, strict=True):
        weights = torch.from_numpy(start).requires_grad_()
        logits = weights @ torch.from_numpy(feature) + torch.from_numpy(prior)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(label))
        (gradient,) = torch.autograd.grad(loss, weights)
        each.append(gradient.numpy())
    lengths = np.array([np.linalg.norm(gradient) for gradient in each])
    assert 0 < (lengths > 1).sum() < 60
    classes = np.eye(3)[labels]
    found = [
        clipped_gradient(start, features[i : i + 1], classes[i : i + 1], prior) for i in range(60)
    ]
    for gradient, cut, length in zip(each, found, lengths, strict=True):
        np.testing.assert_allclose(cut, gradient / max(length, 1.0), atol=1e-12)
    np.testing.assert_allclose(
        clipped_gradient(start, features, classes, prior), np.sum(found, axis=0), atol=1e-12
    )


def test_noise_in_all_costs_mu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without images a step is its noise, and counts are theirs: both are read off."""
    mu, drawn = 0.9, []

    def ones(*shape: int) -> np.ndarray:
        drawn.append(shape)
        return np.ones(shape)

    monkeypatch.setattr(privacy, "secure_normal", ones)
    found = released(np.zeros((0, 3)), np.zeros(0, dtype=np.int64), 2, mu)
    of_counts = found.counts_K[0]
    # A step of momentum m moves by the sum of all before it, each weighed by m to its age.
    steps = len(drawn) - 1
    weights, speed = 0.0, 0.0
    for _ in range(steps):
        speed = 0.9 * speed - 1.0
        weights += speed
    of_step = found.weights_KE[0, 0] / weights * 20.0 / 8.0
    assert drawn == [(2,), *[(2, 3)] * steps]
    assert of_counts**-2 + steps * of_step**-2 == pytest.approx(mu**2)


@pytest.mark.parametrize(
    ("mu", "num_images", "steps"),
    [(1.6664, 1153, 44), (0.5021, 287, 12), (0.5021, 1153, 24), (0.1, 20, 5), (9.0, 50_000, 100)],
)
def test_steps_follow_what_is_to_be_seen_in_the_noise(
    mu: float, num_images: int, steps: int
) -> None:
    assert steps_of(mu, num_images) == steps


def test_steps_tell_nothing_that_the_noisy_counts_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of no image at all, but of counts that the noise has made 800."""
    drawn = []

    def much(*shape: int) -> np.ndarray:
        drawn.append(shape)
        return np.full(shape, 400 * math.sqrt(0.05) if len(drawn) == 1 else 0.0)

    monkeypatch.setattr(privacy, "secure_normal", much)
    found = released(np.zeros((0, 3)), np.zeros(0, dtype=np.int64), 2, 1.0)
    np.testing.assert_allclose(found.counts_K, [400, 400])
    assert len(drawn) - 1 == steps_of(1.0, 800) == 28


def test_noise_is_normal_and_comes_from_no_seed() -> None:
    np.random.seed(0)  # noqa: NPY002 - the seed that it must not come from
    torch.manual_seed(0)
    first = secure_normal(20_000)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    second = secure_normal(20_000)
    assert not (first == second).any()
    assert kstest(np.concatenate((first, second)), "norm").pvalue > 1e-6
    assert secure_normal(2, 3).shape == (2, 3)


def test_a_linear_layer_is_learned_where_noise_is_small() -> None:
    labels = RNG.integers(3, size=600)
    features = np.eye(3)[labels] + 0.3 * RNG.normal(size=(600, 3))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    right = {}
    for mu in (0.005, 5.0):
        found = released(features, labels, 3, mu)
        right[mu] = ((features @ found.weights_KE.T).argmax(axis=1) == labels).mean()
        assert found.num_examples >= 1
    assert right[5.0] > 0.95
    assert abs(released(features, labels, 3, 5.0).num_examples - 600) < 20
    assert released(features, labels, 3, 5.0).weights_KE.shape == (3, 3)
