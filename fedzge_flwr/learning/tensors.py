"""Tensors of NumPy arrays, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.learning.around import model_within


def to_tensor(array: npt.NDArray[Any], device: torch.device | str = "cpu") -> torch.Tensor:
    """Return a tensor of its own: torch wants writable memory, and data and messages are not."""
    return torch.from_numpy(np.array(array)).to(device)


def own_tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    """Return a tensor of the array's own memory, or of a copy's if that may not be written."""
    return torch.from_numpy(array if array.flags.writeable else np.array(array))


def to_numpy(tensor: torch.Tensor) -> FloatArray:
    """Return a tensor's values as float32 on the CPU."""
    array: FloatArray = tensor.float().cpu().numpy()
    return array


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's parameters are, or its buffers; the CPU if it has neither."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


def state_arrays(model: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Return a model's parameters and buffers by plain name, in C order whatever its layout."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format).cpu().numpy()
        for name, tensor in plain_state(model).items()
    }


def load_arrays(model: nn.Module, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Load what `state_arrays` gave.

    Raises
    ------
    ValueError
        If names or shapes are not this model's.
    """
    try:
        load_plain(model, {name: own_tensor(array) for name, array in arrays.items()})
    except RuntimeError as error:
        raise ValueError(f"not a state of this model: {error}") from error


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and buffers as the model has them that no wrapper is around.

    ``torch.compile`` puts ``_orig_mod.`` before names, and ``DataParallel`` ``module.``, wherever
    in a model they are. A file with such names does not load into the model itself.
    """
    return {_plain_name(model, name): tensor for name, tensor in model.state_dict().items()}


def load_plain(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, assign: bool = False
) -> None:
    """Load what `plain_state` or ``state_dict`` gave, of the model with or without wrappers.

    With ``assign`` the tensors become the model's own.

    Raises
    ------
    RuntimeError
        If names or shapes are not this model's.
    """
    wanted = {_plain_name(model, name): name for name in model.state_dict()}
    given = {
        name if name in wanted.values() else wanted.get(_unwrapped(name, wanted), name): tensor
        for name, tensor in state.items()
    }
    model.load_state_dict(given, assign=assign)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within all that is around it."""
    while (name := _inner(model)) is not None:
        model = getattr(model, name)
    return model


def is_wrapped(model: nn.Module) -> bool:
    """Say whether a model, or part of it, is compiled or spread over devices."""
    return any(_inner(module) is not None for module in model.modules())


_INNER = {"OptimizedModule": "_orig_mod"} | dict.fromkeys(
    ("DataParallel", "DistributedDataParallel"), "module"
)
"""By torch's class of a wrapper, its attribute that is the model."""


def _inner(module: object) -> str | None:
    kind = type(module)
    return _INNER.get(kind.__name__) if kind.__module__.startswith("torch.") else None


def _plain_name(model: nn.Module, name: str) -> str:
    parts: list[str] = []
    here: object = model_within(model)
    for part in name.split("."):
        if part != _inner(here):
            parts.append(part)
        found = getattr(here, part, None)
        here = model_within(found) if isinstance(found, nn.Module) else found
    return ".".join(parts)


def _unwrapped(name: str, wanted: Mapping[str, str]) -> str:
    """Return the plain name of a state's entry, if the state is of a wrapped model."""
    parts = name.split(".")
    while ".".join(parts) not in wanted:
        found = next((inner for inner in ("_orig_mod", "module") if inner in parts), None)
        if found is None:
            return name
        parts.remove(found)
    return ".".join(parts)
