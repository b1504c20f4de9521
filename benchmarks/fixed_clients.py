"""The server alone, over clients that are trained once and then stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.local_clients import LocalClients
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.tensors import to_numpy, to_tensor
from fedzge_flwr.server.build import RECIPES, build_central, build_generator, build_server
from fedzge_flwr.server.phases import run_round
from fedzge_flwr.server.state import ServerState


class FixedClients(LocalClients):
    """`LocalClients` after their training rounds, from a cache if they are there."""

    def __init__(self, settings: Settings, cache: Path | None) -> None:
        super().__init__(settings, cache)
        for round_ in range(1, settings.training.local_rounds + 1):
            super().train(round_, range(settings.run.num_clients))
            print(f"  clients: training round {round_}", flush=True)

    def train(self, round_: int, partitions: Sequence[int]) -> dict[int, float | None]:
        """Nothing is left to train."""
        return dict.fromkeys(partitions)

    @property
    def models(self) -> dict[int, torch.nn.Module]:
        """The clients' models, by partition: what no server can see."""
        return {p: box._model.eval() for p, box in enumerate(self._boxes)}


def run_server(
    settings: Settings,
    clients: FixedClients,
    before_round: Callable[[ServerState, int], None] = lambda server, round_: None,
) -> dict[str, Any]:
    """Run the server's rounds; return what came out.

    Parameters
    ----------
    settings : Settings
        The run's.
    clients : FixedClients
        Who answers.
    before_round : Callable[[ServerState, int], None]
        Called with the server and each round, from 1, before it.

    Returns
    -------
    dict[str, Any]
        "central", "ensemble" and their "agreement" on the test set, in [0, 1]; the central model's
        "recalls" by class, in [0, 1]; the "queries" of a client.
    """
    test, rounds = load_split(settings.data, "test"), settings.run.num_server_rounds
    server = build_server(
        settings,
        build_central(settings),
        build_generator(settings),
        num_rounds=rounds,
        device=select_device("cpu"),
        num_test_images=len(test.labels_N),
    )
    recipe = RECIPES[settings.run.recipe]
    for round_ in range(1, rounds + 1):
        before_round(server, round_)
        current = run_round(recipe, server, clients, round_, lambda round_, phase: None)
        print(f"  round {round_}/{rounds}", end="\r", flush=True)
    ensemble_MK = current.evaluated.ensemble_logits_MK
    assert ensemble_MK is not None
    found_M = to_numpy(predict(server.central, to_tensor(test.images_NCHW), 500)).argmax(axis=1)
    together_M = ensemble_MK.argmax(axis=1)
    of_class = [test.labels_N == k for k in range(settings.data.spec.num_classes)]
    return {
        "central": float((found_M == test.labels_N).mean()),
        "ensemble": float((together_M == test.labels_N).mean()),
        "agreement": float((found_M == together_M).mean()),
        "recalls": [float((found_M[mask] == k).mean()) for k, mask in enumerate(of_class)],
        "queries": max(server.num_queries.values()),
    }
