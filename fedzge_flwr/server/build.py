"""The server's models as the settings describe them, freshly initialised from the run's seed."""

from __future__ import annotations

from torch import nn

from fedzge_flwr.common.randomness import Purpose, seeded_default
from fedzge_flwr.common.registry import lookup
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.losses import OBJECTIVES
from fedzge_flwr.learning.models.catalogue import build_model
from fedzge_flwr.server.efficient import EFFICIENT_ROUND
from fedzge_flwr.server.ensemble import ENSEMBLES
from fedzge_flwr.server.phases import PAPER_ROUND, Phase
from fedzge_flwr.synthesis.generators import GENERATORS
from fedzge_flwr.zeroth_order.estimators import ESTIMATORS

RECIPES: dict[str, tuple[Phase, ...]] = {"efficient": EFFICIENT_ROUND, "paper": PAPER_ROUND}
"""The forms of a round by name, as the setting ``recipe`` has them."""


def check_names(settings: Settings) -> None:
    """Check that there are the parts of the server that the settings name.

    Raises
    ------
    ConfigError
        If there is no such recipe, estimator, objective, generator or way to combine answers; the
        line lists the known ones.
    """
    lookup(RECIPES, settings.run.recipe, "recipe")
    lookup(ESTIMATORS, settings.server.estimator, "estimator")
    lookup(OBJECTIVES, settings.server.objective, "objective")
    lookup(GENERATORS, settings.server.generator, "generator")
    lookup(ENSEMBLES, settings.server.ensemble, "ensemble")


def build_central(settings: Settings) -> nn.Module:
    """Build the central model."""
    spec = settings.data.spec
    with seeded_default(settings.run.seed, Purpose.INIT_CENTRAL):
        return build_model(settings.server.central_model, spec.image_shape, spec.num_classes)


def build_generator(settings: Settings) -> nn.Module:
    """Build the generator."""
    spec, server = settings.data.spec, settings.server
    with seeded_default(settings.run.seed, Purpose.INIT_GENERATOR):
        return lookup(GENERATORS, server.generator, "generator")(
            spec.image_shape,
            spec.num_classes,
            latent_dim=server.latent_dim,
            width=server.generator_width,
        )
