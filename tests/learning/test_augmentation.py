"""Augmented images against what is done by hand, and their labels' right to stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fedzge_flwr.learning.augmentation import erased, shifted

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 20), (2, 1, 3)]
NUM = 400


def images_of(shape: tuple[int, int, int], num_images: int = NUM) -> Tensor:
    return 2 * torch.rand(num_images, *shape, generator=torch.Generator().manual_seed(1)) - 1


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moved(x_CHW: Tensor, down: int, right: int) -> np.ndarray:
    """Return an image moved by hand, with its edge repeated."""
    _, height, width = x_CHW.shape
    size = max(abs(down), abs(right), 1)
    padded = np.pad(x_CHW.numpy(), ((0, 0), (size, size), (size, size)), mode="edge")
    return padded[:, size + down :, size + right :][:, :height, :width]


@pytest.mark.parametrize("shape", SHAPES)
def test_each_image_is_moved_by_itself_and_no_further(shape: tuple[int, int, int]) -> None:
    x_NCHW = images_of(shape)
    found = shifted(x_NCHW, stream()).numpy()
    assert found.shape == x_NCHW.shape
    down, right = (max(round(side / 14), 1) for side in shape[1:])
    ways = {(a, b): 0 for a in range(-down, down + 1) for b in range(-right, right + 1)}
    for before, after in zip(x_NCHW, found, strict=True):
        fitting = [way for way in ways if np.array_equal(moved(before, *way), after)]
        assert fitting
        ways[fitting[0]] += 1
    if min(shape[1:]) > 3:
        # All ways, about equally often.
        assert min(ways.values()) > 0.4 * NUM / len(ways)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_third_of_each_side_is_covered_in_half_of_the_images(
    shape: tuple[int, int, int],
) -> None:
    x_NCHW = images_of(shape)
    found = erased(x_NCHW, stream())
    _, height, width = shape
    wanted = max(height // 3, 1) * max(width // 3, 1)
    covered = 0
    corners = set()
    for before, after in zip(x_NCHW, found, strict=True):
        changed_CHW = before != after
        if not changed_CHW.any():
            continue
        covered += 1
        assert torch.equal(changed_CHW.all(dim=0), changed_CHW.any(dim=0))
        rows, columns = changed_CHW[0].nonzero(as_tuple=True)
        assert len(rows) == wanted
        assert (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) == wanted
        for channel in after:
            assert len(channel[rows, columns].unique()) == 1
        corners.add((int(rows.min()), int(columns.min())))
    assert covered == pytest.approx(NUM / 2, abs=50)
    assert float(found.abs().max()) <= 1
    places = (height - max(height // 3, 1) + 1) * (width - max(width // 3, 1) + 1)
    assert len(corners) > min(places, 100) / 2


@pytest.mark.parametrize("change", [shifted, erased])
def test_the_stream_decides(change: object) -> None:
    x_NCHW = images_of((1, 28, 28), 20)
    first, again, other = (change(x_NCHW.clone(), stream(seed)) for seed in (0, 0, 1))  # type: ignore[operator]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(x_NCHW, images_of((1, 28, 28), 20))
