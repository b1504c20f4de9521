"""The efficient round: more images for the queries, more steps for the answers.

One generator step a round on one batch teaches the central model next to nothing, so here each
answer is kept and used many times, the images asked about come from several sources, and the
generator trains through the central model between the rounds' zeroth-order steps. Each part has a
key that switches it off; `docs/evidence.md` has what each did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedzge_flwr.common.errors import DivergenceError
from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.distillation import class_weights, distillation_step
from fedzge_flwr.learning.numerics import reproducible
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.training import MIN_TRAINING_IMAGES
from fedzge_flwr.server.checks import check_central
from fedzge_flwr.server.clients import Clients
from fedzge_flwr.server.phases import (
    Phase,
    ask_clients,
    choose_queries,
    deliver_targets,
    distil_clients,
    evaluate_clients,
    generate,
    on_levels,
    present,
    sample_clients,
    update_generator,
)
from fedzge_flwr.server.state import RoundState, ServerState
from fedzge_flwr.synthesis.procedural import procedural_images
from fedzge_flwr.synthesis.screening import screen
from fedzge_flwr.synthesis.search import breed

_GENERATOR_BATCH = 64
_SCREENING_BATCH = 500


def compose_images(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Gather the round's images: generated, bred from the memory, procedural.

    All are put on the grid of 256 levels that images have: both sides and the memory then hold the
    very same values in a byte each. The gradient passes the rounding straight through.
    """
    past = server.memory is not None and len(server.memory) > 0
    num_generated, num_bred, num_procedural = image_counts(server.settings, past=past)
    # A central model that has not taken a step yet has nothing to choose by.
    trained = bool(server.central_optimizer.state)
    candidates = server.settings.transfer.candidates if trained else 1
    others: list[Tensor] = []
    if num_procedural:
        stream = _stream(server, current, Purpose.PROCEDURAL)
        shape = server.settings.data.spec.image_shape
        drawn = procedural_images(candidates * num_procedural, shape, stream)
        others.append(_screened(server, drawn, num_procedural, stream))
    if num_bred and server.memory is not None:
        stream = _stream(server, current, Purpose.SEARCH)
        drawn = breed(server.memory, candidates * num_bred, stream)
        others.append(_screened(server, drawn, num_bred, stream))
    if others:
        current.others_NCHW = on_levels(torch.cat(others))
    if num_generated:
        current.batch = generate(server, num_generated, _stream(server, current, Purpose.LATENT))
        choose_queries(server, current, on_levels(current.batch.x_NCHW.detach()))


def _screened(server: ServerState, drawn: Tensor, num: int, stream: torch.Generator) -> Tensor:
    if len(drawn) == num:
        return drawn
    return screen(drawn, predict(server.central, drawn, _SCREENING_BATCH), num, stream)


def image_counts(settings: Settings, *, past: bool) -> tuple[int, int, int]:
    """Return how many images the generator, the search and the procedures make in a round.

    Without past images there is nothing to breed from: procedural ones stand in, or generated ones
    if those are switched off.
    """
    transfer, num_images = settings.transfer, settings.server.synthetic_batch_size
    shares = (transfer.generator_share, transfer.search_share, transfer.procedural_share)
    generated, bred = (round(num_images * share / sum(shares)) for share in shares[:2])
    if generated < MIN_TRAINING_IMAGES:
        generated = 0
    procedural = num_images - generated - bred
    if past:
        return generated, bred, procedural
    if transfer.procedural_share or not generated:
        return generated, 0, procedural + bred
    return generated + bred, 0, procedural


def estimate_generator_step(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Take the round's zeroth-order generator step, if images were generated."""
    if current.batch is not None:
        update_generator(server, clients, current)


def remember(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Put the round's images and answers into the memory."""
    if server.memory is not None:
        transfer = present(current.transfer)
        images = PIXEL_RANGE.to_uint8(transfer.x_NCHW)
        server.memory.add(images, torch.from_numpy(transfer.logits_NK))


@reproducible()
def distil_central_from_memory(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Take E2 minibatch steps over the memory with the run's one optimiser and schedule.

    Answers that are kept and drawn from many times, evenly over classes, are experience replay
    (Lin, 1992, "Self-improving reactive agents based on reinforcement learning").
    """
    settings = server.settings
    stream = _stream(server, current, Purpose.CENTRAL_DISTILLATION)
    if server.memory is not None:
        images, logits_MK = server.memory.images_u8_MCHW, server.memory.logits_MK
    else:
        transfer = present(current.transfer)
        images = PIXEL_RANGE.to_uint8(transfer.x_NCHW).cpu()
        logits_MK = torch.from_numpy(transfer.logits_NK)
    batch_size = settings.client.distill_batch_size
    weights_M = class_weights(logits_MK, settings.client.class_balance)
    server.central.train()
    loss_sum = torch.zeros((), device=server.device)
    steps = settings.server.central_distill_steps
    for _ in range(steps):
        # As at the clients: the full batch is every image once, and is not drawn.
        chosen = torch.arange(len(images))
        if 0 < batch_size < len(images):
            chosen = torch.multinomial(weights_M, batch_size, True, generator=stream)
        loss_sum += distillation_step(
            server.central,
            PIXEL_RANGE.from_uint8(images[chosen].to(server.device)),
            logits_MK[chosen].to(server.device),
            server.central_optimizer,
            settings.server.temperature,
        )
        if server.central_schedule is not None:
            server.central_schedule.step()
    server.central.eval()
    current.central_distill_loss = float(loss_sum) / steps
    check_central(server, current.round)


@reproducible()
def train_generator_freely(server: ServerState, clients: Clients, current: RoundState) -> None:
    """Train the generator through the central model in the ensemble's place; no queries.

    The adversarial term vanishes there. Training the generator through the student alone is
    IDEAL's idea (Zhang et al., 2022, arXiv 2205.11158).
    """
    transfer = server.settings.transfer
    if not transfer.generator_share:
        return
    stream = _stream(server, current, Purpose.GENERATOR_STEPS)
    server.central.eval()
    for _ in range(transfer.generator_steps):
        batch = generate(server, _GENERATOR_BATCH, stream)
        logits_NK = server.central(batch.x_NCHW)
        terms = server.objective(batch.x_NCHW, batch.z_ND, batch.y_N, logits_NK, logits_NK)
        server.generator_optimizer.zero_grad(set_to_none=True)
        terms["total"].backward()
        server.generator_optimizer.step()
        if server.generator_schedule is not None:
            server.generator_schedule.step()
    server.central.zero_grad(set_to_none=True)
    if not all(torch.isfinite(value).all() for value in server.generator.parameters()):
        raise DivergenceError(
            f"round {current.round}: the generator diverged (its parameters are not finite); "
            "lower 'generator-lr'"
        )


def _stream(server: ServerState, current: RoundState, purpose: Purpose) -> torch.Generator:
    return torch_stream(server.settings.run.seed, purpose, round_=current.round)


EFFICIENT_ROUND: tuple[Phase, ...] = (
    sample_clients,
    compose_images,
    ask_clients,
    estimate_generator_step,
    remember,
    distil_central_from_memory,
    train_generator_freely,
    distil_clients,
    deliver_targets,
    evaluate_clients,
)
