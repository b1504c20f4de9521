"""Distillation of the ensemble's answers, at the server and at the clients.

Asked about synthetic images, classifiers answer half of them with one class and hardly any with
some others; a student that sees them as they come learns the rare classes last, if at all.
`class_weights` evens that out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedzge_flwr.config.sections import OptimizerSettings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.losses import distillation_loss
from fedzge_flwr.learning.numerics import reproducible
from fedzge_flwr.learning.tensors import device_of
from fedzge_flwr.learning.training import (
    Answer,
    OwnImages,
    answers_in,
    make_optimizer,
    make_schedule,
    steps_an_epoch,
)

Batch: TypeAlias = "tuple[Tensor, Tensor, OwnImages | None]"
"""Images, the teacher's logits on them, and own images to rehearse."""

_LEAST_SHARE = 0.01
"""A class that is answered more rarely counts as if it were so often."""


def class_weights(logits_NK: Tensor, power: float) -> Tensor:
    """Return how often each image is to be drawn, relative to the others.

    An image whose likeliest class is k weighs (share of k + 0.01)^−power: class-balanced sampling,
    as in long-tailed recognition (Kang et al., 2020, arXiv 1910.09217), by a model's answers for
    want of labels.

    Parameters
    ----------
    logits_NK : Tensor
        Logits of at least one image.
    power : float
        0: all alike; 0.5: square-root sampling; 1: all classes that occur equally often.

    Returns
    -------
    Tensor
        float32 (N,), above 0, on the CPU.
    """
    classes_N = logits_NK.argmax(dim=1).cpu()
    counts_K = torch.bincount(classes_N, minlength=logits_NK.shape[1])
    share_K = counts_K.float() / len(classes_N)
    return (share_K + _LEAST_SHARE).pow(-power)[classes_N]


@reproducible()
def distill(
    model: nn.Module,
    x_NCHW: Tensor,
    teacher_logits_NK: Tensor,
    *,
    steps: int,
    batch_size: int,
    temperature: float,
    lr: float,
    settings: OptimizerSettings,
    stream: torch.Generator,
    class_balance: float = 0.0,
    rehearsed: OwnImages | None = None,
    max_norm: float = 0.0,
) -> float:
    """Take distillation steps with a fresh optimiser whose schedule spans them.

    Parameters
    ----------
    model : nn.Module
        The student, trained in place, in training mode; left in evaluation mode.
    x_NCHW, teacher_logits_NK : Tensor
        At least `MIN_TRAINING_IMAGES` images in the shared pixel range, on the model's device, and
        the teacher's logits on them.
    steps, batch_size, temperature, lr, settings
        Steps; images a step, 0 for all of them; T of `distillation_loss`; the initial
        learning rate; optimiser and schedule.
    stream, class_balance
        The stream of the draws, and the power of `class_weights` by which they are weighed.
    rehearsed : OwnImages, optional
        As many of the student's own images join each step (`distillation_step`).
    max_norm : float
        Norm to which a step's gradient is cut; 0: not at all.

    Returns the distillation loss before the last step; 0 of no steps.
    """
    weights_N = class_weights(teacher_logits_NK, class_balance)

    def batch() -> Batch:
        x, teacher = x_NCHW, teacher_logits_NK
        if 0 < batch_size < len(x):
            chosen = torch.multinomial(weights_N, batch_size, True, generator=stream).to(x.device)
            x, teacher = x[chosen], teacher[chosen]
        return x, teacher, rehearsed.drawn(len(x), stream) if rehearsed is not None else None

    optimizer = make_optimizer(model.parameters(), settings, lr)
    schedule = make_schedule(optimizer, settings, _by_epochs(steps, len(x_NCHW), batch_size))
    answer = answers_in(model, settings)
    losses = _take_steps(model, answer, batch, optimizer, schedule, steps, temperature, max_norm)
    return float(losses[-1]) if losses else 0.0


