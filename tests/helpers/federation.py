"""Clients that are plain functions: no Flower, no messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import PAPER, preset_file, read_settings
from fedzge_flwr.query.question import Question
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.server.build import build_central, build_generator, build_server
from fedzge_flwr.server.clients import ClientAccuracy, ClientAnswer, FloatArray
from fedzge_flwr.server.state import ServerState

CONFIG = {
    **read_settings(preset_file(PAPER)),
    "num-clients": 2,
    "synthetic-batch-size": 16,
    "latent-dim": 6,
    "generator-width": 4,
    "q": 2,
    "generator-lr": 0.01,
    "central-distill-steps": 3,
}


def linear_logits(images_BCHW: FloatArray) -> FloatArray:
    weights = np.random.default_rng(0).normal(size=(64, 10)) / 8
    return (images_BCHW.reshape(-1, 64) @ weights).astype(np.float32)


@dataclass
class FunctionClients:
    """Two clients that answer with a function of the images."""

    answer: Callable[[FloatArray], FloatArray] = linear_logits
    queries: list[FloatArray] = field(default_factory=list)
    distilled: list[tuple[FloatArray, FloatArray, float]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    foretold: list[bool] = field(default_factory=list)

    @property
    def num_examples(self) -> dict[int, int]:
        return {0: 30, 1: 10}

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        self.calls.append("ask")
        self.foretold.append(to_distill)
        self.queries.append(question.images_BCHW)
        # Client 1 answers twice client 0: the ensemble is 0.75·f + 0.25·2f = 1.25·f.
        logits = self.answer(question.images_BCHW)
        return {number: ClientAnswer((number + 1) * logits, 0.5) for number in partitions}

    def distill(
        self,
        round_: int,
        partitions: Sequence[int],
        targets: Targets,
    ) -> dict[int, float]:
        self.calls.append("distill")
        self.distilled.append((targets.images_NCHW, targets.logits_NK, targets.temperature))
        return dict.fromkeys(partitions, 0.1)

    def deliver(self, round_: int) -> dict[int, float]:
        self.calls.append("deliver")
        return {}

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str, num_logits: int
    ) -> dict[int, ClientAccuracy]:
        self.calls.append("evaluate")
        logits = np.ones((num_logits, 10), np.float32)
        return {n: ClientAccuracy(5, 0.5, (n + 1) * logits) for n in partitions}


def make_server(num_rounds: int = 4, **more: Any) -> ServerState:
    settings = from_run_config({**CONFIG, **more})
    return build_server(
        settings,
        build_central(settings),
        build_generator(settings),
        num_rounds=num_rounds,
        device=torch.device("cpu"),
        num_test_images=5,
    )


def no_report(round_: int, phase: str) -> None:
    """Nobody watches."""


def flat(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])
