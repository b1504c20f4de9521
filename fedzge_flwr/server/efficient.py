"""The efficient round, phase by phase: more images for the queries, more steps for the answers.

One generator step a round on one batch teaches next to nothing, so each answer is kept and used
many times, and images come from several sources, of which those that learn are told the answers.
Each part has a key that switches it off (`docs/evidence.md`).
"""

from __future__ import annotations

import numpy as np
import torch

from fedzge_flwr.common.errors import DivergenceError
from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.distillation import distill_levels
from fedzge_flwr.learning.numerics import reproducible
from fedzge_flwr.learning.outputs import logits_of
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.checks import check_central
from fedzge_flwr.server.clients import Clients
from fedzge_flwr.server.phases import (
    ask_clients,
    combine_answers,
    deliver_targets,
    distill_clients,
    evaluate_clients,
    generate,
    question_about,
    sample_clients,
    update_generator,
)
from fedzge_flwr.server.round import Answered, Asked, Learned, Recipe, RoundState
from fedzge_flwr.server.state import ServerState
from fedzge_flwr.server.steps import central_steps
from fedzge_flwr.synthesis.composition import Composition, image_counts
from fedzge_flwr.synthesis.favour import favoured, noted, surprises

_GENERATOR_BATCH = 64


def efficient_round(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Run the efficient round."""
    do, round_ = current.do, current.round
    current.sampled = do(sample_clients, server, round_)
    current.asked = asked = do(compose_images, server, round_)
    current.replies = do(ask_clients, server, clients, round_, current.sampled, asked.question)
    current.answered = answered = do(
        combine_answers, server, clients, round_, current.sampled, asked, current.replies
    )
    step = do(update_generator, server, round_, asked, answered)
    do(remember, server, asked, answered)
    loss = do(distill_central, server, round_, asked, answered)
    do(train_generator, server, round_)
    current.learned = Learned(step, loss)
    current.distill_losses |= do(distill_clients, server, clients, round_, asked, answered)
    current.distill_losses |= do(deliver_targets, server, clients, round_)
    current.evaluated = do(evaluate_clients, server, clients, round_, answered.participants)


def compose_images(server: ServerState, round_: int) -> Asked:
    """Gather the round's images as levels: generated ones, then those of the other sources."""
    images, shape = server.settings.images, server.settings.data.spec.image_shape
    counts = image_counts(images)
    drawn = Composition(
        *(server.sources, shape, server.told, server.chooser, images.candidates),
        _stream(server, Purpose.IMAGES, round_),
    ).drawn(favoured(counts.others, server.surprises, images.surprise_power))
    others = PIXEL_RANGE.to_uint8(drawn.images_NCHW).numpy()
    if not counts.generated:
        return Asked(Question.unperturbed(others), None, drawn.codes_ED, drawn.counts)
    batch = generate(server, counts.generated, _stream(server, Purpose.LATENT, round_))
    generated = question_about(server, batch, round_, levels=True)
    question = generated.question.about(np.concatenate((generated.question.base, others)))
    return Asked(question, generated, drawn.codes_ED, drawn.counts)


def remember(server: ServerState, asked: Asked, answered: Answered) -> None:
    """Note which sources surprised, and put images, codes and answers into the memories."""
    first, levels = asked.num_generated, torch.from_numpy(asked.question.base)
    logits_NK = torch.from_numpy(answered.logits_NK)
    if server.chooser is not None and server.settings.images.surprise_power:
        found = surprises(server.chooser, levels[first:], logits_NK[first:], asked.counts)
        server.surprises = noted(server.surprises, found)
    if server.memories is not None:
        server.memories.add(levels, logits_NK, asked.codes_ED, first)


def distill_central(server: ServerState, round_: int, asked: Asked, answered: Answered) -> float:
    """Take minibatch steps over the memory with the run's one optimiser and schedule.

    Answers that are kept and drawn from many times, evenly over classes, are experience replay
    (Lin, 1992, "Self-improving reactive agents based on reinforcement learning"). Without a memory
    they are the round's own. Returns the mean loss over the steps.
    """
    distillation = server.settings.distillation
    levels, logits_MK = torch.from_numpy(asked.question.base), torch.from_numpy(answered.logits_NK)
    if server.memories is not None:
        levels, logits_MK = server.memories.images.asked, server.memories.images.logits_MK
    loss = distill_levels(
        server.central,
        levels,
        logits_MK,
        server.central_optimizer,
        server.central_schedule,
        steps=central_steps(server.settings, server.num_rounds)[round_ - 1],
        batch_size=distillation.distill_batch_size,
        temperature=distillation.temperature,
        settings=server.settings.optimizer,
        stream=_stream(server, Purpose.CENTRAL_DISTILLATION, round_),
        class_balance=distillation.class_balance,
    )
    check_central(server, round_)
    return loss


@reproducible()
def train_generator(server: ServerState, round_: int) -> None:
    """Train the generator through the central model in the ensemble's place; no queries.

    The adversarial term vanishes there. Training the generator through the student alone is
    IDEAL's idea (Zhang et al., 2022, arXiv 2205.11158).
    """
    images = server.settings.images
    if not images.generator_share:
        return
    stream = _stream(server, Purpose.GENERATOR_STEPS, round_)
    server.central.eval()
    for _ in range(images.generator_steps):
        batch = generate(server, _GENERATOR_BATCH, stream)
        logits_NK = logits_of(server.central(batch.x_NCHW))
        terms = server.objective(batch.x_NCHW, batch.z_ND, batch.y_N, logits_NK, logits_NK)
        server.generator_optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        server.step_generator()
    server.central.zero_grad(set_to_none=True)
    if not all(torch.isfinite(value).all() for value in server.generator.parameters()):
        raise DivergenceError(
            f"round {round_}: the generator diverged (its parameters are not finite); "
            "lower 'generator-lr'"
        )


def _stream(server: ServerState, purpose: Purpose, round_: int) -> torch.Generator:
    return torch_stream(server.settings.run.seed, purpose, round_=round_)


EFFICIENT = Recipe(
    efficient_round, generator_steps=lambda settings: 1 + settings.images.generator_steps
)
