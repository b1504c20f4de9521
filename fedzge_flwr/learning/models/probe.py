"""Whether what is done for speed leaves a model from outside as it is alone.

Such a model is built, asked and differentiated: as it is, and in the ways that are faster. What
does not come to the same is not done to it.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.text import error_line
from fedzge_flwr.learning.outputs import check_aside, check_model, logits_of, some_images
from fedzge_flwr.learning.tensors import device_of, is_wrapped, load_plain

ImageShape: TypeAlias = tuple[int, int, int]
ModelBuilder: TypeAlias = Callable[[ImageShape, int], nn.Module]

_IMAGES = 4
_SLACK = 1e-2
"""Another memory layout adds up in another order: so much of the largest value is rounding."""


class Ways(NamedTuple):
    """How a model may be made.

    Parameters
    ----------
    channels_last : bool
        Whether it may have the memory layout in which convolutions run faster.
    empty : nn.Module, optional
        The model without values, to be copied and given some; None: it must be built anew.
    shared : bool
        Whether its builder returns the same module each time, which is then copied.
    """

    channels_last: bool = False
    empty: nn.Module | None = None
    shared: bool = False


def known_ways(build: ModelBuilder, image_shape: ImageShape, num_classes: int) -> Ways:
    """Return the ways of a model of this package, all of which suit it."""
    return Ways(True, _without_values(build, image_shape, num_classes))


def find_ways(build: ModelBuilder, image_shape: ImageShape, num_classes: int) -> Ways:
    """Try which ways suit a model, and check that it is a classifier.

    Torch's default generator is as it was afterwards.

    Raises
    ------
    ConfigError
        If it cannot be built, or is no classifier (`check_model`).
    """
    with _aside():
        model = _seeded_alike(build, image_shape, num_classes)
        empty = _without_values(build, image_shape, num_classes)
        # Built of nothing, it has no part of the other; else another must be built to tell.
        apart = empty is not None and all(tensor.is_meta for tensor in empty.parameters())
        shared = not apart and _share(model, _seeded_alike(build, image_shape, num_classes))
        # Whatever compiles or spreads a model is to be given the very one that was built.
        if is_wrapped(model):
            with check_aside(model) as checked:
                check_model(checked, image_shape, num_classes)
            return Ways(shared=shared)
        if shared:
            model = copy.deepcopy(model)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        x_NCHW = some_images(_IMAGES, image_shape, device_of(model))
        alone, parts = _behaviour(model, x_NCHW), _parts(model)
        check_model(model, image_shape, num_classes)
        if alone is None:
            return Ways(shared=shared)

        def suits(ways: Ways) -> bool:
            try:
                made = (
                    _whole(ways.empty, state)
                    if ways.empty is not None
                    else _seeded_alike(build, image_shape, num_classes)
                )
                made = copy.deepcopy(made) if shared else made
                load_plain(made, state)
                made = in_layout(made) if ways.channels_last else made
                return _parts(made) == parts and _is_alike(alone, _behaviour(made, x_NCHW))
            except Exception:  # noqa: BLE001 - a way that a model cannot go
                return False

        tried = [Ways(True, shared=shared)]
        if apart:
            # The best first: most models suit it.
            tried = [Ways(True, empty), Ways(False, empty), *tried]
        return next(filter(suits, tried), Ways(shared=shared))


def built(build: ModelBuilder, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Build a model with values of its own, those that wait for a first image included.

    Raises
    ------
    ConfigError
        If its builder fails, or returns something else.
    """
    try:
        model: object = build(image_shape, num_classes)
    except Exception as error:
        raise ConfigError(
            f"the model cannot be built for images {image_shape} and {num_classes} classes "
            f"({error_line(error)})"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model's builder returns a {type(model).__name__}: return an nn.Module"
        )
    if any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        model.eval()
        with torch.no_grad():
            model(some_images(1, image_shape, torch.device("cpu")))
    return model


def filled(empty: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model without values that has these; it takes the tensors over.

    Raises
    ------
    RuntimeError
        If it is not a state of this model.
    """
    model = copy.deepcopy(empty)
    load_plain(model, state, assign=True)
    return model


def in_layout(model: nn.Module) -> nn.Module:
    """Return the model in the layout in which convolutions run 1.3 to 2 times as fast.

    It changes no shape.
    """
    return model.to(memory_format=torch.channels_last)


def _without_values(
    build: ModelBuilder, image_shape: ImageShape, num_classes: int
) -> nn.Module | None:
    """Return a model without values, which takes no time to copy; None if it needs values."""
    try:
        with torch.device("meta"):
            return build(image_shape, num_classes)
    except Exception:  # noqa: BLE001 - of whatever reads a value while it is built
        return None


def _whole(empty: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Fill a model; ValueError if it still lacks values."""
    model = filled(empty, {name: tensor.clone() for name, tensor in state.items()})
    if any(tensor.is_meta for tensor in _reachable(model)):
        raise ValueError("some values are in no state")
    return model


def _parts(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters a model has, and how many memories hold them and its buffers.

    What is tied is one parameter, or several in one memory.
    """
    tensors = (*model.parameters(), *model.buffers())
    places = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return len(list(model.parameters())), len(places)


def _reachable(model: nn.Module) -> Iterator[Tensor]:
    """Give every tensor that a model holds, in whatever it holds it."""
    seen: set[int] = set()
    waiting: list[object] = [model]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (type, ModuleType)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, FunctionType):
            # Not all that its module holds.
            waiting.extend(item.__closure__ or ())
        else:
            waiting.extend(gc.get_referents(item))


def _seeded_alike(build: ModelBuilder, image_shape: ImageShape, num_classes: int) -> nn.Module:
    torch.default_generator.manual_seed(0)
    return built(build, image_shape, num_classes)


def _behaviour(model: nn.Module, x_NCHW: Tensor) -> list[Tensor] | None:
    """Return a model's logits in evaluation mode and in training, gradient, and buffers.

    The gradient is that of evaluation mode: in training a deep model's batch norm makes of a
    rounding whatever it likes. None: the model fails.
    """
    torch.default_generator.manual_seed(0)
    try:
        model.eval()
        evaluated_NK = logits_of(model(x_NCHW))
        F.cross_entropy(evaluated_NK, torch.zeros(len(x_NCHW)).long().to(x_NCHW.device)).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        model.train()
        with torch.no_grad():
            trained_NK = logits_of(model(x_NCHW))
        buffers = [buffer.flatten().double() for buffer in model.buffers()]
    except Exception:  # noqa: BLE001 - `check_model` says what is wrong with it
        return None
    return [
        evaluated_NK.detach(),
        trained_NK,
        torch.cat(gradients),
        torch.cat([*buffers, x_NCHW.new_zeros(1).double()]),
    ]


def _is_alike(alone: list[Tensor], found: list[Tensor] | None) -> bool:
    return found is not None and all(
        a.shape == b.shape and float((a - b).abs().max()) <= _SLACK * float(a.abs().max())
        for a, b in zip(alone, found, strict=True)
    )


def _share(one: nn.Module, other: nn.Module) -> bool:
    return any(a is b for a, b in zip(one.parameters(), other.parameters(), strict=False))


@contextmanager
def _aside() -> Iterator[None]:
    """Draw and warn without anybody's noticing."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
