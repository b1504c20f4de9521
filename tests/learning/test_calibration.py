"""How sure a model may be: against known temperatures and a closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fedzge_flwr import best_scale, fitted_scale, losses_by_scale


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


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0, 8.0])
def test_clients_together_find_the_scale_of_all_their_labels(scale: float) -> None:
    """Clients of very unlike numbers of images, by their losses alone."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 5)) / scale
    drawn = (scale * logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    bounds = [0, 3, 500, 8_000, 20_000]
    parts = [slice(*both) for both in itertools.pairwise(bounds)]
    losses = [losses_by_scale(logits[part], drawn[part]) for part in parts]
    pooled = np.average(losses, axis=0, weights=np.diff(bounds))
    np.testing.assert_allclose(pooled, losses_by_scale(logits, drawn))
    assert best_scale(list(pooled)) == pytest.approx(scale, rel=0.05)


def test_two_classes_have_a_closed_form_at_clients() -> None:
    """As above; of the labels, 0.005 are drawn by lot."""
    margin, p = 0.7, 0.9
    logits = np.tile([margin, 0.0], (100, 1))
    found = best_scale(losses_by_scale(logits, np.repeat([0, 1], [90, 10])))
    share = 0.995 * p + 0.0025
    assert found == pytest.approx(math.log(share / (1 - share)) / margin, rel=5e-3)


def test_scales_at_the_ends() -> None:
    """A model that is always right, and one that is always wrong."""
    logits, right = np.tile([0.01, 0.0], (9, 1)), np.zeros(9, dtype=np.int64)
    assert best_scale(losses_by_scale(logits, right)) == 64
    assert best_scale(losses_by_scale(logits, 1 - right)) == 0.25
    sure = best_scale(losses_by_scale(100 * logits, right))
    assert sure == pytest.approx(math.log(0.9975 / 0.0025), rel=0.01)


@pytest.mark.parametrize("losses", [[], [1.0] * 32, [math.nan] * 33, [[1.0] * 33]])
def test_other_numbers_are_refused(losses: list[float]) -> None:
    with pytest.raises(ValueError, match="33 finite numbers"):
        best_scale(losses)
