"""Computing on a few images at a time, and on fewer when a GPU's memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

LOGGER = logging.getLogger("flwr.fedzge")

T = TypeVar("T")


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
