"""Randomness as a function of (seed, round, partition, purpose).

Nothing here reads or leaves behind global state, so a run is the same whatever order replies come
in, and a client's draws do not depend on which process serves it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

SERVER = -1
"""The partition that stands for the server."""


class Purpose(StrEnum):
    """What a stream of random numbers is for; each purpose has a stream of its own."""

    INIT_CENTRAL = "init-central"
    INIT_GENERATOR = "init-generator"
    INIT_CLIENT = "init-client"
    ROUND = "round"
    SAMPLING = "sampling"
    LATENT = "latent"
    DIRECTIONS = "directions"
    IMAGES = "images"
    GENERATOR_STEPS = "generator-steps"
    CENTRAL_DISTILLATION = "central-distillation"
    LOCAL_TRAINING = "local-training"
    CLIENT_DISTILLATION = "client-distillation"
    HOLDOUT = "holdout"
    PARTITION = "partition"
    SUBSET = "subset"
    AUDIT = "audit"


def derive_seed(seed: int, purpose: Purpose, *, round_: int = 0, partition: int = SERVER) -> int:
    """Return the 63-bit seed of one stream.

    Parameters
    ----------
    seed : int
        The run's seed.
    purpose : Purpose
        What the numbers are for.
    round_ : int
        The round, from 1; 0 before the first.
    partition : int
        The client's partition, from 0; ``SERVER`` for the server.

    Returns
    -------
    int
        The first 63 bits of SHA-256 over the four values, in [0, 2**63).
    """
    key = f"fedzge|{seed}|{round_}|{partition}|{purpose.value}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def numpy_stream(
    seed: int, purpose: Purpose, *, round_: int = 0, partition: int = SERVER
) -> np.random.Generator:
    """Return NumPy's generator for one stream (see `derive_seed`)."""
    return np.random.default_rng(derive_seed(seed, purpose, round_=round_, partition=partition))


def torch_stream(
    seed: int, purpose: Purpose, *, round_: int = 0, partition: int = SERVER
) -> torch.Generator:
    """Return a CPU ``torch.Generator`` for one stream (see `derive_seed`).

    Draws are made on the CPU and moved afterwards: a GPU's generator would give other numbers.
    """
    import torch

    return torch.Generator("cpu").manual_seed(
        derive_seed(seed, purpose, round_=round_, partition=partition)
    )


@contextmanager
def seeded_default(
    seed: int, purpose: Purpose, *, round_: int = 0, partition: int = SERVER
) -> Iterator[None]:
    """Run a block with torch's default CPU generator seeded, and restore it afterwards.

    Layers draw initial weights and dropout from it, and loaders their order, and take no other. A
    GPU's is left alone.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        number = derive_seed(seed, purpose, round_=round_, partition=partition)
        torch.default_generator.manual_seed(number)
        yield
