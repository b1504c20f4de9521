"""Tensors of NumPy arrays, and the other way round."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedzge_flwr.common.arrays import FloatArray


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


def state_arrays(model: nn.Module) -> dict[str, npt.NDArray[Any]]:
    """Return a model's parameters and buffers by name, in C order whatever its memory layout."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format).cpu().numpy()
        for name, tensor in model.state_dict().items()
    }
