"""Models for measurements of many federations: a convolutional one takes three times as long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor, nn

from fedzge_flwr.learning.models.catalogue import MODELS


def mlp(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """One hidden layer of 128 units."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(image_shape), 128), nn.ReLU(), nn.Linear(128, num_classes)
    )


def returning(finish: Callable[[Any, Tensor], object]) -> Callable[[Any, int], nn.Module]:
    """A builder of models that return what ``finish`` makes of the model and its logits."""

    class Returning(nn.Module):
        def __init__(self, shape: Any, num_classes: int) -> None:
            super().__init__()
            self.inner = mlp(shape, num_classes)

        def forward(self, x: Tensor) -> object:
            return finish(self, self.inner(x))

    return Returning


@pytest.fixture(scope="module")
def models() -> Iterator[list[str]]:
    """Registers the models here; returns their names."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODELS, "mlp", mlp)
        yield ["mlp"]
