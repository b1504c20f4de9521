"""A small convolutional network for quick runs."""

from __future__ import annotations

from torch import Tensor, nn

_SLOPE = 0.1
"""Of the hidden linear layer's units below 0 (Maas et al., 2013, "Rectifier nonlinearities")."""


class SmallCNN(nn.Module):
    """Two 3×3 convolutions (32 and 64 channels, 2×2 max-pool, batch norm) and two linear layers.

    Parameters
    ----------
    image_shape : tuple of int
        (C, H, W), H and W at least 4.
    num_classes : int
        Number of logits K.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.features = nn.Sequential(
            *self._block(channels, 32),
            *self._block(32, 64),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 128),
            # Adam's first steps move the sum over so many inputs far: units of a client that has
            # few classes would be 0 everywhere from then on, and learn nothing of the others.
            nn.LeakyReLU(_SLOPE),
            nn.Linear(128, num_classes),
        )

    @staticmethod
    def _block(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
        return (
            nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
            # Before batch norm and ReLU, which then work on a quarter of the values.
            nn.MaxPool2d(2),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
        )

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        logits_NK: Tensor = self.classifier(self.features(images_NCHW))
        return logits_NK
