"""Sources that surprise are asked for more: by a closed form, by sums, and in whole rounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fedzge_flwr.synthesis.favour import favoured, noted, surprises


class Even(nn.Module):
    """Foresees both classes alike."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return torch.zeros(len(x_NCHW), 2)


def test_surprise_is_the_mean_divergence_of_each_sources_answers() -> None:
    """From an even expectation: log 2 less the entropy of what was answered."""
    probability_N = torch.tensor([0.5, 0.5, 0.9, 0.7, 0.999])
    logits_NK = torch.stack((probability_N.log(), (1 - probability_N).log()), dim=1)
    levels = torch.zeros(5, 1, 4, 4, dtype=torch.uint8)
    found = surprises(Even(), levels, logits_NK, {"a": 2, "b": 2, "none": 0, "c": 1})

    def divergence(p: float) -> float:
        return math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)

    assert list(found) == ["a", "b", "c"]
    assert found["a"] == pytest.approx(0.0, abs=1e-6)
    assert found["b"] == pytest.approx((divergence(0.9) + divergence(0.7)) / 2, rel=1e-4)
    assert found["c"] == pytest.approx(divergence(0.999), rel=1e-3)


def test_running_means_begin_with_the_first_and_forget_none() -> None:
    first = noted({}, {"a": 1.0, "b": 2.0})
    assert first == {"a": 1.0, "b": 2.0}
    second = noted(first, {"a": 2.0, "c": 5.0})
    assert second == pytest.approx({"a": 1.3, "b": 2.0, "c": 5.0})
    assert first == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("counts", "surprised", "power", "wanted"),
    [
        # A fifth of each count stays; of the other 80 images 8/9 and 1/9.
        ({"a": 50, "b": 50}, {"a": 0.4, "b": 0.2}, 3.0, {"a": 82, "b": 18}),
        ({"a": 50, "b": 50}, {"a": 0.4, "b": 0.2}, 0.0, {"a": 50, "b": 50}),
        # Counts weigh too.
        ({"a": 20, "b": 80}, {"a": 0.2, "b": 0.2}, 3.0, {"a": 20, "b": 80}),
        # What has not been judged yet, or never surprises, leaves all as it is.
        ({"a": 50, "b": 50}, {"a": 0.4}, 3.0, {"a": 50, "b": 50}),
        ({"a": 50, "b": 50}, {"a": 0.4, "b": 0.0}, 3.0, {"a": 50, "b": 50}),
        ({}, {}, 3.0, {}),
        ({"a": 0, "b": 7}, {"b": 0.1}, 3.0, {"a": 0, "b": 7}),
        # So small that its power is 0 in floating point.
        ({"a": 50, "b": 50}, {"a": 1e-200, "b": 1e-300}, 3.0, {"a": 90, "b": 10}),
    ],
)
def test_a_round_is_divided_by_surprise(
    counts: dict[str, int], surprised: dict[str, float], power: float, wanted: dict[str, int]
) -> None:
    assert favoured(counts, surprised, power) == wanted


def test_dividing_makes_neither_more_nor_fewer() -> None:
    stream = torch.Generator().manual_seed(0)
    for _ in range(300):
        names = "abcd"[: 1 + int(torch.randint(4, (1,), generator=stream))]
        counts = {n: int(torch.randint(0, 30, (1,), generator=stream)) for n in names}
        surprised = {n: float(torch.rand(1, generator=stream)) for n in names}
        found = favoured(counts, surprised, 3.0)
        assert list(found) == list(counts)
        assert sum(found.values()) == sum(counts.values())
        for name, count in counts.items():
            assert found[name] >= int(0.2 * count)
            assert count or not found[name]
