"""Contract of every registered estimator and distribution of directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedzge_flwr.losses import LossTerms
from fedzge_flwr.zeroth_order import DIRECTIONS, ESTIMATORS, Estimator, LossFn

N, SHAPE, K = 3, (1, 2, 2), 4
D = 4


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_terms(total: Tensor) -> LossTerms:
    zero = torch.zeros_like(total)
    return LossTerms(zero, zero, zero, zero, total)


@pytest.fixture(params=sorted(DIRECTIONS))
def directions(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(ESTIMATORS))
def estimator_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, *SHAPE, generator=stream(1), dtype=torch.float64)


def make(name: str, directions: str, q: int = 2, eps: float = 1e-4) -> Estimator:
    return ESTIMATORS[name](DIRECTIONS[directions], q, eps)


def mean_estimate(
    estimator: Estimator, x: Tensor, black_box: Tensor, loss_fn: LossFn, draws: int
) -> Tensor:
    total = torch.zeros_like(x)
    rng = stream(5)
    for _ in range(draws):
        queries = estimator.ask(x, rng)
        answers = queries.images_BNCHW.flatten(2) @ black_box.T
        total += estimator.tell(queries, answers, loss_fn).gradient_NCHW
    return total / draws


def linear_problem() -> tuple[Tensor, LossFn]:
    """A linear black box and a loss linear in its answers: forward differences are exact."""
    black_box = torch.randn(K, D, generator=stream(2), dtype=torch.float64)
    weights = torch.randn(N, K, generator=stream(3), dtype=torch.float64)

    def loss_fn(images: Tensor, logits: Tensor) -> LossTerms:
        return as_terms((weights * logits).sum() / N)

    return black_box, loss_fn


def test_unbiased_scale_and_direction_on_a_linear_black_box(
    estimator_name: str, directions: str, x: Tensor
) -> None:
    black_box, loss_fn = linear_problem()
    leaf = x.clone().requires_grad_()
    loss_fn(leaf, leaf.flatten(1) @ black_box.T).total.backward()
    exact = leaf.grad
    assert exact is not None
    draws = 4000
    mean = mean_estimate(make(estimator_name, directions), x, black_box, loss_fn, draws)
    # The estimate's deviation per draw is at most about √(N·d/q)·‖g‖: 2.5·‖g‖ here.
    assert float((mean - exact).norm() / exact.norm()) < 4 * 2.5 / draws**0.5


def test_bias_on_a_quadratic_is_of_the_order_of_eps(
    estimator_name: str, directions: str, x: Tensor
) -> None:
    black_box = torch.eye(D, dtype=torch.float64)

    def loss_fn(images: Tensor, logits: Tensor) -> LossTerms:
        return as_terms((logits**2).sum() / (2 * N))

    exact = x / N
    for eps in (1e-3, 1e-1):
        mean = mean_estimate(
            make(estimator_name, directions, q=2, eps=eps), x, black_box, loss_fn, 4000
        )
        error = float((mean - exact).norm() / exact.norm())
        assert error < 4 * 2.5 / 4000**0.5 + 4 * eps


def test_same_stream_same_queries_and_estimate(
    estimator_name: str, directions: str, x: Tensor
) -> None:
    black_box, loss_fn = linear_problem()
    estimator = make(estimator_name, directions)
    first, again, other = (
        mean_estimate_once(estimator, x, black_box, loss_fn, seed) for seed in (7, 7, 8)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def mean_estimate_once(
    estimator: Estimator, x: Tensor, black_box: Tensor, loss_fn: LossFn, seed: int
) -> Tensor:
    queries = estimator.ask(x, stream(seed))
    return estimator.tell(
        queries, queries.images_BNCHW.flatten(2) @ black_box.T, loss_fn
    ).gradient_NCHW


@pytest.mark.parametrize("q", [1, 5])
def test_asks_exactly_the_declared_queries(
    estimator_name: str, directions: str, x: Tensor, q: int
) -> None:
    estimator = make(estimator_name, directions, q=q)
    queries = estimator.ask(x, stream(0))
    assert queries.images_BNCHW.shape == (estimator.copies, *x.shape)
    assert torch.equal(queries.images_BNCHW[0], x)


def test_directions_have_unit_norm_and_isotropic_covariance(directions: str) -> None:
    u = DIRECTIONS[directions]((4000, 3, *SHAPE), stream(0))
    assert u.dtype == torch.float32
    flat = u.flatten(2)
    torch.testing.assert_close(flat.norm(dim=2), torch.ones(4000, 3), rtol=1e-6, atol=1e-6)
    rows = flat.reshape(-1, D)
    covariance = rows.T @ rows / len(rows)
    assert float((covariance - torch.eye(D) / D).abs().max()) < 0.01
    assert float(rows.mean(0).abs().max()) < 0.02
    # One direction per image, not one for the batch.
    assert not torch.equal(u[0, 0], u[0, 1])


def test_paper_estimator_shares_one_difference_among_the_images(x: Tensor) -> None:
    """ĝ = (d/q) Σⱼ (L(x+εuⱼ) − L(x))/ε · uⱼ: for q = 1 one multiple of u."""
    black_box, loss_fn = linear_problem()
    estimator = make("batch-difference", "sphere", q=1)
    queries = estimator.ask(x, stream(0))
    gradient = estimator.tell(
        queries, queries.images_BNCHW.flatten(2) @ black_box.T, loss_fn
    ).gradient_NCHW
    ratio = gradient / queries.directions_QNCHW[0]
    torch.testing.assert_close(ratio, ratio[0, 0, 0, 0].expand_as(ratio))
    slope = (
        loss_fn(x, queries.images_BNCHW[1].flatten(1) @ black_box.T).total
        - loss_fn(x, x.flatten(1) @ black_box.T).total
    ) / queries.eps
    torch.testing.assert_close(ratio[0, 0, 0, 0], D * slope)
