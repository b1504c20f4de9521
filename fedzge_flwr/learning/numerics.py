"""How torch computes: where, how exactly, and on how many images at a time."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

from fedzge_flwr.common.errors import ConfigError

LOGGER = logging.getLogger("flwr.fedzge")

T = TypeVar("T")

# Of mallopt(3): glibc takes no larger threshold than 32 MB for what it maps anew each time.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_FREE = 512 * 2**20
_MAPPED_ANEW = 32 * 2**20
_CHOSEN_BY = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}


def in_batches(compute: Callable[[slice], T], num_images: int, size: int) -> list[T]:
    """Compute on ``size`` images at a time.

    When a GPU's memory runs out, it goes on with half as many at a time, and the log says so.

    Parameters
    ----------
    compute : Callable[[slice], T]
        Computes on the images of a slice.
    num_images : int
        Number of images; with 0 there is one empty slice.
    size : int
        Images at a time, at least 1.

    Returns
    -------
    list[T]
        In order of the images.

    Raises
    ------
    torch.OutOfMemoryError
        If there is no memory for one image.
    """
    results: list[T] = []
    done = 0
    while done < num_images or not results:
        found = _if_it_fits(compute, slice(done, done + size), size > 1)
        if found is not None:
            results.append(found[0])
            done += size
        else:
            # What the failed attempt held is gone only now, with its frames.
            torch.cuda.empty_cache()
            size //= 2
            LOGGER.warning("out of memory: %d images at a time from here on", size)
    return results


def _if_it_fits(
    compute: Callable[[slice], T], images: slice, less_would_do: bool
) -> tuple[T] | None:
    """Return what is computed; None if memory ran out and fewer images may be tried."""
    try:
        return (compute(images),)
    except torch.OutOfMemoryError:
        if less_would_do:
            return None
        raise


def select_device(name: str) -> torch.device:
    """Return the device that a ``*-device`` setting names; "auto" is a GPU if one is visible.

    Raises
    ------
    ConfigError
        If it names a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    there = torch.cuda.device_count() if kind == "cuda" and torch.cuda.is_available() else 0
    if kind == "cuda" and int(number or 0) >= there:
        raise ConfigError(
            f"'server-device' or 'client-device' = '{name}': PyTorch finds {there} GPUs here; "
            'give "auto" or "cpu" (in a simulation clients see those of \'--client-gpus\' alone)'
        )
    return torch.device(name)


@contextmanager
def _backend_flags(*flags: tuple[Any, str, object]) -> Iterator[None]:
    """Set attributes of torch's backends, each (object, name, value), and restore them."""
    before = [(backend, name, getattr(backend, name)) for backend, name, _ in flags]
    for backend, name, value in flags:
        setattr(backend, name, value)
    try:
        yield
    finally:
        for backend, name, value in before:
            setattr(backend, name, value)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Compute in plain float32: no TF32 and no autocast, restored afterwards.

    A step of ε moves logits by less than the rounding of TF32 (10 bits of mantissa).
    """
    with (
        tensor_float32(allowed=False),
        torch.autocast("cuda", enabled=False),
        torch.autocast("cpu", enabled=False),
    ):
        yield


@contextmanager
def tensor_float32(*, allowed: bool) -> Iterator[None]:
    """Have a GPU's matrix products and convolutions in TF32, or not; restored afterwards."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    flags: list[tuple[Any, str, object]]
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later; mixing it with the other raises
        precision = "tf32" if allowed else "ieee"
        flags = [(matmul, "fp32_precision", precision), (cudnn.conv, "fp32_precision", precision)]
    else:
        flags = [(matmul, "allow_tf32", allowed), (cudnn, "allow_tf32", allowed)]
    with _backend_flags(*flags):
        yield


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """Have convolutions and matrix products of a forward pass in a ``training-precision``.

    For one step at a time: within, autocast keeps weights as it first saw them. Weights, their
    gradients and batch norm's statistics stay in float32 (Micikevicius et al., 2018, arXiv
    1710.03740); bfloat16 has the range of float32, and needs no scaling of the loss (Kalamkar et
    al., 2019, arXiv 1905.12322).
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16"):
        yield


@contextmanager
def reproducible() -> Iterator[None]:
    """Have cuDNN choose deterministic convolutions, always the same; restored afterwards."""
    cudnn = torch.backends.cudnn
    with _backend_flags((cudnn, "deterministic", True), (cudnn, "benchmark", False)):
        yield


@cache
def keep_freed_memory() -> bool:
    """Have the process keep up to 512 MB of freed memory, once; say whether that was done.

    glibc gives the memory of a step's activations back to the kernel, and the next step asks for it
    again, page by page: a sixth of the processor time of a small CNN's training
    (`docs/evidence.md`). Nothing is done without glibc, or where the environment has chosen
    (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES``).
    """
    chosen = bool(_CHOSEN_BY & os.environ.keys())
    chosen |= "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = mallopt(_M_MMAP_THRESHOLD, _MAPPED_ANEW), mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE)
    return all(done)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Have torch use so many threads, or with 0 those that it has; restored afterwards."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
