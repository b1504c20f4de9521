"""The class-conditional generator that the server trains."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedzge_flwr.errors import ConfigError
from fedzge_flwr.pixels import PIXEL_RANGE


class ConditionalGenerator(nn.Module):
    """Map noise and labels to images (the generator of FedZGE, arXiv 2503.06028).

    Label embedding ‖ noise → linear → 2·width × H/4 × W/4 → BN → deconv → BN, LeakyReLU → deconv →
    BN, LeakyReLU → 3×3 conv → BN → tanh, scaled to the shared pixel range. About 2.04 M parameters
    at 3×32×32, ten classes, latent dimension 100 and width 64.

    Parameters
    ----------
    image_shape : tuple of int
        (C, H, W) of the images; H and W multiples of 4.
    num_classes : int
        Number of classes K.
    latent_dim : int
        Dimension nz of the noise and of the label embedding.
    width : int
        ngf, the channels of the last hidden layer.

    Raises
    ------
    ConfigError
        If H or W is not a multiple of 4.
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
        channels, height, width_px = image_shape
        if height % 4 or width_px % 4:
            raise ConfigError(
                f"the generator needs image sides that are multiples of 4, not {height}×{width_px}"
            )
        self.num_classes = num_classes
        self.latent_dim = latent_dim
        self.embedding = nn.Embedding(num_classes, latent_dim)
        self.project = nn.Linear(2 * latent_dim, 2 * width * (height // 4) * (width_px // 4))
        self.unflatten = nn.Unflatten(1, (2 * width, height // 4, width_px // 4))
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

    def forward(self, z_ND: Tensor, y_N: Tensor) -> Tensor:
        """Map noise (N, nz) and labels (N,) to images (N, C, H, W) in the shared pixel range."""
        hidden = self.project(torch.cat((self.embedding(y_N), z_ND), dim=1))
        return PIXEL_RANGE.from_unit(self.upsample(self.unflatten(hidden)))
