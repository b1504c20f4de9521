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

from fedzge_flwr.common.registry import Registry, lookup

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fedzge_flwr.learning.models.probe import Ways

ImageShape: TypeAlias = tuple[int, int, int]
ModelBuilder: TypeAlias = "Callable[[ImageShape, int], nn.Module]"


def _cnn(image_shape: ImageShape, num_classes: int) -> nn.Module:
    from fedzge_flwr.learning.models.cnn import SmallCNN

    return SmallCNN(image_shape, num_classes)


def _cnn5(image_shape: ImageShape, num_classes: int) -> nn.Module:
    from fedzge_flwr.learning.models.cnn import FiveConvolutions

    return FiveConvolutions(image_shape, num_classes)


def _gabor_linear(image_shape: ImageShape, num_classes: int) -> nn.Module:
    from fedzge_flwr.learning.models.gabor import GaborLinear

    return GaborLinear(image_shape, num_classes)


def _resnet(image_shape: ImageShape, num_classes: int, *, depth: int, stem: str) -> nn.Module:
    from fedzge_flwr.learning.models.resnet import build_resnet

    return build_resnet(depth, stem, image_shape, num_classes)


MODELS: Registry[ModelBuilder] = Registry(
    {
        "cnn": _cnn,
        "cnn5": _cnn5,
        "gabor-linear": _gabor_linear,
        **{f"resnet{depth}": partial(_resnet, depth=depth, stem="7x7") for depth in (18, 34, 50)},
        **{
            f"resnet{depth}-3x3": partial(_resnet, depth=depth, stem="3x3")
            for depth in (18, 34, 50)
        },
    }
)
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
        If there is no such model, it cannot be built, or it is no classifier.
    """
    from fedzge_flwr.learning.models.probe import built

    build = lookup(MODELS, name, "model")
    ways = model_ways(name, image_shape, num_classes)
    model = built(build, image_shape, num_classes)
    return _in_its_layout(copy.deepcopy(model) if ways.shared else model, ways)


def rebuild_model(
    name: str, image_shape: ImageShape, num_classes: int, state: Mapping[str, Tensor]
) -> nn.Module:
    """Build a classifier with given parameters and buffers; if it can, without initialising it.

    Seed as for its first building: a model may draw other values than those of its state.

    Parameters
    ----------
    name, image_shape, num_classes
        As for `build_model`.
    state : Mapping[str, Tensor]
        All its parameters and buffers; the model takes the tensors over.

    Raises
    ------
    ConfigError
        As in `build_model`.
    ValueError
        If it is not a state of this model.
    """
    from fedzge_flwr.learning.models.probe import filled
    from fedzge_flwr.learning.tensors import load_plain

    ways = model_ways(name, image_shape, num_classes)
    try:
        if ways.empty is not None:
            return _in_its_layout(filled(ways.empty, state), ways)
        model = build_model(name, image_shape, num_classes)
        load_plain(model, state)
    except RuntimeError as error:
        raise ValueError(f"the kept state is not one of a {name}: {error}") from error
    return model


def model_ways(name: str, image_shape: ImageShape, num_classes: int) -> Ways:
    """Return how a model may be made; one from outside is tried and checked the first time.

    Raises
    ------
    ConfigError
        As in `build_model`.
    """
    build = lookup(MODELS, name, "model")
    return _ways(_Same(build, MODELS.is_own(build, name)), image_shape, num_classes)


class _Same:
    """A builder of whatever kind as a key: one that is equal to no other."""

    def __init__(self, build: ModelBuilder, own: bool) -> None:
        self.build = build
        self.own = own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.build is other.build

    def __hash__(self) -> int:
        return id(self.build)


# A worker rebuilds the same few models all the time.
@lru_cache(maxsize=8)
def _ways(same: _Same, image_shape: ImageShape, num_classes: int) -> Ways:
    from fedzge_flwr.learning.models.probe import find_ways, known_ways

    find = known_ways if same.own else find_ways
    return find(same.build, image_shape, num_classes)


def _in_its_layout(model: nn.Module, ways: Ways) -> nn.Module:
    from fedzge_flwr.learning.models.probe import in_layout

    return in_layout(model) if ways.channels_last else model
