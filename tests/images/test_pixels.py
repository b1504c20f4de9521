"""Levels and the values that they stand for, alike in NumPy and in torch."""

from __future__ import annotations

import numpy as np
import torch

from fedzge_flwr.images.pixels import PIXEL_RANGE, from_levels, to_levels

LEVELS = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)


def test_levels_are_torchs_bit_for_bit() -> None:
    values = from_levels(LEVELS)
    assert values.dtype == np.float32
    assert np.array_equal(values, PIXEL_RANGE.from_uint8(torch.from_numpy(LEVELS)).numpy())
    assert (values.min(), values.max()) == (PIXEL_RANGE.low, PIXEL_RANGE.high)
    assert np.array_equal(to_levels(values), LEVELS)
    assert np.array_equal(PIXEL_RANGE.to_uint8(torch.from_numpy(values)).numpy(), LEVELS)


def test_values_go_to_the_nearest_level_and_stay_within() -> None:
    values = from_levels(LEVELS)
    for off in (-0.49, -1e-3, 1e-3, 0.49):
        moved = values + np.float32(off * PIXEL_RANGE.step)
        assert np.array_equal(to_levels(moved), LEVELS)
        assert np.array_equal(to_levels(moved.astype(np.float64)), LEVELS)
        assert np.array_equal(PIXEL_RANGE.to_uint8(torch.from_numpy(moved)).numpy(), LEVELS)
    beyond = np.array([-50.0, -1.01, 1.01, 50.0])
    assert to_levels(beyond).tolist() == [0, 0, 255, 255]
    assert PIXEL_RANGE.to_uint8(torch.from_numpy(beyond)).tolist() == [0, 0, 255, 255]