def _by_epochs(steps: int, num_images: int, batch_size: int) -> list[int]:
    """Return how many of some steps are in each epoch; the full batch is one."""
    an_epoch = steps_an_epoch(num_images, batch_size) if 0 < batch_size < num_images else 1
    full, rest = divmod(steps, an_epoch)
    return [an_epoch] * full + [rest] * (rest > 0)


@reproducible()
def distill_levels(
    model: nn.Module,
    levels_MCHW: Tensor,
    teacher_logits_MK: Tensor,
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    *,
    steps: int,
    batch_size: int,
    temperature: float,
    settings: OptimizerSettings,
    stream: torch.Generator,
    class_balance: float,
) -> float:
    """Take distillation steps on remembered images, with an optimiser that lives on.

    Parameters
    ----------
    model : nn.Module
        The student, trained in place, in training mode; left in evaluation mode.
    levels_MCHW, teacher_logits_MK : Tensor
        uint8 images, and the teacher's logits on them, on the CPU.
    optimizer, schedule
        The student's; one step of the schedule a step.
    steps, batch_size, temperature, settings, stream, class_balance
        As in `distill`.

    Returns
    -------
    float
        The mean distillation loss over the steps.
    """
    device = device_of(model)
    weights_M = class_weights(teacher_logits_MK, class_balance)

    def batch() -> Batch:
        # The full batch is every image once, and is not drawn.
        chosen = torch.arange(len(levels_MCHW))
        if 0 < batch_size < len(levels_MCHW):
            chosen = torch.multinomial(weights_M, batch_size, True, generator=stream)
        x_NCHW = PIXEL_RANGE.from_uint8(levels_MCHW[chosen].to(device))
        return x_NCHW, teacher_logits_MK[chosen].to(device), None

    answer = answers_in(model, settings)
    losses = _take_steps(model, answer, batch, optimizer, schedule, steps, temperature)
    return float(sum(losses)) / steps


def _take_steps(
    model: nn.Module,
    answer: Answer,
    batch: Callable[[], Batch],
    optimizer: Optimizer,
    schedule: LRScheduler | None,
    steps: int,
    temperature: float,
    max_norm: float = 0.0,
) -> list[Tensor]:
    """Take steps in training mode, and return each one's loss before it; evaluation mode after."""
    losses: list[Tensor] = []
    model.train()
    for _ in range(steps):
        x_NCHW, teacher_NK, rehearsed = batch()
        losses.append(
            distillation_step(
                answer, x_NCHW, teacher_NK, optimizer, temperature, rehearsed, max_norm
            )
        )
        if schedule is not None:
            schedule.step()
    model.eval()
    return losses


def distillation_step(
    answer: Answer,
    x_NCHW: Tensor,
    teacher_logits_NK: Tensor,
    optimizer: Optimizer,
    temperature: float,
    rehearsed: OwnImages | None = None,
    max_norm: float = 0.0,
) -> Tensor:
    """Take one step of distillation; return its loss before it, a scalar.

    Own images to rehearse, if given, go through the model in the same batch as the others, with
    their own loss: else the student forgets them, and its batch norm comes to normalise by
    synthetic images alone. Rehearsal is Robins, 1995, "Catastrophic forgetting, rehearsal and
    pseudorehearsal".

    The gradient is cut to ``max_norm``, unless that is 0 (Pascanu et al., 2013, arXiv 1211.5063): a
    client that knows two classes of ten begins with large gradients, all of one direction, and
    would move so far by them that most of its ReLUs are 0 from then on.
    """
    optimizer.zero_grad(set_to_none=True)
    if rehearsed is None:
        loss = total = distillation_loss(teacher_logits_NK, answer(x_NCHW), temperature)
    else:
        own_NCHW = PIXEL_RANGE.from_uint8(rehearsed.images_u8_NCHW)
        both_NK = answer(torch.cat((x_NCHW, own_NCHW)))
        synthetic_NK, own_NK = both_NK.tensor_split([len(x_NCHW)])
        loss = distillation_loss(teacher_logits_NK, synthetic_NK, temperature)
        total = loss + rehearsed.loss(own_NK, rehearsed.labels_N)
    total.backward()
    if max_norm:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    return loss.detach()
