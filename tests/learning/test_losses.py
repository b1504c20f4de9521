from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedzge_flwr.learning.losses import (
    ObjectiveWeights,
    adversarial_loss,
    distillation_loss,
    diversity_loss,
    fidelity_loss,
    generator_objective,
    information_loss,
)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    shape = (7, 5)
    return tuple(  # type: ignore[return-value]
        3 * torch.randn(shape, generator=stream, dtype=torch.float64) for _ in range(2)
    )


def test_adversarial_is_minus_kl_by_definition(logits: tuple[Tensor, Tensor]) -> None:
    e, s = logits
    p, r = (e / 2.5).softmax(1), (s / 2.5).softmax(1)
    kl = (p * (p.log() - r.log())).sum(1).mean()
    torch.testing.assert_close(adversarial_loss(e, s, 2.5), -kl)


def test_distillation_gradient_at_high_temperature(logits: tuple[Tensor, Tensor]) -> None:
    """Hinton et al., equation 4: for T → ∞ and zero-mean logits the gradient is (s − e)/(N·K)."""
    e, s = (values - values.mean(1, keepdim=True) for values in logits)
    s.requires_grad_()
    distillation_loss(e, s, 1e4).backward()
    torch.testing.assert_close(s.grad, (s - e).detach() / s.numel(), rtol=1e-3, atol=1e-5)


def test_distillation_vanishes_only_at_agreement(logits: tuple[Tensor, Tensor]) -> None:
    e, s = logits
    assert float(distillation_loss(e, e + 3.0, 5.0)) == pytest.approx(0.0, abs=1e-12)
    assert float(distillation_loss(e, s, 5.0)) > 0.01


def test_diversity_equals_the_expanded_pairs() -> None:
    x = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    z = torch.randn(6, 4, dtype=torch.float64)
    pairs = [
        ((x[i] - x[j]) ** 2).mean() * ((z[i] - z[j]) ** 2).mean()
        for i in range(6)
        for j in range(6)
    ]
    torch.testing.assert_close(diversity_loss(x, z), torch.exp(-torch.stack(pairs).mean()))


def test_diversity_gradient_and_memory_free_of_pairs() -> None:
    x = torch.randn(5, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(diversity_loss, (x, z))


@pytest.mark.parametrize("num_classes", [2, 10])
def test_information_range(num_classes: int) -> None:
    certain = 200.0 * torch.eye(num_classes, dtype=torch.float64)
    assert float(information_loss(certain)) == pytest.approx(-math.log(num_classes))
    assert float(information_loss(certain[:1].repeat(4, 1))) == pytest.approx(0.0, abs=1e-9)


def test_information_uses_its_own_mean_probability(logits: tuple[Tensor, Tensor]) -> None:
    mean = logits[0].softmax(1).mean(0)
    torch.testing.assert_close(information_loss(logits[0]), (mean * mean.log()).sum())


def test_objective_is_the_weighted_sum(logits: tuple[Tensor, Tensor]) -> None:
    e, s = logits
    x = torch.randn(7, 1, 2, 2, dtype=torch.float64)
    z = torch.randn(7, 3, dtype=torch.float64)
    y = torch.arange(7) % 5
    terms = generator_objective(x, z, y, e, s, ObjectiveWeights(5.0, 2.0, 3.0, 7.0))
    total = (
        fidelity_loss(e, y)
        + 2 * adversarial_loss(e, s, 5.0)
        + 3 * diversity_loss(x, z)
        + 7 * information_loss(e)
    )
    torch.testing.assert_close(terms["total"], total)
