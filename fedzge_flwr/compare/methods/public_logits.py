"""Methods that learn from logits on public images: FedMD and FedDF."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg

from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.common.errors import ComparisonError
from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.compare.method import Keys, Method, plain_steps_in_every_round
from fedzge_flwr.compare.methods.weights import (
    ARRAYS,
    register_weights,
    run_strategy,
    weights_of,
    with_weights,
)
from fedzge_flwr.compare.plan import Plan
from fedzge_flwr.compare.public import PUBLIC
from fedzge_flwr.compare.session import Session
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.grid.clients import GridClients
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.distillation import distill
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.query.question import Question
from fedzge_flwr.query.targets import Targets

Combine: TypeAlias = Callable[[FloatArray], FloatArray]
"""Makes of all clients' logits (P, N, K) those that clients distill, float32 (N, K)."""


def learn_from_each_other(
    session: Session, images: ByteArray, combine: Combine, *, temperature: float
) -> None:
    """Run rounds in which clients train, answer on images, and distill what the answers make.

    Parameters
    ----------
    session : Session
        The run.
    images : ndarray of uint8
        What clients are asked about in every round, (N, C, H, W).
    combine : Combine
        Makes what clients distill.
    temperature : float
        T of that distillation.
    """
    settings, labels_M = session.settings, session.evaluation.labels_M
    clients = GridClients(
        session.grid, settings, settings.run.exchange_timeout, secrets.token_hex(16)
    )
    clients.channel.gather()
    partitions, question = tuple(clients.num_examples), Question.unperturbed(images)
    for round_ in range(1, settings.run.num_server_rounds + 1):
        answers = clients.ask(round_, partitions, question, to_distill=True)
        together_NK = combine(_stacked(round_, partitions, answers, "logits_BK"))
        targets = Targets.on(question, round_, together_NK, temperature)
        clients.distill(round_, partitions, targets)
        if session.evaluated(round_):
            clients.deliver(round_)
            found = clients.evaluate(round_, partitions, "test", len(labels_M))
            logits_PMK = _stacked(round_, partitions, found, "logits_MK")
            session.record(
                round_,
                ensemble=float((logits_PMK.mean(axis=0).argmax(axis=1) == labels_M).mean()),
                mean_client=float((logits_PMK.argmax(axis=2) == labels_M).mean()),
                queries=round_ * len(images),
            )
        clients.channel.close_round()


def _stacked(
    round_: int, partitions: Sequence[int], found: Mapping[int, Any], name: str
) -> FloatArray:
    """Return an array of all clients' replies, (P, …).

    Raises
    ------
    ComparisonError
        If one did not answer.
    """
    missing = [partition for partition in partitions if partition not in found]
    if missing:
        raise ComparisonError(f"round {round_}: client {missing[0]} did not answer; see the log")
    return np.stack([getattr(found[partition], name) for partition in partitions])


def mean_logits(logits_PNK: FloatArray) -> FloatArray:
    """Return the mean of clients' logits (P, N, K): what FedMD's clients distill."""
    mean_NK: FloatArray = logits_PNK.mean(axis=0)
    return mean_NK


def run_fedmd(public: str, session: Session) -> None:
    """Have clients answer on public images, and distill the mean of the answers."""
    settings = session.settings
    images = PUBLIC[public](settings.data, settings.images.synthetic_batch_size)
    temperature = settings.distillation.temperature
    learn_from_each_other(session, images, mean_logits, temperature=temperature)


def train_and_distill_in_every_round(_settings: Settings, plan: Plan) -> Keys:
    """Return the keys of a client whose steps of both kinds are spread over all rounds."""
    return {
        "local-rounds": 0,
        "local-epochs": plan.epochs(plan.training, plan.rounds),
        "min-local-steps": 0,
        "client-distill-rounds": 0,
        "client-distill-steps": round(plan.distilling / plan.rounds),
    }


_MOST_IMAGES = 12_000
"""That FedDF answers about: each average costs an answer of every client's model on all of them."""


class FedDF(FedAvg):
    """FedAvg whose average goes on to distill the mean logits of what it averages.

    Parameters
    ----------
    session : Session
        The run.
    public : str
        The public images.
    **options
        As for `FedAvg`.
    """

    def __init__(self, session: Session, public: str, **options: Any) -> None:
        super().__init__(**options)
        settings = session.settings
        self._settings = settings
        self._student, self._teacher = session.central_model(), session.central_model()
        images = PUBLIC[public](settings.data, _MOST_IMAGES)
        device = select_device(settings.run.server_device)
        self._images_NCHW = PIXEL_RANGE.from_uint8(torch.from_numpy(images).to(device))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average, and distill."""
        kept = list(replies)
        arrays, metrics = super().aggregate_train(server_round, kept)
        if arrays is None:
            return arrays, metrics
        answers = [
            self._answers(reply.content.array_records[ARRAYS])
            for reply in kept
            if reply.has_content()
        ]
        distillation = self._settings.distillation
        distill(
            with_weights(self._student, arrays).to(self._images_NCHW.device),
            self._images_NCHW,
            torch.stack(answers).mean(dim=0),
            steps=distillation.central_distill_steps,
            batch_size=distillation.distill_batch_size,
            temperature=1.0,
            lr=distillation.central_lr,
            settings=self._settings.optimizer,
            stream=torch_stream(
                self._settings.run.seed, Purpose.CENTRAL_DISTILLATION, round_=server_round
            ),
        )
        return weights_of(self._student), metrics

    def _answers(self, arrays: ArrayRecord) -> torch.Tensor:
        model = with_weights(self._teacher, arrays).to(self._images_NCHW.device)
        return predict(model, self._images_NCHW, self._settings.queries.query_batch_size)


def run_feddf(public: str, session: Session) -> None:
    """Run `FedDF`."""
    run_strategy(partial(FedDF, session, public), session)


def fedmd(public: str) -> Method:
    """Return FedMD on public images of `PUBLIC`."""
    return Method(
        f"FedMD, {public}",
        partial(run_fedmd, public),
        leaves="logits on public images",
        source="Li and Wang, 2019, arXiv 1910.03581",
        figure="mean client",
        public_data=True,
        client_keys=train_and_distill_in_every_round,
    )


def feddf(public: str) -> Method:
    """Return FedDF on public images of `PUBLIC`."""
    return Method(
        f"FedDF, {public}",
        partial(run_feddf, public),
        leaves="weights",
        source="Lin et al., 2020, arXiv 2006.07242",
        several_architectures=False,
        public_data=True,
        client_keys=plain_steps_in_every_round,
        endpoints=register_weights,
    )
