"""Optimisers, schedules and the loop that trains a classifier on labelled images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from fedzge_flwr.config.sections import (
    MIN_TRAINING_IMAGES,
    OptimizerSettings,
    Settings,
    TrainingSettings,
)
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.augmentation import NO_AUGMENTATION, Augmentation
from fedzge_flwr.learning.numerics import precision, reproducible
from fedzge_flwr.learning.outputs import logits_of
from fedzge_flwr.learning.tensors import device_of


class OwnImages(NamedTuple):
    """A client's own images: uint8 (N, C, H, W), classes (N,), `log_class_prior` (K,) or None."""

    images_u8_NCHW: Tensor
    labels_N: Tensor
    log_prior_K: Tensor | None

    def loss(self, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
        """Return the cross-entropy in nats of logits (B, K) to labels (B,), prior added first."""
        if self.log_prior_K is not None:
            logits_NK = logits_NK + self.log_prior_K
        return F.cross_entropy(logits_NK, labels_N)

    def drawn(self, num_images: int, stream: torch.Generator) -> OwnImages:
        """Draw so many of the images, with replacement, from a CPU stream."""
        rows = torch.randint(len(self.labels_N), (num_images,), generator=stream)
        return self.chosen(rows.to(self.labels_N.device))

    def chosen(self, indices_B: Tensor) -> OwnImages:
        """Return the images of these indices (B,), with the same prior."""
        return self._replace(
            images_u8_NCHW=self.images_u8_NCHW[indices_B], labels_N=self.labels_N[indices_B]
        )


Answer: TypeAlias = Callable[[Tensor], Tensor]
"""Maps images (N, C, H, W) to float32 logits (N, K)."""


def answers_in(model: nn.Module, settings: OptimizerSettings) -> Answer:
    """Return the model's forward pass in the settings' ``training-precision``."""
    device = device_of(model)

    def answer(x_NCHW: Tensor) -> Tensor:
        with precision(settings.training_precision, device):
            return logits_of(model(x_NCHW))

    return answer


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: OptimizerSettings, lr: float
) -> Optimizer:
    """Return a fresh optimiser with learning rate ``lr``."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=lr)
    return torch.optim.SGD(
        parameters, lr=lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def make_schedule(
    optimizer: Optimizer, settings: OptimizerSettings, steps: Sequence[int]
) -> LRScheduler | None:
    """Return a schedule over epochs of a phase or rounds of a run, or None for a constant rate.

    Parameters
    ----------
    optimizer : Optimizer
        The optimiser that it drives.
    settings : OptimizerSettings
        "cosine" falls from the initial rate towards 0 at the end (Loshchilov & Hutter, 2017,
        arXiv 1608.03983, without restarts); "step" multiplies by ``lr-gamma`` after every
        ``lr-step-size`` epochs or rounds.
    steps : Sequence[int]
        How often the schedule's ``step`` is called in each of them, at least once.
    """
    if settings.lr_schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=sum(steps))
    if settings.lr_schedule == "step":
        size = settings.lr_step_size
        return MultiStepLR(
            optimizer, list(accumulate(steps))[size - 1 :: size], gamma=settings.lr_gamma
        )
    return None


def minibatches(num_images: int, batch_size: int, stream: torch.Generator) -> list[Tensor]:
    """Shuffle indices into batches of at most ``batch_size``, none of a single image.

    A last batch of one would stop batch norm, so it joins the batch before it (which then holds
    ``batch_size`` + 1).
    """
    batches = list(torch.randperm(num_images, generator=stream).split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        last = batches.pop()
        batches[-1] = torch.cat((batches[-1], last))
    return batches


def steps_an_epoch(num_images: int, batch_size: int) -> int:
    """Return how many batches `minibatches` makes; 1 without images."""
    full, rest = divmod(num_images, batch_size)
    return max(full + (rest > 1), 1)


def local_epochs(num_images: int, training: TrainingSettings) -> int:
    """Return a client's epochs in a round: ``local-epochs``, or more for ``min-local-steps``."""
    steps = steps_an_epoch(num_images, training.batch_size)
    return max(training.local_epochs, math.ceil(training.min_local_steps / steps))


