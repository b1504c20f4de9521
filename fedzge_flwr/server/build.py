"""The server as the settings describe it: its parts by name, its models freshly initialised."""

from __future__ import annotations

import torch
from torch import nn

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.randomness import Purpose, seeded_default
from fedzge_flwr.common.registry import lookup
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.losses import (
    OBJECTIVES,
    BoundObjective,
    ObjectiveWeights,
    bound_objective,
)
from fedzge_flwr.learning.models.catalogue import MODELS, build_model, model_ways
from fedzge_flwr.learning.training import make_optimizer, make_schedule
from fedzge_flwr.server.efficient import EFFICIENT
from fedzge_flwr.server.ensemble import ENSEMBLES
from fedzge_flwr.server.paper import PAPER
from fedzge_flwr.server.round import Recipe
from fedzge_flwr.server.state import ServerState
from fedzge_flwr.server.steps import central_steps
from fedzge_flwr.synthesis.generators import GENERATORS
from fedzge_flwr.synthesis.memory import Memories, most_kept
from fedzge_flwr.synthesis.sources import SOURCES, Source
from fedzge_flwr.zeroth_order.base import Estimator
from fedzge_flwr.zeroth_order.estimators import ESTIMATORS
from fedzge_flwr.zeroth_order.samplers import DIRECTIONS

RECIPES: dict[str, Recipe] = {"efficient": EFFICIENT, "paper": PAPER}
"""The forms of a round by name, as the setting ``recipe`` has them."""


def check_names(settings: Settings) -> None:
    """Check that there are the parts of the server that the settings name.

    Raises
    ------
    ConfigError
        If there is no such data set, estimator, distribution of directions, objective, generator,
        source of images or way to combine answers; the line lists the known ones.
    """
    _ = settings.data.spec
    lookup(DIRECTIONS, settings.queries.directions, "distribution of directions")
    lookup(ESTIMATORS, settings.queries.estimator, "estimator")
    lookup(OBJECTIVES, settings.images.objective, "objective")
    lookup(GENERATORS, settings.images.generator, "generator")
    lookup(ENSEMBLES, settings.queries.ensemble, "ensemble")
    build_sources(settings)


def check_models(settings: Settings) -> None:
    """Check that there are the models that the settings name, the clients' too, and what they are.

    Raises
    ------
    ConfigError
        If there is no such model; the line lists the known ones. Or if one from outside is no
        classifier of such images.
    """
    spec = settings.data.spec
    names = (settings.distillation.central_model, *settings.training.model_names)
    for name in dict.fromkeys(names):
        lookup(MODELS, name, "model")
        if name in MODELS.added():
            try:
                model_ways(name, spec.image_shape, spec.num_classes)
            except ConfigError as error:
                raise ConfigError(f"model '{name}': {error}") from error


def build_central(settings: Settings) -> nn.Module:
    """Build the central model."""
    spec = settings.data.spec
    with seeded_default(settings.run.seed, Purpose.INIT_CENTRAL):
        name = settings.distillation.central_model
        return build_model(name, spec.image_shape, spec.num_classes)


def build_generator(settings: Settings) -> nn.Module:
    """Build the generator."""
    spec, images = settings.data.spec, settings.images
    with seeded_default(settings.run.seed, Purpose.INIT_GENERATOR):
        return lookup(GENERATORS, images.generator, "generator")(
            spec.image_shape,
            spec.num_classes,
            latent_dim=images.latent_dim,
            width=images.generator_width,
        )


def build_server(
    settings: Settings,
    central: nn.Module,
    generator: nn.Module,
    *,
    num_rounds: int,
    device: torch.device,
    num_test_images: int = 0,
) -> ServerState:
    """Start a run with models as they are; they are moved to ``device``.

    The other parameters are those of `ServerState`.

    Raises
    ------
    ConfigError
        If a setting names something unknown.
    """
    central.to(device)
    central.eval()
    generator.to(device)
    images, distillation = settings.images, settings.distillation
    of_generator = make_optimizer(generator.parameters(), settings.optimizer, images.generator_lr)
    of_central = make_optimizer(central.parameters(), settings.optimizer, distillation.central_lr)
    kept = most_kept(distillation.memory_size, settings.data.spec.image_shape)
    steps_each = lookup(RECIPES, settings.run.recipe, "recipe").generator_steps(settings)
    return ServerState(
        settings=settings,
        num_rounds=num_rounds,
        num_test_images=num_test_images,
        device=device,
        central=central,
        generator=generator,
        generator_optimizer=of_generator,
        generator_schedule=make_schedule(
            of_generator, settings.optimizer, [steps_each] * num_rounds
        ),
        central_optimizer=of_central,
        central_schedule=make_schedule(
            of_central, settings.optimizer, central_steps(settings, num_rounds)
        ),
        combine=lookup(ENSEMBLES, settings.queries.ensemble, "ensemble"),
        sources=build_sources(settings),
        memories=Memories.of(kept) if kept else None,
        estimator=build_estimator(settings),
        objective=build_objective(settings),
    )


def build_estimator(settings: Settings) -> Estimator:
    """Return the zeroth-order estimator, with the sampler that draws its random directions."""
    queries = settings.queries
    sampler = lookup(DIRECTIONS, queries.directions, "distribution of directions")
    build = lookup(ESTIMATORS, queries.estimator, "estimator")
    return build(sampler, queries.q, queries.eps, queries.differences)


def build_sources(settings: Settings) -> dict[str, Source]:
    """Return the sources of images that the settings give a share, by name."""
    return {
        name: lookup(SOURCES, name, "source of images") for name in settings.images.source_shares
    }


def build_objective(settings: Settings) -> BoundObjective:
    """Return the generator's objective, with T and β as the settings have them."""
    images = settings.images
    weights = ObjectiveWeights(
        settings.distillation.temperature, images.beta1, images.beta2, images.beta3
    )
    return bound_objective(images.objective, weights)
