"""Patterns, and their evolution: by an independent formula, by seeds, and that it finds."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.synthesis.evolution import evolve, margins
from fedzge_flwr.synthesis.memory import Memory
from fedzge_flwr.synthesis.patterns import draw_codes, inherited, mutated, render

LENGTHS = {1: 60 + 144 + 12 + 1 + 3, 3: 60 + 144 + 36 + 3 + 3}


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixel(code: np.ndarray, channels: int, row: int, column: int, side: int) -> list[float]:
    """One pixel by loops over units, in float64: -1 is black and 1 is white."""
    first, second = code[:60].reshape(5, 12), code[60:204].reshape(12, 12)
    last = code[204 : 204 + 12 * channels].reshape(12, channels)
    *offset, contrast, colour, mirror = code[204 + 12 * channels :]
    y, x = (2 * (place + 0.5) / side - 1 for place in (row, column))
    square = max(abs(x), abs(y))
    x = 1.5 * abs(x) if mirror < 0.5 else x
    given = [x, y, math.hypot(x, y), square, 1.0]
    kinds = [
        math.sin,
        math.tanh,
        lambda v: 2 * math.exp(-v * v) - 1,
        lambda v: min(abs(v), 3.0) - 1,
    ]

    def layer(inputs: list[float], weights: np.ndarray) -> list[float]:
        sums = [sum(a * w for a, w in zip(inputs, weights[:, j], strict=True)) for j in range(12)]
        return [kinds[j // 3](value) for j, value in enumerate(sums)]

    hidden = layer(layer(given, first), second)
    values = [
        sum(h * w for h, w in zip(hidden, last[:, c], strict=True)) + offset[c]
        for c in range(channels)
    ]
    grey = sum(values) / channels
    return [math.tanh(math.exp(contrast) * (grey + colour * (value - grey))) for value in values]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pattern_is_its_network_of_the_coordinates(channels: int) -> None:
    codes = draw_codes(3, channels, stream(5))
    assert codes.shape == (3, LENGTHS[channels])
    x_NCHW = render(codes, (channels, 6, 6))
    for number, code in enumerate(codes.double().numpy()):
        for row, column in ((0, 0), (2, 5), (5, 1)):
            wanted = PIXEL_RANGE.from_unit(
                torch.tensor(pixel(code, channels, row, column, 6), dtype=torch.float64)
            )
            found = x_NCHW[number, :, row, column].double()
            torch.testing.assert_close(found, wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 10, 14), (2, 9, 9)])
def test_patterns_are_diverse_in_range_and_a_function_of_the_stream(
    shape: tuple[int, int, int],
) -> None:
    first, again, other = (render(draw_codes(60, shape[0], stream(n)), shape) for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (60, *shape)
    assert first.dtype == torch.float32
    assert float(first.min()) >= PIXEL_RANGE.low
    assert float(first.max()) <= PIXEL_RANGE.high
    assert float(first.mean(dim=(1, 2, 3)).std()) > 0.2
    assert render(draw_codes(0, shape[0], stream()), shape).shape == (0, *shape)


def test_an_image_does_not_depend_on_those_beside_it() -> None:
    codes = draw_codes(450, 1, stream())
    together = render(codes, (1, 8, 8))
    alone = torch.cat([render(code[None], (1, 8, 8)) for code in codes[[0, 199, 200, 449]]])
    torch.testing.assert_close(together[[0, 199, 200, 449]], alone, atol=1e-5, rtol=0)


def test_half_of_the_patterns_are_mirrored() -> None:
    codes = draw_codes(300, 1, stream())
    x_NCHW = render(codes, (1, 8, 8))
    own_mirror = (x_NCHW - x_NCHW.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert own_mirror[codes[:, -1] < 0.5].all()
    assert 0.4 < float(own_mirror.double().mean()) < 0.6


def test_colour_is_how_far_channels_differ() -> None:
    codes = draw_codes(20, 3, stream())
    codes[:, -2] = 0.0
    grey = render(codes, (3, 8, 8))
    assert float((grey - grey[:, :1]).abs().max()) < 1e-6
    codes[:, -2] = 1.0
    assert float((render(codes, (3, 8, 8)) - grey).abs().mean()) > 0.05


def test_a_mutation_is_as_large_as_its_step() -> None:
    codes = draw_codes(200, 1, stream())
    x_NCHW = render(codes, (1, 8, 8))
    moved = []
    for step in (0.001, 0.05, 0.5):
        children = mutated(codes, torch.full((200,), step), 1, stream(1))
        moved.append(float((render(children, (1, 8, 8)) - x_NCHW).abs().mean()))
        # What is no weight stays: colour and mirror.
        assert torch.equal(children[:, -2:], codes[:, -2:])
        spread = ((children - codes)[:, :60].std(dim=1) / codes[:, :60].std(dim=1)).mean()
        assert float(spread) == pytest.approx(step, rel=0.05)
    assert moved[0] < 0.01 < moved[1] < moved[2] / 3


def test_a_cross_has_each_block_from_one_parent() -> None:
    first, second = draw_codes(400, 1, stream(1)), draw_codes(400, 1, stream(2))
    crossed = torch.arange(400) < 200
    children = inherited(first, second, crossed, 1, stream(3))
    assert torch.equal(children[200:], first[200:])
    ends = [0, 60, 204, 216, 217, 218, 219, 220]
    for start, end in pairwise(ends):
        block = slice(start, end)
        of_first = (children[:200, block] == first[:200, block]).all(dim=1)
        of_second = (children[:200, block] == second[:200, block]).all(dim=1)
        assert (of_first ^ of_second).all()
        assert 70 < int(of_second.sum()) < 130


def test_a_margin_is_over_the_best_other_class() -> None:
    logits = torch.randn(50, 4, generator=stream())
    wanted = torch.stack(
        [
            torch.stack([row[k] - torch.cat((row[:k], row[k + 1 :])).max() for k in range(4)])
            for row in logits
        ]
    )
    assert torch.equal(margins(logits), wanted)
    tied = margins(torch.tensor([[2.0, 2.0, 0.0]]))
    assert tied.tolist() == [[0.0, 0.0, -2.0]]


def ring_logits(x_NCHW: Tensor) -> Tensor:
    """A black box: class 1 is a bright ring on a dark ground, which hardly any pattern is."""
    height, width = x_NCHW.shape[2:]
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    ring = ((x.square() + y.square()).sqrt() - 0.6).abs() < 0.2
    unit = (x_NCHW.mean(dim=1) - PIXEL_RANGE.low) / (PIXEL_RANGE.high - PIXEL_RANGE.low)
    likeness = unit[:, ring].mean(dim=1) - unit[:, ~ring].mean(dim=1)
    return 20 * torch.stack((torch.full_like(likeness, 0.5), likeness), dim=1)


def test_evolution_finds_what_new_patterns_hardly_show() -> None:
    """With the queries of 2,400 new patterns, a dozen generations come nearer than any of them."""
    shape = (1, 12, 12)
    blind = ring_logits(render(draw_codes(2400, 1, stream(1)), shape))
    assert float((blind.argmax(dim=1) == 1).double().mean()) < 0.01
    archive = Memory(10_000)
    codes = draw_codes(200, 1, stream(2))
    for generation in range(12):
        archive.add(codes, ring_logits(render(codes, shape)))
        codes = evolve(archive, 200, 1, stream(10 + generation))
    last = ring_logits(render(codes, shape))
    assert float((last.argmax(dim=1) == 1).double().mean()) > 0.3
    assert float(margins(last)[:, 1].max()) > float(margins(blind)[:, 1].max())


def test_children_are_new_and_a_function_of_the_stream() -> None:
    archive = Memory(100)
    codes = draw_codes(60, 3, stream())
    archive.add(codes, ring_logits(render(codes, (3, 8, 8))))
    first, again, other = (evolve(archive, 50, 3, stream(n)) for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (50, LENGTHS[3])
    assert not (first[:, None] == codes[None]).all(dim=2).any()


def test_one_code_is_enough_to_evolve_from() -> None:
    archive = Memory(100)
    archive.add(draw_codes(1, 1, stream()), torch.zeros(1, 5))
    assert torch.isfinite(evolve(archive, 20, 1, stream())).all()
