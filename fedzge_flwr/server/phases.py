"""The phases that all recipes share (arXiv 2503.06028, algorithm 1).

A phase takes what it needs and returns what it makes; what it asks of clients goes through
`fedzge_flwr.server.clients.Clients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import TooFewClientsError
from fedzge_flwr.common.randomness import Purpose, numpy_stream, seeded_default, torch_stream
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.losses import detached
from fedzge_flwr.learning.numerics import exact_float32, reproducible
from fedzge_flwr.query.question import Question
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.server.checks import check_estimate, check_generated, check_question
from fedzge_flwr.server.clients import ClientAnswer, Clients
from fedzge_flwr.server.doubts import is_distribution
from fedzge_flwr.server.ensemble import ensemble_weights, update_tendencies
from fedzge_flwr.server.objective import BatchObjective
from fedzge_flwr.server.round import (
    Answered,
    Asked,
    Evaluated,
    Generated,
    GeneratorStep,
    Recipe,
    RoundState,
    SyntheticBatch,
)
from fedzge_flwr.server.state import ServerState


def sample_clients(server: ServerState, round_: int) -> tuple[int, ...]:
    """Sample max(⌈C·clients⌉, 1) clients, a function of (seed, round); return their partitions."""
    run = server.settings.run
    stream = numpy_stream(run.seed, Purpose.SAMPLING, round_=round_)
    chosen = stream.choice(run.num_clients, size=run.participants, replace=False)
    return tuple(sorted(int(partition) for partition in chosen))


def ask_clients(
    server: ServerState,
    clients: Clients,
    round_: int,
    sampled: Sequence[int],
    question: Question,
) -> dict[int, ClientAnswer]:
    """Have the sampled clients train on their own data, then answer on all copies of all images.

    Base and perturbed answers so come from the same clients.
    """
    for partition in sampled:
        asked = server.num_queries.get(partition, 0)
        server.num_queries[partition] = asked + question.num_images
    to_distill = clients_distill(server, round_)
    return clients.ask(round_, sampled, question, to_distill=to_distill)


def combine_answers(
    server: ServerState,
    clients: Clients,
    round_: int,
    sampled: Sequence[int],
    asked: Asked,
    replies: Mapping[int, ClientAnswer],
) -> Answered:
    """Combine the clients' logits into the ensemble's: of all images, and of generated copies.

    Raises
    ------
    TooFewClientsError
        If fewer than ``min-clients`` answered.
    """
    wanted = server.settings.run.min_clients
    if len(replies) < wanted:
        raise TooFewClientsError(
            f"round {round_}: {len(replies)} of {len(sampled)} clients answered, 'min-clients' = "
            f"{wanted}; the log has each one's reason"
        )
    rows = asked.question.base_rows_N
    logits = {partition: reply.logits_BK for partition, reply in replies.items()}
    base_logits = {partition: logits_BK[rows] for partition, logits_BK in logits.items()}
    update_tendencies(server.tendencies, base_logits)
    examples = clients.num_examples
    weights = ensemble_weights({partition: examples[partition] for partition in logits})
    logits_BK = server.combined(logits, weights)
    distills = clients_distill(server, round_)
    peer_logits_NK = server.combined(base_logits, weights, softened=False) if distills else None
    participants = tuple(sorted(logits))
    combined = Answered(
        participants,
        logits_BK[rows],
        peer_logits_NK,
        probabilities=tuple(p for p in participants if is_distribution(logits[p])),
    )
    if asked.generated is None:
        return combined
    # Whoever is not moved by ε knows nothing of the gradient.
    copies = {p: asked.question.of_perturbed(answers_BK) for p, answers_BK in logits.items()}
    unmoved = tuple(partition for partition in copies if _is_unmoved(copies[partition]))
    moving = [partition for partition in copies if partition not in unmoved]
    of_generated = asked.question.of_perturbed(logits_BK)
    if unmoved and moving:
        weights = ensemble_weights({partition: examples[partition] for partition in moving})
        flat = {p: copies[p].reshape(-1, logits_BK.shape[1]) for p in moving}
        of_generated = server.combined(flat, weights).reshape(of_generated.shape)
    return replace(combined, generated_logits_BNK=of_generated, unmoved=unmoved)


def _is_unmoved(logits_BNK: FloatArray) -> bool:
    """Whether perturbing an image changes no answer: trees do so, and rounded logits."""
    return len(logits_BNK) > 1 and bool((logits_BNK == logits_BNK[0]).all())


def update_generator(
    server: ServerState, round_: int, asked: Asked, answered: Answered
) -> GeneratorStep | None:
    """Estimate ∂L/∂x from the answers and back-propagate it from x into the generator.

    There is no step without generated images, nor without a client whose answers move within ε.
    """
    generated, logits_BNK = asked.generated, answered.generated_logits_BNK
    if generated is None or logits_BNK is None or not answered.moving:
        return None
    batch = generated.batch
    logits = torch.from_numpy(logits_BNK).to(server.device)
    with exact_float32(), reproducible():
        objective = make_objective(server, batch)
        estimate = server.estimator.tell(generated.question, logits, objective)
    check_estimate(server, estimate, batch.x_NCHW, round_)
    server.generator_optimizer.zero_grad(set_to_none=True)
    with reproducible():
        batch.x_NCHW.backward(estimate.gradient_NCHW.to(batch.x_NCHW.dtype))
    server.step_generator()
    return GeneratorStep(detached(estimate.base), float(estimate.gradient_NCHW.norm()))


def distill_clients(
    server: ServerState, clients: Clients, round_: int, asked: Asked, answered: Answered
) -> dict[int, float]:
    """Send the ensemble's logits back, for each client to distill from its peers.

    In the last rounds only (``client-distill-rounds``): clients that distill their own ensemble's
    answers on synthetic images round after round come to agree about those images rather than about
    real ones.
    """
    if answered.peer_logits_NK is None:
        return {}
    temperature = server.settings.distillation.temperature
    targets = Targets.on(asked.question, round_, answered.peer_logits_NK, temperature)
    return clients.distill(round_, answered.participants, targets)


def deliver_targets(server: ServerState, clients: Clients, round_: int) -> dict[int, float]:
    """Have clients catch up on distillation before they are evaluated, and after the last round."""
    evaluated = server.settings.run.client_evaluation != "off"
    if round_ == server.num_rounds or (evaluated and is_evaluation_round(server, round_)):
        return clients.deliver(round_)
    return {}


def evaluate_clients(
    server: ServerState, clients: Clients, round_: int, participants: Sequence[int]
) -> Evaluated:
    """On evaluation rounds, learn all clients' accuracies and this round's ensemble's test logits.

    Whether sampled or not, every client is asked; the ensemble is that of the participants.
    """
    split = server.settings.run.client_evaluation
    if split == "off" or not is_evaluation_round(server, round_):
        return Evaluated()
    num_logits = server.num_test_images if split == "test" else 0
    examples = clients.num_examples
    accuracies = clients.evaluate(round_, tuple(examples), split, num_logits)
    logits = {
        partition: accuracies[partition].logits_MK
        for partition in participants
        if num_logits and partition in accuracies
    }
    if not logits:
        return Evaluated(accuracies)
    weights = ensemble_weights({partition: examples[partition] for partition in logits})
    return Evaluated(accuracies, server.combined(logits, weights))


def run_round(
    recipe: Recipe,
    server: ServerState,
    clients: Clients,
    round_: int,
    on_phase: Callable[[int, str], None],
) -> RoundState:
    """Run one round.

    Parameters
    ----------
    recipe : Recipe
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
    current = RoundState(round_, on_phase)
    with seeded_default(server.settings.run.seed, Purpose.ROUND, round_=round_):
        try:
            recipe.run(server, clients, current)
        except TooFewClientsError as error:
            if server.settings.run.too_few_clients == "fail":
                raise
            current.skipped = str(error)
            # What earlier rounds put off is not lost with this one.
            current.distill_losses |= current.do(deliver_targets, server, clients, round_)
    return current


