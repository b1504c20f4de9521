"""The generators that the server trains, by name.

A registry entry is called as ``(image_shape, num_classes, latent_dim=…, width=…)`` and returns a
module that maps noise (N, nz) and labels (N,) to images (N, C, H, W) in the shared pixel range. Add
one with ``GENERATORS["name"] = build``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedzge_flwr.images.pixels import PIXEL_RANGE

GeneratorBuilder: TypeAlias = Callable[..., nn.Module]


class _Upsampling(nn.Module):
    """The layers that both generators share."""

    def _add_layers(self, num_inputs: int, image_shape: tuple[int, int, int], width: int) -> None:
        channels, *self.sides = image_shape
        low = [-(-side // 4) for side in self.sides]
        self.project = nn.Linear(num_inputs, 2 * width * low[0] * low[1])
        self.unflatten = nn.Unflatten(1, (2 * width, *low))
        self.upsample = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.ConvTranspose2d(2 * width, 2 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.Tanh(),
        )

    def _images(self, inputs_ND: Tensor) -> Tensor:
        whole = self.upsample(self.unflatten(self.project(inputs_ND)))
        for dim, side in enumerate(self.sides, start=2):
            whole = whole.narrow(dim, (whole.shape[dim] - side) // 2, side)
        return PIXEL_RANGE.from_unit(whole)


class ConditionalGenerator(_Upsampling):
    """Map noise and labels to images (the generator of FedZGE, arXiv 2503.06028).

    Label embedding ‖ noise → linear → 2·width × H/4 × W/4 → BN → deconv → BN, LeakyReLU → deconv →
    BN, LeakyReLU → 3×3 conv → BN → tanh, scaled to the shared pixel range. About 2.04 M parameters
    at 3×32×32, ten classes, latent dimension 100 and width 64. Images whose sides are no multiples
    of 4 are the middle of larger ones.

    Parameters
    ----------
    image_shape : tuple of int
        (C, H, W) of the images.
    num_classes : int
        Number of classes K.
    latent_dim : int
        Dimension nz of the noise and of the label embedding.
    width : int
        ngf, the channels of the last hidden layer.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        latent_dim: int = 100,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, latent_dim)
        self._add_layers(2 * latent_dim, image_shape, width)

    def forward(self, z_ND: Tensor, y_N: Tensor) -> Tensor:
        """Map noise (N, nz) and labels (N,) to images (N, C, H, W) in the shared pixel range."""
        return self._images(torch.cat((self.embedding(y_N), z_ND), dim=1))


class UnconditionalGenerator(_Upsampling):
    """Map noise alone to images: the same layers without the label embedding.

    Labels are taken and not looked at, so that the objective's cross-entropy term only says what an
    image of noise should have been.

    Parameters
    ----------
    image_shape, num_classes, latent_dim, width
        As for `ConditionalGenerator`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        latent_dim: int = 100,
        width: int = 64,
    ) -> None:
        super().__init__()
        self._add_layers(latent_dim, image_shape, width)

    def forward(self, z_ND: Tensor, y_N: Tensor) -> Tensor:
        """Map noise (N, nz) to images (N, C, H, W) in the shared pixel range."""
        return self._images(z_ND)


GENERATORS: dict[str, GeneratorBuilder] = {
    "conditional": ConditionalGenerator,
    "unconditional": UnconditionalGenerator,
}
"""Builders of generators by name, as the setting ``generator`` has them."""
