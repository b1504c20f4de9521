"""One round of FedZGE as a list of phases over one state (arXiv 2503.06028, algorithm 1).

A phase reads and extends the round's state; what it asks of clients goes through `Clients`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import TooFewClientsError
from fedzge_flwr.common.randomness import Purpose, numpy_stream, seeded_default, torch_stream
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.distillation import distil
from fedzge_flwr.learning.losses import detached
from fedzge_flwr.learning.numerics import exact_float32, reproducible
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.checks import check_central, check_estimate, check_generated, check_queries
from fedzge_flwr.server.clients import Clients
from fedzge_flwr.server.ensemble import ensemble_weights, update_tendencies
from fedzge_flwr.server.objective import BatchObjective
from fedzge_flwr.server.state import RoundState, ServerState, SyntheticBatch, TransferBatch

Phase: TypeAlias = Callable[[ServerState, Clients, RoundState], None]

T = TypeVar("T")


def sample_clients(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Sample max(⌈C·clients⌉, 1) clients, a function of (seed, round)."""
    run = server.settings.run
    stream = numpy_stream(run.seed, Purpose.SAMPLING, round_=current.round)
    chosen = stream.choice(run.num_clients, size=run.participants, replace=False)
    current.sampled = current.participants = tuple(sorted(int(number) for number in chosen))