# -- what phases are made of ------------------------------------------------------------------


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
    z_ND = torch.randn(num_images, settings.images.latent_dim, generator=stream)
    y_N = torch.randint(settings.data.spec.num_classes, (num_images,), generator=stream)
    return z_ND, y_N


def question_about(
    server: ServerState, batch: SyntheticBatch, round_: int, *, levels: bool
) -> Generated:
    """Choose what is asked about generated images, as the clients shall see them.

    As levels, both sides and the memory hold the very same values, in a byte each; the gradient
    passes the rounding straight through.
    """
    x_NCHW = batch.x_NCHW.detach()
    if levels:
        x_NCHW = PIXEL_RANGE.from_uint8(PIXEL_RANGE.to_uint8(x_NCHW))
    stream = torch_stream(server.settings.run.seed, Purpose.DIRECTIONS, round_=round_)
    with exact_float32(), reproducible():
        question = server.estimator.ask(x_NCHW, stream, make_objective(server, batch))
    check_question(server, question, x_NCHW)
    if levels:
        question = question.about(PIXEL_RANGE.to_uint8(x_NCHW).cpu().numpy())
    return Generated(batch, question)


def make_objective(server: ServerState, batch: SyntheticBatch) -> BatchObjective:
    """Return the objective of a batch, as estimators take it."""
    queries = server.settings.queries
    return BatchObjective(
        server.central,
        batch.z_ND,
        batch.y_N,
        server.objective,
        queries.surrogate_shift,
        queries.gradient_batch_size,
    )


def clients_distill(server: ServerState, round_: int) -> bool:
    """Whether clients distill in a round."""
    distillation, run = server.settings.distillation, server.settings.run
    rounds = distillation.client_distill_rounds
    # A client that is sampled now and then has its share of a longer end.
    of_run = math.ceil(rounds * run.num_clients / run.participants) if rounds else server.num_rounds
    return distillation.client_distill_steps > 0 and round_ > server.num_rounds - of_run


def is_evaluation_round(server: ServerState, round_: int) -> bool:
    """Whether a round is one of every ``eval-every``, or the last."""
    return round_ % server.settings.run.eval_every == 0 or round_ == server.num_rounds
