"""Classifiers by name.

A registry entry is a function ``(image_shape, num_classes) -> nn.Module`` that maps images
(N, C, H, W) in the shared pixel range to logits (N, K). Add one with ``MODELS["name"] = build``.
The builders import torchvision only when called: a client with a small CNN never loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from fedzge_flwr.registry import lookup

if TYPE_CHECKING:
    from torch import nn

ImageShape: TypeAlias = tuple[int, int, int]
ModelBuilder: TypeAlias = "Callable[[ImageShape, int], nn.Module]"


def _cnn(image_shape: ImageShape, num_classes: int) -> nn.Module:
    from fedzge_flwr.models.cnn import SmallCNN

    return SmallCNN(image_shape, num_classes)


def _resnet(image_shape: ImageShape, num_classes: int, *, depth: int, stem: str) -> nn.Module:
    from fedzge_flwr.models.resnet import build_resnet

    return build_resnet(depth, stem, image_shape, num_classes)


MODELS: dict[str, ModelBuilder] = {
    "cnn": _cnn,
    **{f"resnet{depth}": partial(_resnet, depth=depth, stem="7x7") for depth in (18, 34, 50)},
    **{f"resnet{depth}-3x3": partial(_resnet, depth=depth, stem="3x3") for depth in (18, 34, 50)},
}


def build_model(name: str, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Build a freshly initialised classifier.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    image_shape : tuple of int
        (C, H, W).
    num_classes : int
        Number of logits K.

    Raises
    ------
    ConfigError
        If there is no such model.
    """
    import torch

    model = lookup(MODELS, name, "model")(image_shape, num_classes)
    # Convolutions run 1.3 to 2 times as fast in this layout; it changes no shape.
    return model.to(memory_format=torch.channels_last)