def synthesise(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Generate the round's images and choose the queries."""
    settings = server.settings
    stream = torch_stream(settings.run.seed, Purpose.LATENT, round_=current.round)
    current.batch = generate(server, settings.server.synthetic_batch_size, stream)
    choose_queries(server, current, current.batch.x_NCHW.detach())


def choose_queries(server: ServerState, current: RoundState, x_NCHW: Tensor) -> None:
    """Choose what is asked about the round's generated images, as the clients shall see them."""
    settings = server.settings
    if settings.run.wire == "compact":
        x_NCHW = on_levels(x_NCHW)
    directions = torch_stream(settings.run.seed, Purpose.DIRECTIONS, round_=current.round)
    with exact_float32(), reproducible():
        queries = server.estimator.ask(
            x_NCHW, directions, make_objective(server, present(current.batch))
        )
    check_queries(server, queries, x_NCHW)
    current.queries = queries


def on_levels(x_NCHW: Tensor) -> Tensor:
    """Return images rounded to the 256 levels of the shared pixel range."""
    return PIXEL_RANGE.from_uint8(PIXEL_RANGE.to_uint8(x_NCHW))


def generate(server: ServerState, num_images: int, stream: torch.Generator) -> SyntheticBatch:
    """Draw noise and labels (`draw_noise`), and generate x = G(z, y)."""
    z_ND, y_N = draw_noise(server.settings, num_images, stream)
    z_ND, y_N = z_ND.to(server.device), y_N.to(server.device)
    server.generator.train()
    x_NCHW = server.generator(z_ND, y_N)
    check_generated(server, x_NCHW, num_images)
    return SyntheticBatch(z_ND, y_N, x_NCHW)


def draw_noise(
    settings: Settings, num_images: int, stream: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw z ~ N(0, I), (N, nz), and y uniform over classes, (N,), both on the CPU."""
    z_ND = torch.randn(num_images, settings.server.latent_dim, generator=stream)
    y_N = torch.randint(settings.data.spec.num_classes, (num_images,), generator=stream)
    return z_ND, y_N


def ask_clients(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Have the participants train on their own data, then answer on all copies of all images.

    Base and perturbed answers so come from the same clients, under the same weights.
    """
    question = current.question = _question(current)
    for partition in current.participants:
        asked = server.num_queries.get(partition, 0)
        server.num_queries[partition] = asked + question.num_images
    to_distill = clients_distil(server, current.round)
    answers = clients.ask(current.round, current.participants, question, to_distill=to_distill)
    current.distill_losses = {
        number: answer.distill_loss
        for number, answer in answers.items()
        if answer.distill_loss is not None
    }
    _keep_only(server, current, answers)
    logits = {number: answer.logits_BK for number, answer in answers.items()}
    current.train_losses = {number: answer.train_loss for number, answer in answers.items()}
    examples = clients.num_examples
    current.weights = ensemble_weights({number: examples[number] for number in answers})
    rows = question.base_rows_N
    base_logits = {number: value[rows] for number, value in logits.items()}
    update_tendencies(server.tendencies, base_logits)
    logits_BK = server.combined(logits, current.weights)
    current.transfer = TransferBatch(
        torch.from_numpy(question.base_NCHW).to(server.device),
        logits_BK[rows],
        server.combined(base_logits, current.weights, softened=False),
    )
    if current.queries is not None:
        shape = (question.copies, question.num_perturbed, -1)
        of_generated = {
            number: value[: shape[0] * shape[1]].reshape(shape) for number, value in logits.items()
        }
        current.unmoved = tuple(n for n, value in of_generated.items() if _is_unmoved(value))
        current.ensemble_logits_BNK = logits_BK[: shape[0] * shape[1]].reshape(shape)
        moving = [number for number in of_generated if number not in current.unmoved]
        if current.unmoved and moving:
            weights = ensemble_weights({number: examples[number] for number in moving})
            copies_BK = {
                number: of_generated[number].reshape(-1, logits_BK.shape[1]) for number in moving
            }
            current.ensemble_logits_BNK = server.combined(copies_BK, weights).reshape(shape)


def _is_unmoved(logits_BNK: FloatArray) -> bool:
    """Whether perturbing an image changes no answer: trees do so, and rounded logits."""
    return len(logits_BNK) > 1 and bool((logits_BNK == logits_BNK[0]).all())


def _question(current: RoundState) -> Question:
    """Return all that is asked: the generated images in copies, the others once."""
    queries, others = current.queries, current.others_NCHW
    base = [] if queries is None else [queries.base_NCHW.cpu()]
    base_NCHW = torch.cat(base if others is None else [*base, others]).numpy()
    if queries is None:
        channels, height, width = base_NCHW.shape[1:]
        nothing = Directions.none((channels, height, width))
        return Question(base_NCHW, nothing, 1.0, two_sided=False)
    return Question(
        base_NCHW,
        queries.directions,
        queries.eps,
        two_sided=queries.differences == "central",
    )


def update_generator(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Estimate ∂L/∂x from the answers and back-propagate it from x into the generator.

    Clients whose answers do not move within ε know nothing of the gradient: without any other there
    is no step.
    """
    if current.participants and set(current.unmoved) == set(current.participants):
        return
    batch = present(current.batch)
    logits_BNK = torch.from_numpy(present(current.ensemble_logits_BNK)).to(server.device)
    with exact_float32(), reproducible():
        estimate = server.estimator.tell(
            present(current.queries), logits_BNK, make_objective(server, batch)
        )
    check_estimate(server, estimate, batch.x_NCHW, current.round)
    server.generator_optimizer.zero_grad(set_to_none=True)
    with reproducible():
        batch.x_NCHW.backward(estimate.gradient_NCHW.to(batch.x_NCHW.dtype))
    server.generator_optimizer.step()
    if server.generator_schedule is not None:
        server.generator_schedule.step()
    current.terms = detached(estimate.base)
    current.gradient_norm = float(estimate.gradient_NCHW.norm())


def make_objective(server: ServerState, batch: SyntheticBatch) -> BatchObjective:
    """Return the objective of a batch, as estimators take it."""
    settings = server.settings.server
    return BatchObjective(
        server.central,
        batch,
        server.objective,
        settings.surrogate_shift,
        settings.gradient_batch_size,
    )


def distil_central(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Distil the ensemble's answers on x into the central model, E2 steps with a new optimiser."""
    settings = server.settings
    transfer = present(current.transfer)
    current.central_distill_loss = distil(
        server.central,
        transfer.x_NCHW,
        torch.from_numpy(transfer.logits_NK).to(server.device),
        steps=settings.server.central_distill_steps,
        batch_size=settings.client.distill_batch_size,
        temperature=settings.server.temperature,
        lr=settings.server.central_lr,
        settings=settings.optimizer,
        stream=torch_stream(settings.run.seed, Purpose.CENTRAL_DISTILLATION, round_=current.round),
        class_balance=settings.client.class_balance,
    )
    check_central(server, current.round)


def distil_clients(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Send x and the ensemble's logits back, for each client to distil from its peers.

    In the last rounds only (``client-distill-rounds``): clients that distil their own ensemble's
    answers on synthetic images round after round come to agree about those images rather than about
    real ones.
    """
    if not clients_distil(server, current.round):
        return
    current.distill_losses |= clients.distill(
        current.round,
        current.participants,
        present(current.question),
        present(current.transfer).peer_logits_NK,
        server.settings.server.temperature,
    )


def deliver_targets(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Have clients catch up on distillation before they are evaluated, and after the last round."""
    evaluated = server.settings.run.client_evaluation != "off"
    last = current.round == server.num_rounds
    if last or (evaluated and is_evaluation_round(server, current.round)):
        current.distill_losses |= clients.deliver(current.round)


def clients_distil(server: ServerState, round_: int) -> bool:
    """Whether clients distil in a round."""
    client, run = server.settings.client, server.settings.run
    rounds = client.client_distill_rounds
    # A client that is sampled now and then has its share of a longer end.
    of_run = math.ceil(rounds * run.num_clients / run.participants) if rounds else server.num_rounds
    return client.client_distill_steps > 0 and round_ > server.num_rounds - of_run


def evaluate_clients(server: ServerState, clients: Clients, current: RoundState) -> None:
    """On evaluation rounds, learn all clients' accuracies and this round's ensemble's test logits.

    Whether sampled or not, every client is asked; the ensemble is that of the participants.
    """
    split = server.settings.run.client_evaluation
    if split == "off" or not is_evaluation_round(server, current.round):
        return
    num_logits = server.num_test_images if split == "test" else 0
    examples = clients.num_examples
    current.accuracies = clients.evaluate(current.round, tuple(examples), split, num_logits)
    logits = {
        number: current.accuracies[number].logits_MK
        for number in current.participants
        if num_logits and number in current.accuracies
    }
    if logits:
        weights = ensemble_weights({number: examples[number] for number in logits})
        current.ensemble_test_logits_MK = server.combined(logits, weights)


def is_evaluation_round(server: ServerState, round_: int) -> bool:
    """Whether a round is one of every ``eval-every``, or the last."""
    return round_ % server.settings.run.eval_every == 0 or round_ == server.num_rounds


PAPER_ROUND: tuple[Phase, ...] = (
    sample_clients,
    synthesise,
    ask_clients,
    update_generator,
    distil_central,
    distil_clients,
    deliver_targets,
    evaluate_clients,
)


def run_round(
    phases: Sequence[Phase],
    server: ServerState,
    clients: Clients,
    round_: int,
    on_phase: Callable[[int, str], None],
) -> RoundState:
    """Run the phases of one round.

    Parameters
    ----------
    phases : Sequence[Phase]
        One of `fedzge_flwr.server.build.RECIPES`.
    server : ServerState
        The run's state, updated in place.
    clients : Clients
        The federation.
    round_ : int
        From 1.
    on_phase : Callable[[int, str], None]
        Called with round and name before each phase.

    Returns
    -------
    RoundState
        What the round gathered; ``skipped`` says why it ended early, if ``too-few-clients`` is
        "skip".

    Raises
    ------
    TooFewClientsError
        If fewer than ``min-clients`` answer and ``too-few-clients`` is "fail".
    DivergenceError
        If generator or central model diverge.
    """
    current = RoundState(round=round_)
    with seeded_default(server.settings.run.seed, Purpose.ROUND, round_=round_):
        _run_phases(phases, server, clients, current, on_phase)
    return current


def _run_phases(
    phases: Sequence[Phase],
    server: ServerState,
    clients: Clients,
    current: RoundState,
    on_phase: Callable[[int, str], None],
) -> None:
    for phase in phases:
        on_phase(current.round, phase.__name__)
        started = time.perf_counter()
        try:
            phase(server, clients, current)
        except TooFewClientsError as error:
            if server.settings.run.too_few_clients == "fail":
                raise
            current.skipped = str(error)
            # What earlier rounds put off is not lost with this one.
            deliver_targets(server, clients, current)
            break
        finally:
            current.seconds[phase.__name__] = time.perf_counter() - started


def _keep_only(server: ServerState, current: RoundState, answered: dict[int, T]) -> None:
    """Leave whoever did not answer out of the rest of the round."""
    current.participants = tuple(sorted(answered))
    if len(answered) < server.settings.run.min_clients:
        raise TooFewClientsError(
            f"round {current.round}: {len(answered)} of {len(current.sampled)} clients answered, "
            f"'min-clients' = {server.settings.run.min_clients}; the log has each one's reason"
        )


def present(value: T | None) -> T:
    """Return what an earlier phase put into the round's state."""
    if value is None:
        raise RuntimeError("phases out of order")
    return value
