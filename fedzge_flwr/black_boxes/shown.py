"""Whether one's own training shows a model such images as it will be asked about.

Most loaders normalise. A model that is trained on images of one range and asked about those of
another answers wrongly, and its own test does not show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.notices import warn_once, warned_of
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.around import inputs_within, model_within
from fedzge_flwr.learning.tensors import device_of, to_tensor

_AXES = 4
_MOST = 512
_FAR = 0.5
"""Means that differ by more of a deviation are of other images: augmentation moves them less."""
_WIDE = 1.5
"""So are deviations by this factor."""
_SHOWN, _TESTED = "images shown", "own test"
_WORSE = 0.25
"""How much worse a model may be on the images that it was trained on than on its own test's."""
_BEYOND = 0.25
"""How much of the pixel range augmentation may leave it by."""
_FIX = (
    "wrap the model in fedzge_flwr.Normalized(model, mean, std), and let `train` train its `net` "
    "with your loader as it is"
)


class Shown:
    """Mean, deviation and range of the images that a model was shown."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def note(self, images: Tensor) -> None:
        """Count a batch. Nothing is read from a GPU."""
        if images.numel():
            x, number = images.detach().float(), float(images.numel())
            moments = (x.mean(), x.square().mean(), *x.aminmax(), x.new_tensor(number))
            self._batches.append(torch.stack(moments))

    def complaint(self, model: nn.Module, shape: tuple[int, int, int], own: ImageSet | None) -> str:
        """Say what is wrong with the images shown, in one line; empty if nothing is.

        Parameters
        ----------
        model : nn.Module
            What was trained.
        shape : tuple of int
            (C, H, W) of the images that it is asked about.
        own : ImageSet, optional
            The client's own images, which have the mean and deviation wanted.
        """
        if not self._batches:
            return ""
        means, squares, lows, highs, numbers = torch.stack(self._batches).double().cpu().T
        shares = numbers / numbers.sum()
        first, second = float((means * shares).sum()), float((squares * shares).sum())
        low, high = float(lows.min()), float(highs.max())
        shown = f"`train` shows the model images from {low:.2f} to {high:.2f}"
        if own is not None and len(own) > 1:
            x = _as_asked(model, own)
            mean, deviation = float(x.mean()), float(x.std())
            found = max(second - first * first, 0.0) ** 0.5
            near = abs(first - mean) <= _FAR * deviation
            if deviation == 0 or (near and deviation / _WIDE <= found <= deviation * _WIDE):
                return ""
            return (
                f"{shown}, of mean {first:.2f} and deviation {found:.2f}; as `own` has them, which "
                f"it is asked about, they have {mean:.2f} and {deviation:.2f}: {_FIX}"
            )
        ends = [
            inputs_within(model, torch.full((1, *shape), end, device=device_of(model)))
            for end in (PIXEL_RANGE.low, PIXEL_RANGE.high)
        ]
        least, most = float(torch.stack(ends).min()), float(torch.stack(ends).max())
        slack = _BEYOND * (most - least) / 2
        if least - slack <= low < (least + most) / 2 and high <= most + slack:
            return ""
        return f"{shown}; it is asked about such from {least:.2f} to {most:.2f}: {_FIX}"


@contextmanager
def watched(model: nn.Module) -> Iterator[Shown]:
    """Note what a model is shown while a block runs."""
    shown = Shown()

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        # Models of Hugging Face are given images and labels by name.
        for value in (*given, *named.values()):
            if isinstance(value, Tensor) and value.ndim == _AXES and value.is_floating_point():
                shown.note(value)
                return

    handle = model_within(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield shown
    finally:
        handle.remove()


def warn_of_images(
    shown: Shown,
    model: nn.Module,
    shape: tuple[int, int, int],
    own: Callable[[], ImageSet | None],
) -> None:
    """Warn, once a process, if a model was shown other images than it is asked about."""
    if _SHOWN not in warned_of() and (complaint := shown.complaint(model, shape, own())):
        warn_once(_SHOWN, complaint)


def warn_of_test(
    accuracy: float,
    logits: Callable[[FloatArray], FloatArray],
    own: Callable[[], ImageSet | None],
) -> None:
    """Warn if a client's own test finds its model far better than it is on its own images."""
    if _TESTED in warned_of() or (found := own()) is None or len(found) == 0:
        return
    some = _some_of(found)
    right = float(np.mean(logits(some.inputs_NCHW).argmax(axis=1) == some.labels_N))
    if right < accuracy - _WORSE:
        warn_once(
            _TESTED,
            f"a client's own test has {accuracy:.0%} right, and the same model {right:.0%} of the "
            f"images in `own`, which are in [{PIXEL_RANGE.low:g}, {PIXEL_RANGE.high:g}]: {_FIX}",
        )


def loss_of(returned: object) -> float:
    """Return the loss that a client's own training returned, at least 0; 0 for none.

    Raises
    ------
    ConfigError
        If it returned anything but a number or None.
    """
    if returned is None:
        return 0.0
    try:
        return max(float(cast("float", returned)), 0.0)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(
            f"`train` returned a {type(returned).__name__}: return the round's loss as a number, "
            "or None"
        ) from None


def _some_of(own: ImageSet) -> ImageSet:
    """Return own images, evenly chosen, that stand for all."""
    rows = np.linspace(0, len(own) - 1, min(_MOST, len(own))).astype(np.int64)
    return own.take(rows)


def _as_asked(model: nn.Module, own: ImageSet) -> Tensor:
    x_NCHW = to_tensor(_some_of(own).inputs_NCHW, device_of(model))
    return inputs_within(model, x_NCHW)
