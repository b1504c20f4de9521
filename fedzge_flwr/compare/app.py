"""One Flower app of all methods: which one runs is ``strategy`` of the run config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedzge_flwr.black_boxes.node import torch_black_box
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.client.endpoints import register_endpoints
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.compare.catalogue import METHODS, method_named
from fedzge_flwr.compare.clients import METHOD_KEY, client_settings, server_settings
from fedzge_flwr.compare.local_grid import LocalGrid
from fedzge_flwr.compare.method import Method
from fedzge_flwr.compare.results import Result, write
from fedzge_flwr.compare.session import Measured, Session, measured, metered
from fedzge_flwr.compare.tally import tally, tell
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.evaluation import TestSetEvaluation, check_partition

LOGGER = logging.getLogger("flwr.fedzge")


def client_app(*names: str) -> ClientApp:
    """Return the ClientApp that answers what methods ask.

    Parameters
    ----------
    *names : str
        Names of methods from outside, ``module:ATTRIBUTE``, beside the package's own.
    """
    app = ClientApp(mods=[tally])
    register_endpoints(app, _black_box)
    app.query("tally")(tell)
    registered: set[object] = set()
    for method in (*METHODS.values(), *map(method_named, names)):
        if method.endpoints not in registered:
            registered.add(method.endpoints)
            method.endpoints(app)
    return app


def _black_box(context: Context) -> TorchBlackBox:
    """Make the black box of a node, with the settings that the run's method gives it."""
    method = method_named(str(context.run_config.get(METHOD_KEY, "")))
    partition = int(context.node_config["partition-id"])
    return torch_black_box(context, client_settings(method, context.run_config, partition))


def server_app() -> ServerApp:
    """Return the ServerApp that runs a method, and keeps its result in ``output-dir``."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = dict(context.run_config)
        name = str(config.get(METHOD_KEY, ""))
        found = run_method(name, config, grid, LOGGER.info)
        settings = given_settings(config)
        folder = Path(settings.run.output_dir)
        LOGGER.info("result: %s", write(folder, Result.of(name, settings, found)))

    return app


def given_settings(run_config: Mapping[str, object]) -> Settings:
    """Return the settings that a run config gives, without a method's own.

    Raises
    ------
    ConfigError
        If one is wrong, or is one that a comparison cannot have.
    """
    settings = from_run_config({k: v for k, v in run_config.items() if k != METHOD_KEY})
    run = settings.run
    if run.participants != run.num_clients:
        raise ConfigError(
            f"'fraction-train' = {run.fraction_train}: a comparison has all clients in every "
            "round; leave it at 1.0"
        )
    if run.recipe != "efficient":
        raise ConfigError(
            "'recipe' = 'paper': a comparison's settings are the default's; the published run is "
            "the method 'fedzge-paper'"
        )
    for key, value in (
        ("server-evaluation", run.server_evaluation),
        ("client-evaluation", run.client_evaluation),
    ):
        if value != "test":
            raise ConfigError(f"'{key}' = '{value}': a comparison evaluates on the test set")
    return settings


def check_method(method: Method, settings: Settings) -> None:
    """Check that a method can run with these settings.

    Raises
    ------
    ConfigError
        If clients have models of several architectures, and it averages weights.
    """
    clients = range(settings.run.num_clients)
    names = {settings.training.model_of(partition) for partition in clients}
    names.add(settings.distillation.central_model)
    if len(names) > 1 and not method.several_architectures:
        raise ConfigError(
            f"{method.title} averages weights, and the models are {', '.join(sorted(names))}: "
            "give 'local-models' and 'central-model' one name, or leave this method out"
        )


def run_method(
    name: str, run_config: Mapping[str, object], grid: Grid, told: Callable[[str], None]
) -> Measured:
    """Run a method over a grid and measure it.

    Parameters
    ----------
    name : str
        As for `method_named`.
    run_config : Mapping[str, object]
        The settings, those of FedZGE's default run.
    grid : Grid
        Reaches clients of `client_app`.
    told : Callable[[str], None]
        Takes a line for each round that was evaluated.

    Raises
    ------
    FedZGEError
        If a setting is wrong, data are missing, or a client fails.
    """
    method = method_named(name)
    check_method(method, given_settings(run_config))
    settings = server_settings(method, run_config)
    check_partition(settings)
    session = Session(settings, metered(grid), TestSetEvaluation(settings), told)
    return measured(session, method.run)


def run_here(name: str, run_config: Mapping[str, object], told: Callable[[str], None]) -> Measured:
    """Run a method with its clients in this process, one after another.

    Raises
    ------
    FedZGEError
        As `run_method`.
    """
    config = {**run_config, METHOD_KEY: name}
    clients = given_settings(config).run.num_clients
    outside = [name] if ":" in name else []
    return run_method(name, config, LocalGrid(client_app(*outside), config, clients), told)
