"""A linear classifier on fixed features, which no data have shaped: what a private client trains.

With so few parameters, and features of length 1, training by noisy gradients is worth having on a
thousand images (Tramèr & Boneh, 2021, "Differentially private learning needs better features",
arXiv 2011.11660).
"""

from __future__ import annotations

import math
from functools import lru_cache

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

_AT_ONCE = 20
"""Of them, that are filtered together: the answers, 16 times an image, stay in the cache."""

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
        filters, mean_D, whitening_DE = _whitened(image_shape)
        for name, values in (("filters", filters), ("mean", mean_D), ("whitening", whitening_DE)):
            # A copy, since all models of a shape get the same; not a clone, which would have values
            # also where a model is made without any.
            self.register_buffer(name, torch.empty(values.shape).copy_(values))
        self.head = nn.Linear(whitening_DE.shape[1], num_classes, bias=False)
        # Where all classes are alike: what noisy gradients begin at.
        nn.init.zeros_(self.head.weight)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Return features (N, E) of length 1, of images (N, C, H, W)."""
        raw_ND = _raw(images_NCHW, self.filters)
        return F.normalize((raw_ND - self.mean) @ self.whitening, dim=1)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        logits_NK: Tensor = self.head(self.features(images_NCHW))
        return logits_NK


@lru_cache(maxsize=4)
def _whitened(image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return filters, the features' mean (D,) on noise, and their whitening (D, E).

    They take two seconds for colour images of 32 pixels, and a client makes its model several
    times.
    """
    from scipy.linalg import eigh

    # Also where a model is made without values.
    with torch.device("cpu"), torch.no_grad():
        # Half of the side at most: the padding is no part of the image.
        filters = _filters(min(_SIDE, 2 * (min(image_shape[1:]) // 4) + 1))
        noise = _natural_noise(_SAMPLES, image_shape).split(_AT_ONCE)
        raw_SD = torch.cat([_raw(part_NCHW, filters) for part_NCHW in noise])
        mean_D = raw_SD.mean(dim=0)
        centred_SD = raw_SD - mean_D
        # Of the covariance, and the largest alone: a fifth of the time of singular values.
        covariance_DD = (centred_SD.T @ centred_SD / _SAMPLES).numpy()
        features = len(covariance_DD)
        kept = min(features, _MOST_FEATURES)
        found = eigh(covariance_DD, subset_by_index=[features - kept, features - 1])
        values_E, directions_DE = (torch.from_numpy(array).flip(-1) for array in found)
        deviations_E = values_E.clamp_min(0).sqrt()
        deviations_E = deviations_E + _FLOOR * deviations_E[0]
        return filters, mean_D, directions_DE / deviations_E.pow(_WHITENED)


def _raw(images_NCHW: Tensor, filters: Tensor) -> Tensor:
    """Return magnitudes of the filters' answers, averaged over cells, and coarse pixels (N, D)."""
    num_images, channels, height, width = images_NCHW.shape
    cells = (min(_CELLS, height // 2), min(_CELLS, width // 2))
    planes = images_NCHW.reshape(num_images * channels, 1, height, width)
    answers = F.conv2d(planes, filters, padding=filters.shape[-1] // 2)
    even, odd = answers.chunk(2, dim=1)
    # Not the root itself, whose slope at 0 has no limit.
    magnitude = (even.square() + odd.square() + 1e-12).sqrt()
    pooled = F.adaptive_avg_pool2d(magnitude, cells)
    # Spelled out, since there may be no image.
    averages = pooled.reshape(num_images, channels * _ORIENTATIONS * math.prod(cells))
    coarse = (min(2 * _CELLS, height), min(2 * _CELLS, width))
    return torch.cat((averages, F.adaptive_avg_pool2d(images_NCHW, coarse).flatten(1)), dim=1)


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
