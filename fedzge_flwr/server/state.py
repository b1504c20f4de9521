"""The server's state: what lives through a run, and what lives through a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.registry import lookup
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.losses import BoundObjective, LossTerms, ObjectiveWeights, bound_objective
from fedzge_flwr.learning.training import make_optimizer, make_schedule
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.clients import ClientAccuracy
from fedzge_flwr.server.ensemble import ENSEMBLES, Answers, Combination, Float64Array
from fedzge_flwr.synthesis.memory import Memory
from fedzge_flwr.zeroth_order.base import Estimator, Queries
from fedzge_flwr.zeroth_order.estimators import ESTIMATORS
from fedzge_flwr.zeroth_order.samplers import DIRECTIONS


@dataclass
class ServerState:
    """What the server owns for the whole run.

    Parameters
    ----------
    settings : Settings
        The run's settings.
    num_rounds : int
        Rounds R of the run: the span of the generator's schedule.
    device : torch.device
        Where generator and central model are.
    central : nn.Module
        The central model.
    generator : nn.Module
        Maps (noise (N, nz), labels (N,)) to images.
    generator_optimizer, generator_schedule
        One optimiser for the whole run, its schedule over all its steps.
    estimator : Estimator
        The zeroth-order estimator.
    objective : BoundObjective
        What the generator minimises.
    central_optimizer, central_schedule
        One optimiser for the whole run, its schedule over all distillation steps (the efficient
        recipe's; the paper's distillation starts afresh in each round).
    combine : Combination
        Makes the ensemble's logits from the clients'.
    memory : Memory, optional
        Past images and answers; None without a memory.
    tendencies : dict[int, ndarray]
        Class tendencies of the clients that have answered so far, by partition.
    num_test_images : int
        Size of the common test set, if the clients' ensemble is to be scored on it; else 0.
    num_queries : dict[int, int]
        Images that each client has been asked about so far, by partition; one that failed before it
        could be asked counts as asked.
    """

    settings: Settings
    num_rounds: int
    device: torch.device
    central: nn.Module
    generator: nn.Module
    generator_optimizer: Optimizer
    generator_schedule: LRScheduler | None
    estimator: Estimator
    objective: BoundObjective
    central_optimizer: Optimizer
    central_schedule: LRScheduler | None
    combine: Combination
    memory: Memory | None = None
    tendencies: dict[int, Float64Array] = field(default_factory=dict)
    num_test_images: int = 0
    num_queries: dict[int, int] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        settings: Settings,
        central: nn.Module,
        generator: nn.Module,
        *,
        num_rounds: int,
        device: torch.device,
        num_test_images: int = 0,
    ) -> ServerState:
        """Start a run with models as they are; they are moved to ``device``."""
        central.to(device).eval()
        generator.to(device)
        server, transfer = settings.server, settings.transfer
        free_steps = transfer.generator_steps if settings.run.recipe == "efficient" else 0
        optimizer = make_optimizer(generator.parameters(), settings.optimizer, server.generator_lr)
        central_optimizer = make_optimizer(
            central.parameters(), settings.optimizer, server.central_lr
        )
        sampler = lookup(DIRECTIONS, server.directions, "distribution of directions")
        return cls(
            settings=settings,
            num_rounds=num_rounds,
            num_test_images=num_test_images,
            device=device,
            central=central,
            generator=generator,
            generator_optimizer=optimizer,
            generator_schedule=make_schedule(
                optimizer, settings.optimizer, num_rounds, steps_each=1 + free_steps
            ),
            central_optimizer=central_optimizer,
            central_schedule=make_schedule(
                central_optimizer,
                settings.optimizer,
                num_rounds,
                steps_each=server.central_distill_steps,
            ),
            combine=lookup(ENSEMBLES, server.ensemble, "ensemble"),
            memory=Memory(transfer.memory_size) if transfer.memory_size else None,
            estimator=lookup(ESTIMATORS, server.estimator, "estimator")(
                sampler, server.q, server.eps, server.differences
            ),
            objective=objective_of(settings),
        )

    def snapshot(self) -> dict[str, Any]:
        """Return all that changes in a run, for `restore`."""
        return {
            "central": self.central.state_dict(),
            "generator": self.generator.state_dict(),
            "central_optimizer": self.central_optimizer.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "central_schedule": _state_of(self.central_schedule),
            "generator_schedule": _state_of(self.generator_schedule),
            "memory": (self.memory.images_u8_MCHW, self.memory.logits_MK) if self.memory else None,
            "tendencies": dict(self.tendencies),
            "num_queries": dict(self.num_queries),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up what `snapshot` returned in a run of the same settings.

        Raises
        ------
        RuntimeError
            If the models are others.
        """
        self.central.load_state_dict(snapshot["central"])
        self.generator.load_state_dict(snapshot["generator"])
        self.central_optimizer.load_state_dict(snapshot["central_optimizer"])
        self.generator_optimizer.load_state_dict(snapshot["generator_optimizer"])
        for schedule, state in (
            (self.central_schedule, snapshot["central_schedule"]),
            (self.generator_schedule, snapshot["generator_schedule"]),
        ):
            if schedule is not None:
                schedule.load_state_dict(state)
        if self.memory is not None and snapshot["memory"] is not None:
            self.memory.restore(*snapshot["memory"])
        self.tendencies = dict(snapshot["tendencies"])
        self.num_queries = dict(snapshot["num_queries"])

    def combined(
        self,
        logits: Mapping[int, FloatArray],
        weights: Mapping[int, float],
        *,
        softened: bool = True,
    ) -> FloatArray:
        """Return the ensemble's logits (N, K) from clients' (N, K) by partition.

        Softened by ``answer-temperature`` is what the server learns from. Clients are the experts
        themselves, at their own temperature: softened answers of their peers would flatten them.

        Raises
        ------
        ConfigError
            If the ensemble is not finite or not of the answers' shape, as one from outside the
            package may be.
        """
        server = self.settings.server
        temperature = server.answer_temperature if softened else 1.0
        # A copy: an ensemble may hand out a client's own answers, which are read-only.
        found = np.array(
            self.combine(Answers(logits, weights, self.tendencies, temperature)), dtype=np.float32
        )
        wanted = next(iter(logits.values())).shape
        if found.shape != wanted:
            raise ConfigError(
                f"ensemble '{server.ensemble}' returned shape {found.shape} for logits of shape "
                f"{wanted}: return as many"
            )
        if not np.isfinite(found).all():
            raise ConfigError(
                f"ensemble '{server.ensemble}' returned values that are not finite: bound them"
            )
        return found


