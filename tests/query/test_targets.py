"""Targets are the ensemble's logits on a question's base images, whatever these travel as."""

from __future__ import annotations

import numpy as np
import pytest

from fedzge_flwr.images.pixels import from_levels
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question, image_digest
from fedzge_flwr.query.targets import Targets

SHAPE = (1, 4, 4)
LEVELS = np.random.default_rng(0).integers(256, size=(6, *SHAPE), dtype=np.uint8)
LOGITS = np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32)


@pytest.mark.parametrize("base", [LEVELS, from_levels(LEVELS)], ids=["levels", "floats"])
def test_targets_are_on_base_images_as_they_were_asked_about(base: np.ndarray) -> None:
    question = Question(base, Directions.from_seed(2, 4, SHAPE, 1), 0.1)
    targets = Targets.on(question, 3, LOGITS, 1.5)
    assert (targets.round, targets.temperature) == (3, 1.5)
    assert targets.images is base
    assert targets.digest == question.digest == image_digest(base)
    assert targets.images_NCHW.dtype == np.float32
    assert np.array_equal(targets.images_NCHW, from_levels(LEVELS))
    assert np.array_equal(targets.logits_NK, LOGITS)


def test_no_targets_are_those_of_no_round() -> None:
    nothing = Targets.none(SHAPE, 3)
    assert (nothing.round, nothing.digest) == (0, "")
    assert (nothing.images.shape, nothing.images.dtype) == ((0, *SHAPE), np.uint8)
    assert (nothing.logits_NK.shape, nothing.logits_NK.dtype) == ((0, 3), np.float32)
    assert nothing.images_NCHW.shape == (0, *SHAPE)
    # The wire takes no temperature of 0.
    assert nothing.temperature > 0
