"""A question's images as the estimators have them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.query.question import Question
from fedzge_flwr.zeroth_order.base import asked_tensors


def copies_of(question: Question) -> Tensor:
    """All copies of the perturbed images (copies, N, C, H, W), in the dtype of their base."""
    x_NCHW, u_QNCHW = asked_tensors(question, torch.device("cpu"))
    steps_QNCHW = question.eps * u_QNCHW
    sides = [steps_QNCHW, -steps_QNCHW] if question.differences == "central" else [steps_QNCHW]
    return x_NCHW + torch.cat([torch.zeros_like(x_NCHW)[None], *sides])
