from __future__ import annotations

import random

import numpy as np
import torch

from fedzge_flwr.common.randomness import (
    Purpose,
    derive_seed,
    numpy_stream,
    seeded_default,
    torch_stream,
)


def test_recorded_seed() -> None:
    """The same on every machine and in every version: a resumed run depends on it."""
    assert derive_seed(0, Purpose.LATENT, round_=1) == 3536986177609219865


def test_each_argument_matters() -> None:
    seeds = {
        derive_seed(seed, purpose, round_=round_, partition=partition)
        for seed in (0, 1)
        for purpose in (Purpose.LATENT, Purpose.DIRECTIONS)
        for round_ in (1, 11)
        for partition in (-1, 0, 1)
    }
    assert len(seeds) == 24
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_streams_repeat_and_leave_global_state_alone() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002 - the global state is what is tested
    random.seed(3)
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    first = torch.randn(3, generator=torch_stream(1, Purpose.LATENT))
    with seeded_default(1, Purpose.INIT_CENTRAL):
        layer = torch.nn.Linear(2, 2)
    draws = numpy_stream(1, Purpose.SAMPLING).random(3)
    assert torch.equal(first, torch.randn(3, generator=torch_stream(1, Purpose.LATENT)))
    assert (draws == numpy_stream(1, Purpose.SAMPLING).random(3)).all()
    with seeded_default(1, Purpose.INIT_CENTRAL):
        assert torch.equal(layer.weight, torch.nn.Linear(2, 2).weight)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert before[2] == random.getstate()
