"""How sure a model may be: against known temperatures and a closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedzge_flwr import fitted_scale


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, 8.0])
def test_it_is_the_scale_by_which_labels_were_drawn(scale: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 5)) / scale
    drawn = (scale * logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    assert fitted_scale(logits, drawn) == pytest.approx(scale, rel=0.05)


def test_two_classes_have_a_closed_form() -> None:
    """A margin m that is right in a share p of the images: σ(s·m) = p, the one more counted."""
    margin, right, wrong = 0.7, 90, 10
    logits = np.tile([margin, 0.0], (right + wrong, 1))
    labels = np.repeat([0, 1], [right, wrong])
    p = (right + 0.5) / (right + wrong + 1)
    assert fitted_scale(logits, labels) == pytest.approx(math.log(p / (1 - p)) / margin, rel=1e-3)


def test_one_that_is_always_right_stays_finite() -> None:
    logits = np.tile([1.0, 0.0], (9, 1))
    found = fitted_scale(logits, np.zeros(9, dtype=np.int64))
    assert found == pytest.approx(math.log(9.5 / 0.5), rel=1e-3)
    assert 0.1 <= fitted_scale(np.zeros((3, 4)), np.zeros(3, dtype=np.int64)) <= 100
