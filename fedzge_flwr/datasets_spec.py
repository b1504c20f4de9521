"""What is known of a data set without opening it: its classes and the shape of its images.

The server builds the generator and the central model from this and never imports data loading.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DatasetSpec:
    """A labelled set of images.

    Parameters
    ----------
    num_classes : int
        Number of classes K; labels are 0 … K-1.
    channels : int
        1 for grey, 3 for RGB.
    side : int
        Height and width in pixels.
    """

    num_classes: int
    channels: int
    side: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of an image."""
        return (self.channels, self.side, self.side)


DATASETS: dict[str, DatasetSpec] = {
    "digits": DatasetSpec(10, 1, 8),
    "mnist": DatasetSpec(10, 1, 28),
    "fashionmnist": DatasetSpec(10, 1, 28),
    "emnist": DatasetSpec(26, 1, 28),
    "cifar10": DatasetSpec(10, 3, 32),
    "cifar100": DatasetSpec(100, 3, 32),
    "svhn": DatasetSpec(10, 3, 32),
}