@reproducible()
def fit(
    model: nn.Module,
    own: OwnImages,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    settings: OptimizerSettings,
    stream: torch.Generator,
    mixup: bool = False,
    augmentation: Augmentation = NO_AUGMENTATION,
) -> float:
    """Train a classifier on labelled images with a fresh optimiser whose schedule spans the call.

    Parameters
    ----------
    model : nn.Module
        Trained in place, in training mode; left in evaluation mode.
    own : OwnImages
        At least `MIN_TRAINING_IMAGES` images, on the model's device.
    epochs, batch_size, lr
        Passes over the images, images a step, initial learning rate.
    settings, stream
        Optimiser and schedule (one step of it an epoch); the stream of all draws.
    mixup, augmentation
        Whether to train on mixed pairs (`_mixed_loss`), and what changes images before that.

    Returns the mean cross-entropy over the last epoch, in nats; ValueError for too few images.
    """
    images_u8_NCHW, labels_N, _ = own
    if len(labels_N) < MIN_TRAINING_IMAGES:
        raise ValueError(f"{len(labels_N)} images; training needs {MIN_TRAINING_IMAGES}")
    optimizer = make_optimizer(model.parameters(), settings, lr)
    schedule = make_schedule(optimizer, settings, [1] * epochs)
    answer = answers_in(model, settings)
    model.train()
    for _ in range(epochs):
        loss_sum = torch.zeros((), device=images_u8_NCHW.device)
        for batch in minibatches(len(labels_N), batch_size, stream):
            optimizer.zero_grad(set_to_none=True)
            chosen = own.chosen(batch.to(images_u8_NCHW.device))
            x_NCHW = augmentation.applied(PIXEL_RANGE.from_uint8(chosen.images_u8_NCHW), stream)
            loss = (_mixed_loss if mixup else _plain_loss)(answer, x_NCHW, chosen, stream)
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(batch)
        if schedule is not None:
            schedule.step()
    model.eval()
    return float(loss_sum) / len(labels_N)


def _plain_loss(
    answer: Answer, x_NCHW: Tensor, batch: OwnImages, stream: torch.Generator
) -> Tensor:
    return batch.loss(answer(x_NCHW), batch.labels_N)


def _mixed_loss(
    answer: Answer, x_NCHW: Tensor, batch: OwnImages, stream: torch.Generator
) -> Tensor:
    """Return the loss on λx + (1−λ)x′, mixed alike: pairs from the batch, one λ ~ U(0, 1).

    Mixup is Zhang et al., 2018, arXiv 1710.09412, here with Beta(1, 1). It curbs overconfidence
    away from the training images (Thulasidasan et al., 2019, arXiv 1905.11001), where a server
    asks.
    """
    share = float(torch.rand((), generator=stream))
    partners = torch.randperm(len(batch.labels_N), generator=stream).to(batch.labels_N.device)
    logits_NK = answer(share * x_NCHW + (1 - share) * x_NCHW[partners])
    loss = batch.loss(logits_NK, batch.labels_N)
    mixed_in = batch.loss(logits_NK, batch.labels_N[partners])
    return share * loss + (1 - share) * mixed_in


def train_locally(
    model: nn.Module,
    images_u8_NCHW: Tensor,
    labels_N: Tensor,
    num_classes: int,
    settings: Settings,
    stream: torch.Generator,
) -> float:
    """Train as a run's settings say, for `local_epochs`.

    Takes at least `MIN_TRAINING_IMAGES` images, uint8 (N, C, H, W), and classes (N,), on the
    model's device; returns the mean cross-entropy over the last epoch in nats (`fit`).

    An epoch over few images is few steps; with many more steps of distillation between them such a
    client would forget its own data, and teach its peers nothing.
    """
    training = settings.training
    prior_K = log_class_prior(labels_N, num_classes) if training.logit_adjustment else None
    return fit(
        model,
        OwnImages(images_u8_NCHW, labels_N, prior_K),
        epochs=local_epochs(len(labels_N), training),
        batch_size=training.batch_size,
        lr=training.local_lr,
        settings=settings.optimizer,
        stream=stream,
        mixup=training.mixup,
        augmentation=Augmentation(training.random_shifts, training.random_erasing),
    )


def log_class_prior(labels_N: Tensor, num_classes: int, unseen: float = 0.01) -> Tensor:
    """Return log(πₖ + unseen), π the classes' frequencies: the shift of a logit-adjusted loss.

    A loss on f + log π teaches f the classes' likelihoods and leaves it free of their frequencies
    (Menon et al., 2021, arXiv 2007.07314; in federated learning Zhang et al., 2022, arXiv
    2209.00189).

    Parameters
    ----------
    labels_N : Tensor of int64
        The client's labels, at least one.
    num_classes : int
        Number of classes K.
    unseen : float
        Bounds the shift: by a hundredth, the loss still pushes down a class that the client has no
        image of, if only a little, and the model says what it knows by what it answers. By 0, the
        loss does not touch such a class at all, and what was learned of it from others stays.

    Returns
    -------
    Tensor
        float32 (K,); −∞ for a class without images if ``unseen`` is 0.
    """
    counts_K = torch.bincount(labels_N, minlength=num_classes).float()
    return (counts_K / len(labels_N) + unseen).log()