def objective_of(settings: Settings) -> BoundObjective:
    """Return the generator's objective, with T and β as the settings have them."""
    server = settings.server
    weights = ObjectiveWeights(server.temperature, server.beta1, server.beta2, server.beta3)
    return bound_objective(server.objective, weights)


def _state_of(schedule: LRScheduler | None) -> dict[str, Any] | None:
    return None if schedule is None else schedule.state_dict()


@dataclass(frozen=True)
class SyntheticBatch:
    """The images generated in a round.

    Parameters
    ----------
    z_ND, y_N : Tensor
        Noise and labels.
    x_NCHW : Tensor
        The images, with the generator's graph behind them.
    """

    z_ND: Tensor
    y_N: Tensor
    x_NCHW: Tensor


@dataclass(frozen=True)
class TransferBatch:
    """Images and the ensemble's logits on them.

    Parameters
    ----------
    x_NCHW : Tensor
        Images on the server's device, without graph.
    logits_NK : ndarray of float32
        The ensemble's logits, softened: what the central model distils.
    peer_logits_NK : ndarray of float32
        The ensemble's logits as they are: what clients distil.
    """

    x_NCHW: Tensor
    logits_NK: FloatArray
    peer_logits_NK: FloatArray


@dataclass
class RoundState:
    """What one round gathers, phase by phase.

    Parameters
    ----------
    round : int
        From 1.
    sampled : tuple of int
        The sampled clients, in order of partition.
    participants : tuple of int
        Those of them that are still in: after the query, those that answered it.
    train_losses : dict[int, float | None]
        Of those that answered; None of those that have too few images to train on.
    batch, queries : SyntheticBatch, Queries, optional
        Generated images, and what is asked about them; None if none were generated.
    others_NCHW : Tensor, optional
        Images of other origin, on the CPU, each asked about once.
    question : Question, optional
        All that the clients are asked.
    unmoved : tuple of int
        Participants whose answers were the same on all copies of all generated images; they are
        left out of ``ensemble_logits_BNK``.
    ensemble_logits_BNK : ndarray of float32, optional
        The ensemble's logits on ``queries``.
    transfer : TransferBatch, optional
        All unperturbed images of the round with the ensemble's logits: what is distilled.
    """

    round: int
    sampled: tuple[int, ...] = ()
    participants: tuple[int, ...] = ()
    train_losses: dict[int, float | None] = field(default_factory=dict)
    batch: SyntheticBatch | None = None
    queries: Queries | None = None
    others_NCHW: Tensor | None = None
    question: Question | None = None
    unmoved: tuple[int, ...] = ()
    ensemble_logits_BNK: FloatArray | None = None
    transfer: TransferBatch | None = None
    weights: dict[int, float] = field(default_factory=dict)
    terms: LossTerms | None = None
    gradient_norm: float | None = None
    central_distill_loss: float | None = None
    distill_losses: dict[int, float] = field(default_factory=dict)
    accuracies: dict[int, ClientAccuracy] = field(default_factory=dict)
    ensemble_test_logits_MK: FloatArray | None = None
    skipped: str | None = None
    seconds: dict[str, float] = field(default_factory=dict)
