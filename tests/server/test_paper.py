"""The phases of a round, over clients that are plain functions: no Flower, no messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedzge_flwr.common.errors import DivergenceError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.learning.losses import OBJECTIVES
from fedzge_flwr.query.copies import copies_asked
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Queries, Question
from fedzge_flwr.server.clients import ClientAnswer, FloatArray
from fedzge_flwr.server.paper import PAPER, distill_central, generate_images
from fedzge_flwr.server.phases import (
    ask_clients,
    combine_answers,
    make_objective,
    run_round,
    update_generator,
)
from fedzge_flwr.server.round import Answered, Asked, SyntheticBatch
from fedzge_flwr.server.state import ServerState
from fedzge_flwr.zeroth_order.base import Estimate, Objective
from fedzge_flwr.zeroth_order.estimators import ESTIMATORS
from tests.helpers.federation import (
    CONFIG,
    FunctionClients,
    flat,
    linear_logits,
    make_server,
    no_report,
)

PHASES = [
    "sample_clients",
    "generate_images",
    "ask_clients",
    "combine_answers",
    "update_generator",
    "distill_central",
    "distill_clients",
    "deliver_targets",
    "evaluate_clients",
]


def asked_and_answered(server: ServerState, clients: FunctionClients) -> tuple[Asked, Answered]:
    """The first phases of round 1, with both clients."""
    asked = generate_images(server, 1)
    replies = ask_clients(server, clients, 1, (0, 1), asked.question)
    return asked, combine_answers(server, clients, 1, (0, 1), asked, replies)


def test_a_round_of_the_paper_in_order() -> None:
    server, clients = make_server(), FunctionClients()
    phases: list[str] = []
    current = run_round(PAPER, server, clients, 1, lambda round_, phase: phases.append(phase))
    assert clients.calls == ["ask", "distill", "deliver", "evaluate"]
    assert phases == list(current.seconds) == PHASES
    (images,) = clients.queries
    assert images.shape == (3 * 16, 1, 8, 8)
    base, perturbed = images[:16], images[16:].reshape(2, 16, -1)
    steps = np.linalg.norm(perturbed - base.reshape(16, -1), axis=2)
    np.testing.assert_allclose(steps, 1e-3, rtol=2e-3)
    ((distilled, targets, temperature),) = clients.distilled
    assert (distilled == base).all()
    np.testing.assert_allclose(targets, 1.25 * linear_logits(base), rtol=1e-5, atol=1e-6)
    assert temperature == 5.0
    assert current.evaluated.ensemble_logits_MK is not None
    np.testing.assert_allclose(current.evaluated.ensemble_logits_MK, 1.25)
    assert server.num_queries == {0: 48, 1: 48}


def test_generator_step_follows_the_estimate_down() -> None:
    """With the exact gradient for an estimate, one step must lower the objective."""

    class Exact:
        unbiased = True

        def ask(self, x_NCHW: Tensor, stream: torch.Generator, objective: Objective) -> Queries:
            return Queries(x_NCHW.numpy(), Directions.none((1, 8, 8), len(x_NCHW)), 1.0)

        def tell(self, queries: Queries, logits_BNK: Tensor, objective: Objective) -> Estimate:
            weights = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 10)) / 8).float()
            x = torch.from_numpy(queries.base_NCHW).clone().requires_grad_()
            ensemble = 1.25 * x.flatten(1) @ weights
            terms = objective.terms(x, ensemble, objective.central_logits(x))
            (gradient,) = torch.autograd.grad(terms["total"], x)
            return Estimate(gradient, terms)

    # Which asks about as many copies.
    server, clients = make_server(estimator="surrogate"), FunctionClients()
    server.estimator = Exact()
    asked, answered = asked_and_answered(server, clients)
    assert asked.generated is not None
    batch = asked.generated.batch

    def objective() -> float:
        x = server.generator(batch.z_ND, batch.y_N).detach()
        logits = torch.from_numpy(1.25 * linear_logits(x.numpy()))
        with torch.no_grad():
            made = make_objective(server, batch)
            return float(made.terms(x, logits, made.central_logits(x))["total"])

    before, parameters = objective(), flat(server.generator)
    update_generator(server, 1, asked, answered)
    assert objective() < before - 0.01
    # Adam's first step has the size of the learning rate wherever there is a gradient.
    moved = (flat(server.generator) - parameters).abs()
    assert float(moved.max()) == pytest.approx(0.01, rel=1e-2)


def test_one_optimiser_and_one_schedule_for_the_whole_run() -> None:
    server, clients = make_server(num_rounds=4), FunctionClients()
    rates = []
    for round_ in range(1, 5):
        rates.append(server.generator_optimizer.param_groups[0]["lr"])
        run_round(PAPER, server, clients, round_, no_report)
    cosine = [0.005 * (1 + np.cos(np.pi * t / 4)) for t in range(4)]
    assert rates == pytest.approx(cosine)
    state = next(iter(server.generator_optimizer.state.values()))
    assert int(state["step"]) == 4


def test_noise_labels_and_directions_are_new_in_every_round() -> None:
    server = make_server()
    rounds = []
    for round_ in (1, 2, 1):
        asked = generate_images(server, round_)
        assert asked.generated is not None
        directions = torch.from_numpy(asked.question.directions_QNCHW)
        rounds.append((asked.generated.batch.z_ND, asked.generated.batch.y_N, directions))
    for first, second, again in zip(*rounds, strict=True):
        assert not torch.equal(first, second)
        assert torch.equal(first, again)


def test_labels_are_uniform_and_noise_is_normal() -> None:
    server = make_server(**{"synthetic-batch-size": 4000})
    generated = generate_images(server, 1).generated
    assert generated is not None
    batch = generated.batch
    counts = torch.bincount(batch.y_N, minlength=10)
    assert int(counts.min()) > 330
    assert int(counts.max()) < 470
    assert float(batch.z_ND.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(batch.z_ND.std()) == pytest.approx(1.0, abs=0.03)


def test_central_model_distils_the_answers_on_the_unperturbed_images() -> None:
    def answer(images: FloatArray) -> FloatArray:
        logits = np.zeros((len(images), 10), np.float32)
        logits[:16, 3] = 20.0  # the base
        logits[16:, 7] = 20.0  # its perturbed copies
        return logits

    server = make_server(**{"central-distill-steps": 30, "temperature": 1.0})
    asked, answered = asked_and_answered(server, FunctionClients(answer))
    distill_central(server, 1, asked, answered)
    assert asked.generated is not None
    server.central.train()
    with torch.no_grad():
        answers = server.central(asked.generated.batch.x_NCHW.detach()).argmax(dim=1)
    assert (answers == 3).all()


def test_objective_leaves_the_central_model_alone() -> None:
    server, clients = make_server(), FunctionClients()
    before = {name: tensor.clone() for name, tensor in server.central.state_dict().items()}
    update_generator(server, 1, *asked_and_answered(server, clients))
    for name, tensor in server.central.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in server.central.parameters())


def test_weights_are_those_of_who_answered() -> None:
    class OneSilent(FunctionClients):
        def ask(
            self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
        ) -> dict[int, ClientAnswer]:
            return {1: super().ask(round_, partitions, question, to_distill=to_distill)[1]}

    server, clients = make_server(), OneSilent()
    current = run_round(PAPER, server, clients, 1, no_report)
    assert current.answered is not None
    assert current.answered.participants == (1,)
    ((base, targets, _),) = clients.distilled
    np.testing.assert_allclose(targets, 2 * linear_logits(base), rtol=1e-5, atol=1e-6)


class SomeRounded(FunctionClients):
    """Clients, some of whom round their logits: small steps change none."""

    rounded: tuple[int, ...] = (1,)

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        answers = super().ask(round_, partitions, question, to_distill=to_distill)
        return {
            n: replace(a, logits_BK=a.logits_BK.round()) if n in self.rounded else a
            for n, a in answers.items()
        }


@pytest.mark.parametrize("estimator", ["batch-difference", "per-image"])
def test_answers_that_do_not_move_are_left_out_of_the_gradient_only(estimator: str) -> None:
    server, clients = make_server(estimator=estimator), SomeRounded()
    before = flat(server.generator)
    current = run_round(PAPER, server, clients, 1, no_report)
    assert current.answered is not None
    assert current.answered.unmoved == (1,)
    (images,) = clients.queries
    wanted = linear_logits(images).reshape(3, 16, 10)
    assert current.answered.generated_logits_BNK is not None
    np.testing.assert_allclose(current.answered.generated_logits_BNK, wanted, rtol=1e-5, atol=1e-6)
    both = 0.75 * linear_logits(images[:16]) + 0.25 * (2 * linear_logits(images[:16])).round()
    np.testing.assert_allclose(current.answered.logits_NK, both, rtol=1e-5, atol=1e-6)
    assert not torch.equal(flat(server.generator), before)


def test_without_a_moving_answer_the_generator_waits_and_the_central_model_learns() -> None:
    server, clients = make_server(), SomeRounded()
    clients.rounded = (0, 1)
    generator, central = flat(server.generator), flat(server.central)
    current = run_round(PAPER, server, clients, 1, no_report)
    assert current.answered is not None
    assert current.learned is not None
    assert current.answered.unmoved == (0, 1)
    assert current.learned.step is None
    assert torch.equal(flat(server.generator), generator)
    assert not torch.equal(flat(server.central), central)


@pytest.mark.parametrize("more", [{}, {"estimator": "surrogate"}])
def test_moving_answers_are_all_heard(more: dict[str, Any]) -> None:
    current = run_round(PAPER, make_server(**more), FunctionClients(), 1, no_report)
    assert current.answered is not None
    assert current.answered.unmoved == ()


def test_a_diverged_central_model_is_one_clear_line() -> None:
    server = make_server(**{"central-lr": 1e30, "optimizer": "sgd"})
    with pytest.raises(DivergenceError, match=r"round 1: the central model diverged.*'central-lr'"):
        run_round(PAPER, server, FunctionClients(), 1, no_report)


def test_a_gradient_that_is_not_finite_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def senseless(images: Tensor, *others: Any) -> dict[str, Tensor]:
        return {"total": (images - images).sqrt().sum() / 0}

    monkeypatch.setitem(OBJECTIVES, "senseless", senseless)
    message = (
        "round 1: the generator's gradient is not finite, as estimator 'batch-difference' has it "
        "of objective 'senseless'"
    )
    with pytest.raises(DivergenceError, match=message):
        run_round(PAPER, make_server(objective="senseless"), FunctionClients(), 1, no_report)


def test_the_servers_layers_draw_from_the_seed() -> None:
    """Dropout takes no stream: it must not depend on what else has drawn."""

    def distilled(before: int, seed: int = 0) -> Tensor:
        server = make_server(seed=seed)
        torch.manual_seed(1)
        server.central = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(64, 10)
        )
        torch.manual_seed(before)
        run_round(PAPER, server, FunctionClients(), 1, no_report)
        assert torch.initial_seed() == before
        return flat(server.central)

    assert torch.equal(distilled(1), distilled(2))
    assert not torch.equal(distilled(1), distilled(1, seed=1))


@pytest.mark.parametrize("differences", ["forward", "central"])
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_serves_a_round(name: str, differences: str) -> None:
    """The cosine to the exact gradient is that of float32 answers, not only of exact ones."""
    more = {"estimator": name, "differences": differences, "directions": "rademacher", "q": 3}
    server, clients = make_server(**{**more, "eps": 0.01}), FunctionClients()
    with torch.no_grad():  # a central model that is the ensemble, but for its scale
        server.central = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
        weights = torch.from_numpy(linear_logits(np.eye(64, dtype=np.float32)))
        server.central[1].weight.copy_(0.5 * weights.T)
        server.central[1].bias.zero_()
    server.settings = from_run_config({**CONFIG, **more, "surrogate-shift": 0})
    asked, answered = asked_and_answered(server, clients)
    copies = copies_asked(name, 3, server.settings.queries.differences)
    assert server.num_queries[0] == copies * 16
    assert asked.generated is not None
    batch = asked.generated.batch
    objective = make_objective(server, batch)
    logits = torch.from_numpy(answered.generated_logits_BNK)
    estimate = server.estimator.tell(asked.generated.question, logits, objective)
    x = batch.x_NCHW.detach().requires_grad_()
    terms = objective.terms(x, 1.25 * x.flatten(1) @ weights, objective.central_logits(x))
    (exact,) = torch.autograd.grad(terms["total"], x)
    cosine = torch.nn.functional.cosine_similarity(
        estimate.gradient_NCHW.flatten(), exact.double().flatten(), dim=0
    )
    assert float(cosine) > {"guided": 0.99, "surrogate": 0.95, "per-image": 0.1}.get(name, -1.0)


def test_the_surrogate_is_the_central_model_averaged_over_small_shifts() -> None:
    server = make_server()
    batch = SyntheticBatch(torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64), torch.zeros(0))
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    server.central.train()
    moved = make_objective(server, batch).surrogate_logits(x)
    server.central.eval()
    assert not torch.equal(moved, server.central(x))
    shifts = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
    wanted = torch.stack([server.central(x.roll(step, (2, 3))) for step in shifts]).mean(dim=0)
    torch.testing.assert_close(moved, wanted)
    unmoved = make_server(**{"surrogate-shift": 0})
    torch.testing.assert_close(
        make_objective(unmoved, batch).surrogate_logits(x), unmoved.central.eval()(x)
    )
