"""Small convolutional networks: for quick runs, and for photographs on a CPU."""

from __future__ import annotations

from torch import Tensor, nn

_SLOPE = 0.1
"""Of the hidden linear layer's units below 0 (Maas et al., 2013, "Rectifier nonlinearities")."""


class _Convolutional(nn.Module):
    """Features of convolutions, and what makes logits of them."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        logits_NK: Tensor = self.classifier(self.features(images_NCHW))
        return logits_NK


class SmallCNN(_Convolutional):
    """Two 3×3 convolutions (32 and 64 channels, 2×2 max-pool, batch norm) and two linear layers.

    Parameters
    ----------
    image_shape : tuple of int
        (C, H, W), H and W at least 4.
    num_classes : int
        Number of logits K.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        channels, height, width = image_shape
        features = nn.Sequential(
            *_block(channels, 32, pool=True),
            *_block(32, 64, pool=True),
        )
        classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 128),
            # Adam's first steps move the sum over so many inputs far: units of a client that has
            # few classes would be 0 everywhere from then on, and learn nothing of the others.
            nn.LeakyReLU(_SLOPE),
            nn.Linear(128, num_classes),
        )
        super().__init__(features, classifier)


class FiveConvolutions(_Convolutional):
    """Five 3×3 convolutions with batch norm, three 2×2 max-pools, and a linear layer.

    A narrow one of the networks of Simonyan and Zisserman (2014, arXiv 1409.1556), for photographs
    of 32 pixels where a ResNet takes too long: 4 times the seconds of `SmallCNN`, and a third of a
    ResNet-18's (torchvision's stem).

    Parameters
    ----------
    image_shape : tuple of int
        (C, H, W), H and W at least 8.
    num_classes : int
        Number of logits K.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        channels, height, width = image_shape
        features = nn.Sequential(
            *_block(channels, 32, pool=True),
            *_block(32, 64),
            *_block(64, 64, pool=True),
            *_block(64, 128),
            *_block(128, 128, pool=True),
        )
        classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(128 * (height // 8) * (width // 8), num_classes)
        )
        super().__init__(features, classifier)


def _block(channels_in: int, channels_out: int, *, pool: bool = False) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        # Before batch norm and ReLU, which then work on a quarter of the values.
        *((nn.MaxPool2d(2),) if pool else ()),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )
