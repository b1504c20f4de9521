"""What is done to a model's images or logits by a fixed step, without changing the model."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.around import Around
from fedzge_flwr.learning.outputs import logits_of

_LEAST = 1e-7
"""What a probability of 0 counts as, so that its logarithm is finite."""


class Normalized(Around):
    """A model that was made for normalised images, given images in [−1, 1].

    Which is what is asked about. The model's own training code, whose loader normalises, is to
    train ``net``: given the whole, it would normalise twice.

    Parameters
    ----------
    net : nn.Module
        Maps images (N, C, H, W), normalised as below, to logits (N, K).
    mean, std : float or iterable of float
        As torchvision's ``Normalize`` has them, of images in [0, 1]: one for all channels, or one
        a channel.

    Raises
    ------
    ConfigError
        If they are not finite, a ``std`` is not above 0, or they are not of as many channels.

    Examples
    --------
    >>> model = Normalized(nn.Flatten(), mean=0.25, std=0.5)
    >>> model(torch.tensor([[[[-1.0, 1.0]]]]))
    tensor([[-0.5000,  1.5000]])
    """

    scale_C11: Tensor
    shift_C11: Tensor

    def __init__(
        self, net: nn.Module, mean: float | Iterable[float], std: float | Iterable[float]
    ) -> None:
        super().__init__(net)
        means, stds = _by_channel(mean), _by_channel(std)
        if len({len(means), len(stds)} - {1}) > 1:
            raise ConfigError(
                f"mean is of {len(means)} channels and std of {len(stds)}: give both one a channel"
            )
        if not all(map(math.isfinite, (*means, *stds))) or min(stds) <= 0:
            raise ConfigError(f"mean = {mean}, std = {std}: give finite numbers, std above 0")
        mean_C, std_C = (torch.tensor(values, dtype=torch.float64) for values in (means, stds))
        unit = PIXEL_RANGE.high - PIXEL_RANGE.low
        scale_C = 1 / (unit * std_C)
        shift_C = (-PIXEL_RANGE.low / unit - mean_C) / std_C
        for name, values in (("scale_C11", scale_C), ("shift_C11", shift_C)):
            # Not of the model's state: that is the model's own.
            self.register_buffer(name, values.float().reshape(-1, 1, 1), persistent=False)

    def inputs(self, images_NCHW: Tensor) -> Tensor:
        """Return images in [−1, 1], normalised."""
        return images_NCHW * self.scale_C11 + self.shift_C11


class Rescaled(Around):
    """A model with its logits multiplied by a number, which changes no class.

    A central model learns answers softened by ``answer-temperature``. Its probabilities are what
    the ensemble's are once its logits are multiplied by that.

    Parameters
    ----------
    net : nn.Module
        Maps images (N, C, H, W) to logits (N, K).
    by : float
        Above 0.

    Raises
    ------
    ConfigError
        If it is not.
    """

    def __init__(self, net: nn.Module, by: float) -> None:
        super().__init__(net)
        if not 0 < by < math.inf:
            raise ConfigError(f"by = {by}: give a number above 0")
        self.by = float(by)

    def outputs(self, found: object) -> Tensor:
        """Return the multiplied logits (N, K)."""
        return logits_of(found) * self.by


class OfProbabilities(Around):
    """A model that ends in a softmax, with the logarithms of what it returns for logits."""

    def outputs(self, found: object) -> Tensor:
        """Return the logarithms of probabilities (N, K)."""
        return logits_of(found).clamp_min(_LEAST).log()


def _by_channel(values: float | Iterable[float]) -> tuple[float, ...]:
    if isinstance(values, Iterable):
        return tuple(float(value) for value in values)
    return (float(values),)
