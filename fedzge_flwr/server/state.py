"""What the server owns for a whole run, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedzge_flwr.common.arrays import Float64Array, FloatArray
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.losses import BoundObjective
from fedzge_flwr.learning.tensors import load_plain, plain_state
from fedzge_flwr.server.ensemble import Answers, Combination, check_combined
from fedzge_flwr.synthesis.memory import Memories
from fedzge_flwr.synthesis.sources import Source
from fedzge_flwr.zeroth_order.base import Estimator


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
    sources : Mapping[str, Source]
        Where images come from that no generator makes, by name: those that the settings name.
    memories : Memories, optional
        Past images, codes and answers; None without a memory.
    tendencies : dict[int, ndarray]
        Class tendencies of the clients that have answered so far, by partition.
    surprises : dict[str, float]
        How much the answers to each source's images surprised the central model, in nats.
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
    sources: Mapping[str, Source] = field(default_factory=dict)
    memories: Memories | None = None
    tendencies: dict[int, Float64Array] = field(default_factory=dict)
    surprises: dict[str, float] = field(default_factory=dict)
    num_test_images: int = 0
    num_queries: dict[int, int] = field(default_factory=dict)

    @property
    def chooser(self) -> nn.Module | None:
        """The central model, once it has taken a step: until then it has nothing to choose by."""
        return self.central if self.central_optimizer.state else None

    @property
    def told(self) -> Memories:
        """What sources go by: the memories, or empty ones without."""
        return self.memories or Memories.of(1)

    def step_generator(self) -> None:
        """Take a step with the gradient that the generator has, and one of its schedule."""
        self.generator_optimizer.step()
        if self.generator_schedule is not None:
            self.generator_schedule.step()

    def snapshot(self) -> dict[str, Any]:
        """Return all that changes in a run, for `restore`."""
        return {
            "central": plain_state(self.central),
            "generator": self.generator.state_dict(),
            "central_optimizer": self.central_optimizer.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "central_schedule": _state_of(self.central_schedule),
            "generator_schedule": _state_of(self.generator_schedule),
            "memories": self.memories and [memory.snapshot() for memory in self.memories],
            "tendencies": dict(self.tendencies),
            "surprises": dict(self.surprises),
            "num_queries": dict(self.num_queries),
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up what `snapshot` returned in a run of the same settings.

        Raises
        ------
        RuntimeError
            If the models are others.
        """
        load_plain(self.central, snapshot["central"])
        self.generator.load_state_dict(snapshot["generator"])
        self.central_optimizer.load_state_dict(snapshot["central_optimizer"])
        self.generator_optimizer.load_state_dict(snapshot["generator_optimizer"])
        for schedule, state in (
            (self.central_schedule, snapshot["central_schedule"]),
            (self.generator_schedule, snapshot["generator_schedule"]),
        ):
            if schedule is not None:
                schedule.load_state_dict(state)
        if self.memories is not None:
            for memory, kept in zip(self.memories, snapshot["memories"], strict=True):
                memory.restore(kept)
        self.tendencies = dict(snapshot["tendencies"])
        self.surprises = dict(snapshot["surprises"])
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
        temperature = self.settings.queries.answer_temperature if softened else 1.0
        # A copy: an ensemble may hand out a client's own answers, which are read-only.
        found = np.array(
            self.combine(Answers(logits, weights, self.tendencies, temperature)), dtype=np.float32
        )
        wanted = next(iter(logits.values())).shape
        check_combined(self.settings.queries.ensemble, found, wanted)
        return found


def _state_of(schedule: LRScheduler | None) -> dict[str, Any] | None:
    return None if schedule is None else schedule.state_dict()
