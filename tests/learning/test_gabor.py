"""The fixed features of private clients: whitened as their definition says."""

from __future__ import annotations

import math

import pytest
import torch

from fedzge_flwr.learning.models import gabor
from fedzge_flwr.learning.models.catalogue import model_ways
from fedzge_flwr.learning.models.gabor import GaborLinear


@pytest.mark.parametrize("shape", [(1, 28, 28), (2, 12, 16)])
def test_whitening_is_by_singular_values_on_noise(shape: tuple[int, int, int]) -> None:
    """Of all noise at once: how it is taken in parts, and by which routine, does not matter."""
    model = GaborLinear(shape, 3)
    raw_SD = gabor._raw(gabor._natural_noise(gabor._SAMPLES, shape), model.filters).double()
    _, values_E, directions_ED = torch.linalg.svd(raw_SD - raw_SD.mean(dim=0), full_matrices=False)
    kept = model.whitening.shape[1]
    deviations_E = values_E[:kept] / math.sqrt(gabor._SAMPLES)
    deviations_E = deviations_E + gabor._FLOOR * deviations_E[0]
    expected = (directions_ED[:kept].T / deviations_E.pow(gabor._WHITENED)).float()
    x = gabor._natural_noise(40, shape)[20:]
    features = torch.nn.functional.normalize(
        (gabor._raw(x, model.filters) - model.mean) @ expected, dim=1
    )
    # Directions have no sign.
    found = model.features(x)
    assert torch.allclose(found @ found.T, features @ features.T, atol=1e-4)
    assert torch.allclose(found.norm(dim=1), torch.ones(20))


def test_features_are_those_of_the_shape_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        one = GaborLinear((1, 8, 8), 3)
        gabor._whitened.cache_clear()
        torch.manual_seed(6)
        assert torch.equal(one.whitening, GaborLinear((1, 8, 8), 5).whitening)


def test_it_is_made_without_values_and_filled() -> None:
    """A client fills an empty model for each message."""
    gabor._whitened.cache_clear()
    ways = model_ways("gabor-linear", (1, 8, 8), 3)
    assert ways.empty is not None
    assert all(tensor.is_meta for tensor in ways.empty.state_dict().values())


def test_models_of_a_shape_share_no_memory() -> None:
    one, other = GaborLinear((1, 8, 8), 3), GaborLinear((1, 8, 8), 3)
    one.whitening.zero_()
    assert other.whitening.any()
    assert GaborLinear((1, 8, 8), 3).whitening.any()
