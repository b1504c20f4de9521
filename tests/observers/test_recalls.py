"""Figures by class against what is counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.observers.recalls import Recalls

LABELS = np.array([0, 0, 0, 0, 1, 1, 3])
"""No image of class 2."""
CENTRAL = [0, 1, 1, 2, 1, 1, 0]
ENSEMBLE = [0, 0, 1, 0, 1, 3, 0]


def logits_of(classes: list[int], num_classes: int = 4) -> FloatArray:
    return 3 * np.eye(num_classes, dtype=np.float32)[classes] - 5


def test_recalls_and_confusion() -> None:
    found = Recalls.of(LABELS, 4, CENTRAL, logits_of(ENSEMBLE))
    assert found.central_recalls == (0.25, 1.0, None, 0.0)
    assert found.ensemble_recalls == (0.75, 0.5, None, 0.0)
    # By the ensemble's class, and within it by the central model's.
    assert found.confusion == ((2, 1, 1, 0), (0, 2, 0, 0), (0, 0, 0, 0), (0, 1, 0, 0))


@pytest.mark.parametrize("central", [True, False])
@pytest.mark.parametrize("ensemble", [True, False])
def test_what_is_not_known_is_left_out(central: bool, ensemble: bool) -> None:
    logits = logits_of(ENSEMBLE) if ensemble else None
    found = Recalls.of(LABELS, 4, CENTRAL if central else None, logits)
    assert bool(found.central_recalls) == central
    assert bool(found.ensemble_recalls) == ensemble
    assert bool(found.confusion) == (central and ensemble)


@pytest.mark.parametrize(
    ("central", "logits", "complaint"),
    [
        (CENTRAL[:6], None, "6 classes of 7 test images"),
        (None, logits_of(ENSEMBLE[:6]), "6 classes of 7 test images"),
        ([4, *CENTRAL[1:]], None, "a class that is not one of 4"),
        ([-1, *CENTRAL[1:]], None, "a class that is not one of 4"),
    ],
)
def test_what_does_not_fit(central: Any, logits: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Recalls.of(LABELS, 4, central, logits)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"central_recalls": (0.5,), "ensemble_recalls": (0.5, 0.5)}, "different numbers"),
        ({"central_recalls": (0.5,), "confusion": ((1, 0), (0, 1))}, "different numbers"),
        ({"confusion": ((1, 0), (0,))}, "different numbers"),
        ({"central_recalls": (1.5,)}, "not in"),
        ({"confusion": ((-1,),)}, "below 0"),
    ],
)
def test_what_is_no_figure(values: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Recalls(**values)
