"""Asking a classifier, and scoring what it says."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.numerics import exact_float32, in_batches, reproducible
from fedzge_flwr.learning.outputs import logits_of
from fedzge_flwr.learning.tensors import device_of


class Evaluation(NamedTuple):
    """Mean cross-entropy in nats, and accuracy in [0, 1]."""

    loss: float
    accuracy: float


def predict(model: nn.Module, images_NCHW: Tensor, batch_size: int) -> Tensor:
    """Return the logits (N, K) in float32, in evaluation mode, ``batch_size`` images at a time.

    When a GPU's memory runs out, it goes on with half as many at a time, and the log says so.

    Parameters
    ----------
    model : nn.Module
        Left in evaluation mode.
    images_NCHW : Tensor
        uint8 images, or float images in the shared pixel range, on any device.
    batch_size : int
        Images evaluated at once.

    Returns
    -------
    Tensor
        On the device of ``images_NCHW``.

    Raises
    ------
    torch.OutOfMemoryError
        If there is no memory for one image.
    """
    model.eval()
    device = device_of(model)

    @torch.inference_mode()
    def logits(rows: slice) -> Tensor:
        with exact_float32(), reproducible():
            moved = images_NCHW[rows].to(device)
            x = PIXEL_RANGE.from_uint8(moved) if moved.dtype == torch.uint8 else moved
            return logits_of(model(x)).to(images_NCHW.device)

    return torch.cat(in_batches(logits, len(images_NCHW), batch_size))


def evaluate_logits(logits_NK: Tensor, labels_N: Tensor) -> Evaluation:
    """Return loss and accuracy of logits against labels."""
    return Evaluation(
        loss=float(F.cross_entropy(logits_NK, labels_N)),
        accuracy=float((logits_NK.argmax(dim=1) == labels_N).double().mean()),
    )
