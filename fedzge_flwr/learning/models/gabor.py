"""A linear classifier on fixed features, which no data have shaped: what a private client trains.

With so few parameters, and features of length 1, training by noisy gradients is worth having on a
thousand images (Tramèr & Boneh, 2021, "Differentially private learning needs better features",
arXiv 2011.11660).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

_ORIENTATIONS = 8
_SIDE = 9
_WIDTH = 1.5
"""Of a filter's envelope, in pixels: its standard deviation."""

_CELLS = 7
"""Most cells of a side in which a filter's answers are averaged; a cell has two pixels or more."""

_SAMPLES = 2000
"""Images of noise by which features are whitened."""

_WHITENED = 0.75
"""Power of a direction's deviation by which it is divided: 1 would make all alike."""

_FLOOR = 0.02
"""Of the largest deviation, added to each: directions that hardly vary stay small."""

_MOST_FEATURES = 200


class GaborLinear(nn.Module):
    """Magnitudes of Gabor filters and coarse pixels, whitened, and one linear layer.

    The features are functions of the image's shape alone: filters (Gabor, 1946, "Theory of
    communication"; Daugman, 1985), averages over cells, and directions and deviations of what these
    are on noise whose amplitudes fall as 1/f, as those of natural images do (Field, 1987).

    Parameters
    ----------
    image_shape : tuple of int
        (C, H, W), H and W at least 4.
    num_classes : int
        Number of logits K.
    """

    filters: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        # Half of the side at most: the padding is no part of the image.
        side = min(_SIDE, 2 * (min(height, width) // 4) + 1)
        self._cells = (min(_CELLS, height // 2), min(_CELLS, width // 2))
        self._pixels = (min(2 * _CELLS, height), min(2 * _CELLS, width))
        self.register_buffer("filters", _filters(side))
        features = _ORIENTATIONS * channels * math.prod(self._cells)
        features += channels * math.prod(self._pixels)
        kept = min(features, _MOST_FEATURES)
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("whitening", torch.zeros(features, kept))
        self._whiten(image_shape)
        self.head = nn.Linear(kept, num_classes, bias=False)
        # Where all classes are alike: what noisy gradients begin at.
        nn.init.zeros_(self.head.weight)

    def _whiten(self, image_shape: tuple[int, int, int]) -> None:
        raw_SD = self._raw(_natural_noise(_SAMPLES, image_shape))
        mean_D = raw_SD.mean(dim=0)
        _, values_E, directions_ED = torch.linalg.svd(raw_SD - mean_D, full_matrices=False)
        kept = self.whitening.shape[1]
        deviations_E = values_E[:kept] / math.sqrt(_SAMPLES)
        deviations_E = deviations_E + _FLOOR * deviations_E[0]
        self.mean.copy_(mean_D)
        self.whitening.copy_(directions_ED[:kept].T / deviations_E.pow(_WHITENED))

    def _raw(self, images_NCHW: Tensor) -> Tensor:
        num_images, channels, height, width = images_NCHW.shape
        planes = images_NCHW.reshape(num_images * channels, 1, height, width)
        answers = F.conv2d(planes, self.filters, padding=self.filters.shape[-1] // 2)
        even, odd = answers.chunk(2, dim=1)
        # Not the root itself, whose slope at 0 has no limit.
        magnitude = (even.square() + odd.square() + 1e-12).sqrt()
        pooled = F.adaptive_avg_pool2d(magnitude, self._cells)
        # Spelled out, since there may be no image.
        averages = pooled.reshape(num_images, channels * _ORIENTATIONS * math.prod(self._cells))
        pixels = F.adaptive_avg_pool2d(images_NCHW, self._pixels).flatten(1)
        return torch.cat((averages, pixels), dim=1)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Return features (N, E) of length 1, of images (N, C, H, W)."""
        return F.normalize((self._raw(images_NCHW) - self.mean) @ self.whitening, dim=1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        logits_NK: Tensor = self.head(self.features(images_NCHW))
        return logits_NK


def _filters(side: int) -> Tensor:
    """Return even and then odd filters (2·orientations, 1, side, side), of mean 0 and length 1."""
    at = torch.arange(side, dtype=torch.float32) - side // 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    found: list[Tensor] = []
    for phase in (0.0, math.pi / 2):
        for number in range(_ORIENTATIONS):
            angle = math.pi * number / _ORIENTATIONS
            across = x * math.cos(angle) + y * math.sin(angle)
            along = y * math.cos(angle) - x * math.sin(angle)
            envelope = torch.exp(-(across**2 + along**2 / 2) / (2 * _WIDTH**2))
            wave = envelope * torch.cos(2 * math.pi * across / (3 * _WIDTH) + phase)
            wave = wave - envelope * (wave.sum() / envelope.sum())
            found.append(wave / wave.norm())
    return torch.stack(found)[:, None]


def _natural_noise(num: int, image_shape: tuple[int, int, int]) -> Tensor:
    """Return images whose amplitudes fall as 1/f, always the same ones, of deviation 0.5."""
    _, height, width = image_shape
    stream = torch.Generator().manual_seed(0)
    white = torch.randn(num, *image_shape, generator=stream)
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None, :])
    falling = frequency.clamp_min(1 / max(height, width)).reciprocal()
    images = torch.fft.irfft2(torch.fft.rfft2(white) * falling, s=(height, width))
    images = images - images.mean(dim=(2, 3), keepdim=True)
    natural: Tensor = images / images.std(dim=(1, 2, 3), keepdim=True) / 2
    return natural
