"""torchvision's ResNets with a stem for any number of channels, and one for small images."""

from __future__ import annotations

from typing import cast

import torchvision.models as tv
from torch import nn


def build_resnet(
    depth: int, stem: str, image_shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    """Build a ResNet without pretrained weights.

    Parameters
    ----------
    depth : {18, 34, 50}
        Which of torchvision's ResNets (He et al., 2016, arXiv 1512.03385).
    stem : {"7x7", "3x3"}
        "7x7" is torchvision's: stride 2 and a max-pool, 1/4 of the resolution. "3x3" keeps the
        resolution (stride 1, no max-pool), as is usual for images of 32 pixels (section 4.2 there).
    image_shape : tuple of int
        (C, H, W); any C.
    num_classes : int
        Number of logits K.
    """
    builders = {18: tv.resnet18, 34: tv.resnet34, 50: tv.resnet50}
    model = builders[depth](weights=None, num_classes=num_classes)
    channels = image_shape[0]
    if stem == "3x3":
        model.conv1 = nn.Conv2d(channels, 64, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    # The same initialisation as torchvision gives the convolutions that it makes itself.
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    return cast(nn.Module, model)
