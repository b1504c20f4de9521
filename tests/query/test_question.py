"""A question is the same images on both sides, bit for bit, whatever way it came."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question, from_levels, num_copies, num_queries, to_levels
from fedzge_flwr.zeroth_order.base import Queries

SHAPE = (2, 5, 4)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def question(*, two_sided: bool = False, perturbed: int = 3, num_directions: int = 2) -> Question:
    directions = Directions.written_out(floats(num_directions, perturbed, *SHAPE, seed=1))
    return Question(floats(7, *SHAPE), directions, 0.037, two_sided)


@pytest.mark.parametrize("two_sided", [False, True])
def test_images_are_those_that_the_estimator_chose(two_sided: bool) -> None:
    asked = question(two_sided=two_sided)
    queries = Queries(
        torch.from_numpy(asked.base_NCHW[:3]),
        asked.directions,
        asked.eps,
        "central" if two_sided else "forward",
    )
    copies = queries.images_BNCHW.flatten(0, 1).numpy()
    assert asked.copies == len(queries.images_BNCHW) == num_copies(2, two_sided=two_sided)
    assert np.array_equal(asked.images_BCHW, np.concatenate((copies, asked.base_NCHW[3:])))
    assert asked.num_images == len(asked.images_BCHW) == num_queries(7, 3, asked.copies)
    assert np.array_equal(asked.images_BCHW[asked.base_rows_N], asked.base_NCHW)


@pytest.mark.parametrize(("perturbed", "num_directions"), [(0, 0), (7, 0), (7, 3)])
def test_questions_without_others_or_without_copies(perturbed: int, num_directions: int) -> None:
    asked = question(perturbed=perturbed, num_directions=num_directions)
    assert asked.num_images == 7 + perturbed * num_directions
    assert np.array_equal(asked.images_BCHW[asked.base_rows_N], asked.base_NCHW)


def test_digest_tells_base_images_apart() -> None:
    asked = question()
    other_directions = question(two_sided=True)
    assert asked.digest == other_directions.digest
    changed = asked.base_NCHW.copy()
    changed[6, 1, 4, 3] += 1e-6
    reshaped = asked.base_NCHW.reshape(7, 2, 4, 5)
    digests = {
        Question(base, asked.directions, 0.1, two_sided=False).digest
        for base in (asked.base_NCHW, changed, reshaped)
    }
    assert len(digests) == 3


def test_levels_are_torchs_bit_for_bit() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    values = from_levels(levels)
    assert np.array_equal(values, PIXEL_RANGE.from_uint8(torch.from_numpy(levels)).numpy())
    assert np.array_equal(to_levels(values), levels)
    with pytest.raises(ValueError, match="not on the 256 levels"):
        to_levels(values + np.float32(1e-3))
