"""Classifiers by name.

A registry entry is a function ``(image_shape, num_classes) -> nn.Module`` that maps images
(N, C, H, W) in the shared pixel range to logits (N, K). Add one with ``MODELS["name"] = build``.
The builders import torchvision only when called: a client with a small CNN never loads it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, TypeAlias

from fedzge_flwr.common.registry import lookup

if TYPE_CHECKING:
    from torch import Tensor, nn

ImageShape: TypeAlias = tuple[int, int, int]
ModelBuilder: TypeAlias = "Callable[[ImageShape, int], nn.Module]"


def _cnn(image_shape: ImageShape, num_classes: int) -> nn.Module:
    from fedzge_flwr.learning.models.cnn import SmallCNN

    return SmallCNN(image_shape, num_classes)


def _resnet(image_shape: ImageShape, num_classes: int, *, depth: int, stem: str) -> nn.Module:
    from fedzge_flwr.learning.models.resnet import build_resnet

    return build_resnet(depth, stem, image_shape, num_classes)


MODELS: dict[str, ModelBuilder] = {
    "cnn": _cnn,
    **{f"resnet{depth}": partial(_resnet, depth=depth, stem="7x7") for depth in (18, 34, 50)},
    **{f"resnet{depth}-3x3": partial(_resnet, depth=depth, stem="3x3") for depth in (18, 34, 50)},
}
"""Builders of classifiers by name, as ``central-model`` and ``local-models`` have them."""


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
    return _in_layout(lookup(MODELS, name, "model")(image_shape, num_classes))


def rebuild_model(
    name: str, image_shape: ImageShape, num_classes: int, state: Mapping[str, Tensor]
) -> nn.Module:
    """Build a classifier with given parameters and buffers, without initialising it first.

    Parameters
    ----------
    name, image_shape, num_classes
        As for `build_model`.
    state : Mapping[str, Tensor]
        All its parameters and buffers; the model takes the tensors over.

    Raises
    ------
    ConfigError
        If there is no such model.
    ValueError
        If it is not a state of this model.
    """
    import torch

    try:
        model = copy.deepcopy(_skeleton(lookup(MODELS, name, "model"), image_shape, num_classes))
        model.load_state_dict(state, assign=True)
        complete = not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    except (RuntimeError, NotImplementedError, TypeError):
        complete = False
    if not complete:
        # A model that reads its own values while it is built, that cannot be copied, or that keeps
        # a buffer out of its state, needs the ordinary way.
        with torch.random.fork_rng(devices=[]):
            model = build_model(name, image_shape, num_classes)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"the kept state is not one of a {name}: {error}") from error
    return _in_layout(model)


@lru_cache(maxsize=8)
def _skeleton(build: ModelBuilder, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Return a model without values, to be copied: a worker rebuilds the same few all the time."""
    import torch

    with torch.device("meta"):
        return build(image_shape, num_classes)


def _in_layout(model: nn.Module) -> nn.Module:
    import torch

    # Convolutions run 1.3 to 2 times as fast in this layout; it changes no shape.
    return model.to(memory_format=torch.channels_last)
