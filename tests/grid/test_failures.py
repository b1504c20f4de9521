"""Federations in which clients fail at random, and what that costs.

``python -m tests.grid.test_failures`` prints the accuracies of each seed; with ``--model cnn``
those of the convolutional model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedzge_flwr.common.text import percent
from fedzge_flwr.learning.models.catalogue import MODELS
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.running import rows_of, run_server
from tests.helpers.small_models import mlp

SEEDS = (0, 1, 2, 3, 4)
SHARE = 0.3
CONFIG: dict[str, Any] = {
    "num-clients": 10,
    "num-server-rounds": 20,
    "synthetic-batch-size": 300,
    "image-sources": "bred:0.5,procedural:0.15",
    "candidates": 1,
    "local-models": "mlp",
    "central-model": "mlp",
    "local-epochs": 2,
    "min-local-steps": 8,
    # Eight steps of a small network are too few for images that are moved and covered.
    "random-shifts": False,
    "random-erasing": False,
    "central-distill-steps": 60,
    "client-distill-steps": 20,
    "generator-steps": 2,
    "checkpoint-every": 0,
    "eval-every": 20,
    "server-threads": 1,
    "too-few-clients": "skip",
}


def run(seed: int, share: float, folder: Path, **more: Any) -> list[dict[str, Any]]:
    """Run a federation in which that share of the client-rounds fails; return its rounds' rows.

    Half of them before the client has done anything, half after: then its reply is lost.
    """
    import client_app

    config = {
        **CONFIG,
        "seed": seed,
        "output-dir": str(folder),
        "run-name": f"{seed}-{share}",
        **more,
    }
    draws = np.random.default_rng(seed).random(
        (CONFIG["num-server-rounds"] + 1, CONFIG["num-clients"])
    )

    def luck(message: Message) -> float:
        """Uniform in [0, 1), of a client and a round."""
        if message.metadata.message_type != "train.round":
            return 1.0
        node = sorted(grid.contexts).index(message.metadata.dst_node_id)
        return float(draws[message.content["message"]["round"], node])

    grid = InProcessGrid(
        client_app.app,
        config,
        CONFIG["num-clients"],
        lose=lambda message: luck(message) < share / 2,
        tamper=lambda request, reply: None if luck(request) < share else reply,
    )
    return rows_of(run_server(grid, config))


@pytest.mark.faults
@pytest.mark.usefixtures("models")
def test_a_third_of_the_client_rounds_fails(tmp_path: Path) -> None:
    """20 rounds of digits; the same seeds with and without, mean of their differences."""
    differences, failed = [], 0
    for seed in SEEDS:
        whole, holes = (run(seed, share, tmp_path) for share in (0.0, SHARE))
        assert not any(row["missing"] for row in whole)
        failed += sum(len(row["missing"]) for row in holes)
        assert whole[-1]["central_accuracy"] > 0.8
        differences.append(holes[-1]["central_accuracy"] - whole[-1]["central_accuracy"])
    client_rounds = len(SEEDS) * CONFIG["num-clients"] * CONFIG["num-server-rounds"]
    assert 0.25 < failed / client_rounds < 0.35
    assert np.mean(differences) > -0.015, differences


@pytest.mark.usefixtures("models")
def test_failing_clients_are_named_and_the_others_go_on(tmp_path: Path) -> None:
    import client_app

    config = {
        **CONFIG,
        "num-server-rounds": 3,
        "num-train-images": 200,
        "min-partition-size": 2,
        "synthetic-batch-size": 20,
        "central-distill-steps": 2,
        "client-distill-steps": 2,
        "output-dir": str(tmp_path),
        "run-name": "run",
    }
    grid = InProcessGrid(client_app.app, config, 10)
    first = min(grid.contexts)
    grid.lose = lambda message: (
        message.metadata.message_type == "train.round"
        and message.content["message"]["round"] == 2
        and message.metadata.dst_node_id != first
    )
    rows = rows_of(run_server(grid, config))
    assert [len(row["missing"]) for row in rows] == [0, 9, 0]
    assert rows[1]["participants"] == [0]
    assert {item["action"] for item in rows[1]["missing"]} == {"train.round"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args()
    MODELS["mlp"] = mlp
    more = {"local-models": given.model, "central-model": given.model}
    for seed in given.seed:
        with tempfile.TemporaryDirectory() as folder:
            last = [run(seed, share, Path(folder), **more)[-1] for share in (0.0, SHARE)]
        found = [percent(row["central_accuracy"]) for row in last]
        print(f"seed {seed}: {found[0]} without failures, {found[1]} with", flush=True)


if __name__ == "__main__":
    main()
