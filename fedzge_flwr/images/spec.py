"""What is known of a data set without opening it: its classes and the shape of its images.

The server builds the generator and the central model from this and never imports data loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedzge_flwr.common.registry import Registry

_AXES = 3


@dataclass(frozen=True)
class DatasetSpec:
    """A labelled set of images.

    Parameters
    ----------
    num_classes : int
        Number of classes K; labels are 0 … K-1.
    image_shape : tuple of int
        (C, H, W): 1 channel for grey or 3 for RGB, height and width in pixels.
    """

    num_classes: int
    image_shape: tuple[int, int, int]


def shape_of(given: Any) -> tuple[int, int, int] | None:
    """Return a shape as three numbers from 1, of a list or `torch.Size` too; None if it is none."""
    numbers = tuple(given) if isinstance(given, Sequence) else ()
    whole = all(hasattr(number, "__index__") and number >= 1 for number in numbers)
    if len(numbers) != _AXES or not whole:
        return None
    channels, height, width = (int(number) for number in numbers)
    return channels, height, width


DATASETS: Registry[DatasetSpec] = Registry(
    {
        "digits": DatasetSpec(10, (1, 8, 8)),
        "mnist": DatasetSpec(10, (1, 28, 28)),
        "fashionmnist": DatasetSpec(10, (1, 28, 28)),
        "emnist": DatasetSpec(26, (1, 28, 28)),
        "cifar10": DatasetSpec(10, (3, 32, 32)),
        "cifar100": DatasetSpec(100, (3, 32, 32)),
        "svhn": DatasetSpec(10, (3, 32, 32)),
        "food101": DatasetSpec(101, (3, 64, 64)),
        "tinyimagenet": DatasetSpec(200, (3, 64, 64)),
    }
)
"""Data sets by name, as the setting ``dataset`` has them; one from outside is added here."""

OWN = "own"
"""The data set of a federation whose clients all bring their own images, of a declared shape."""

WITHOUT_FILES = frozenset({OWN, "digits"})
"""Data sets of which there is nothing in ``data-dir``."""
