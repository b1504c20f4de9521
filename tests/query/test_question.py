"""A question is the same images on both sides, bit for bit, whatever way it came."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from fedzge_flwr.images.pixels import from_levels
from fedzge_flwr.query.copies import Differences, num_copies, num_queries
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Queries, Question, image_digest
from tests.helpers.asked import copies_of

SHAPE = (2, 5, 4)
BOTH = pytest.mark.parametrize("differences", get_args(Differences))


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def question(
    *, differences: Differences = "forward", perturbed: int = 3, num_directions: int = 2
) -> Question:
    directions = Directions.written_out(floats(num_directions, perturbed, *SHAPE, seed=1))
    return Question(floats(7, *SHAPE), directions, 0.037, differences)


@BOTH
def test_images_are_those_that_the_estimator_chose(differences: Differences) -> None:
    asked = question(differences=differences)
    chosen = asked.about(asked.base_NCHW[:3])
    copies = copies_of(chosen)
    assert asked.copies == len(copies) == num_copies(2, differences)
    assert np.array_equal(chosen.images_BCHW, copies.flatten(0, 1).numpy())
    assert np.array_equal(
        asked.images_BCHW, np.concatenate((chosen.images_BCHW, asked.base_NCHW[3:]))
    )
    assert asked.num_images == len(asked.images_BCHW) == num_queries(7, 3, asked.copies)
    assert np.array_equal(asked.images_BCHW[asked.base_rows_N], asked.base_NCHW)


@pytest.mark.parametrize(("perturbed", "num_directions"), [(0, 0), (7, 0), (7, 3)])
def test_questions_without_others_or_without_copies(perturbed: int, num_directions: int) -> None:
    asked = question(perturbed=perturbed, num_directions=num_directions)
    assert asked.num_images == 7 + perturbed * num_directions
    assert np.array_equal(asked.images_BCHW[asked.base_rows_N], asked.base_NCHW)


def test_digest_tells_base_images_apart() -> None:
    asked = question()
    other_directions = question(differences="central")
    assert asked.digest == other_directions.digest
    changed = asked.base_NCHW.copy()
    changed[6, 1, 4, 3] += 1e-6
    reshaped = asked.base_NCHW.reshape(7, 2, 4, 5)
    digests = {
        Question(base, asked.directions, 0.1).digest
        for base in (asked.base_NCHW, changed, reshaped)
    }
    assert len(digests) == 3
    assert asked.digest == image_digest(asked.base_NCHW)


def test_fingerprint_tells_apart_all_that_is_asked() -> None:
    asked = question()
    payload, seeded = asked.directions.payload_QGP, Directions.from_seed(2, 3, SHAPE, 1)
    flipped = payload.copy()
    flipped[1, 2, 0] ^= 1
    others = [
        asked.about(asked.base_NCHW[::-1]),
        Question(asked.base, Directions(flipped, SHAPE), asked.eps),
        Question(asked.base, seeded, asked.eps),
        Question(asked.base, Directions.from_seed(2, 3, SHAPE, 2), asked.eps),
        Question(asked.base, Directions.from_seed(3, 2, SHAPE, 1), asked.eps),
        Question(asked.base, asked.directions, 0.038),
        question(differences="central"),
    ]
    assert len({asked.fingerprint, *(other.fingerprint for other in others)}) == 8
    assert question().fingerprint == asked.fingerprint


def test_levels_are_asked_about_as_the_floats_that_they_stand_for() -> None:
    levels = np.random.default_rng(2).integers(256, size=(7, *SHAPE), dtype=np.uint8)
    asked, as_floats = question().about(levels), question().about(from_levels(levels))
    assert asked.base_NCHW.dtype == np.float32
    assert np.array_equal(asked.images_BCHW, as_floats.images_BCHW)
    # What is kept by its digest is levels on one side and floats on the other: never confused.
    assert asked.digest != as_floats.digest


def test_answers_on_copies_are_those_of_the_perturbed_images() -> None:
    asked = question()
    answers = asked.images_BCHW.reshape(asked.num_images, -1)
    copies = copies_of(asked.about(asked.base_NCHW[:3])).flatten(2).numpy()
    assert np.array_equal(asked.of_perturbed(answers), copies)
    nothing = Question.unperturbed(asked.base)
    assert nothing.num_images == 7
    assert nothing.of_perturbed(answers[:7]).shape == (1, 0, 40)


@BOTH
def test_slopes_of_arrays_and_of_tensors(differences: Differences) -> None:
    """A linear function's slope along u is its value at u, from one side and from both."""
    asked = question(differences=differences, perturbed=7)
    weights = np.random.default_rng(3).normal(size=(40, 10))
    values = asked.of_perturbed(asked.images_BCHW.reshape(asked.num_images, 40) @ weights)
    slopes = asked.slopes(values)
    assert isinstance(slopes, np.ndarray)
    assert slopes.shape == (2, 7, 10)
    wanted = asked.directions_QNCHW.reshape(2, 7, 40) @ weights
    # Of images in float32: their rounding, divided by ε.
    np.testing.assert_allclose(slopes, wanted, atol=1e-4)
    of_tensor = asked.slopes(torch.from_numpy(values))
    assert isinstance(of_tensor, torch.Tensor)
    assert np.array_equal(of_tensor.numpy(), slopes)


def test_estimators_from_outside_know_a_question_by_its_old_name() -> None:
    assert Queries is Question
