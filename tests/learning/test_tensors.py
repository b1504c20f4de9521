"""Whose memory a tensor has."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from fedzge_flwr.learning.tensors import own_tensor, state_arrays, to_numpy, to_tensor


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.setflags(write=False)
    return view


def test_a_tensor_takes_an_array_over_only_if_it_may_be_written() -> None:
    array = np.zeros(3, np.float32)
    own_tensor(array)[0] = 1.0
    assert array.tolist() == [1, 0, 0]
    kept = own_tensor(read_only(array))
    kept[1] = 1.0
    assert array.tolist() == [1, 0, 0]


def test_a_tensor_of_data_is_a_copy() -> None:
    array = np.zeros(3, np.uint8)
    for given in (array, read_only(array)):
        copied = to_tensor(given)
        assert copied.dtype == torch.uint8
        copied[0] = 1
        assert array.tolist() == [0, 0, 0]


def test_values_leave_as_float32_and_states_as_copies() -> None:
    found = to_numpy(torch.ones(2, dtype=torch.float64))
    assert (found.dtype, found.tolist()) == (np.float32, [1, 1])
    model = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
    arrays = state_arrays(model)
    assert all(array.flags.c_contiguous for array in arrays.values())
    arrays["weight"].fill(0)
    assert bool((model.weight != 0).any())
