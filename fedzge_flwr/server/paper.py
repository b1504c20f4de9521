"""The round of the paper (arXiv 2503.06028, algorithm 1), phase by phase.

Generated images alone are asked about; one generator step and a few steps of distillation follow.
The preset ``paper`` has the published values of the settings.
"""

from __future__ import annotations

import torch

from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.learning.distillation import distill
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


def paper_round(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Run the paper's round."""
    do, round_ = current.do, current.round
    current.sampled = do(sample_clients, server, round_)
    current.asked = asked = do(generate_images, server, round_)
    current.replies = do(ask_clients, server, clients, round_, current.sampled, asked.question)
    current.answered = answered = do(
        combine_answers, server, clients, round_, current.sampled, asked, current.replies
    )
    step = do(update_generator, server, round_, asked, answered)
    loss = do(distill_central, server, round_, asked, answered)
    current.learned = Learned(step, loss)
    current.distill_losses |= do(distill_clients, server, clients, round_, asked, answered)
    current.distill_losses |= do(deliver_targets, server, clients, round_)
    current.evaluated = do(evaluate_clients, server, clients, round_, answered.participants)


def generate_images(server: ServerState, round_: int) -> Asked:
    """Generate the round's images, and choose along which directions they are perturbed."""
    settings = server.settings
    stream = torch_stream(settings.run.seed, Purpose.LATENT, round_=round_)
    batch = generate(server, settings.images.synthetic_batch_size, stream)
    levels = settings.run.transport == "compact"
    generated = question_about(server, batch, round_, levels=levels)
    return Asked(generated.question, generated)


def distill_central(server: ServerState, round_: int, asked: Asked, answered: Answered) -> float:
    """Distill the ensemble's answers on x into the central model, E2 steps, a new optimiser."""
    settings = server.settings
    distillation = settings.distillation
    loss = distill(
        server.central,
        torch.from_numpy(asked.question.base_NCHW).to(server.device),
        torch.from_numpy(answered.logits_NK).to(server.device),
        steps=distillation.central_distill_steps,
        batch_size=distillation.distill_batch_size,
        temperature=distillation.temperature,
        lr=distillation.central_lr,
        settings=settings.optimizer,
        stream=torch_stream(settings.run.seed, Purpose.CENTRAL_DISTILLATION, round_=round_),
        class_balance=distillation.class_balance,
    )
    check_central(server, round_)
    return loss


PAPER = Recipe(paper_round, generator_steps=lambda settings: 1)
