"""Beside Flower's own parts: mods on the ClientApp, other strategies in the same project."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import arrays_size_mod, message_size_mod
from flwr.serverapp.strategy import FedAvg

from fedzge_flwr import FedZGE, make_settings, register_endpoints, torch_black_box
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.running import rows_of, run_server
from tests.helpers.small_models import mlp


def test_mods_see_every_message_and_change_nothing(
    efficient_config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Flower's two that log sizes, and one of one's own."""
    seen: Counter[str] = Counter()

    def counting_mod(message: Message, context: Context, call_next: Any) -> Message:
        seen[message.metadata.message_type] += 1
        reply: Message = call_next(message, context)
        return reply

    import client_app

    modded = ClientApp(mods=[message_size_mod, arrays_size_mod, counting_mod])
    register_endpoints(modded, torch_black_box)
    files = []
    for name, app in (("plain", client_app.app), ("modded", modded)):
        config = {**efficient_config, "run-name": name, "client-distill-rounds": 0}
        with caplog.at_level(logging.INFO, logger="flwr"):
            folder = run_server(InProcessGrid(app, config, 3), config)
        files.append((folder / "central.safetensors").read_bytes())
        assert all(row["missing"] == [] for row in rows_of(folder))
    assert files[0] == files[1]
    assert seen["train.round"] == 6
    assert seen["query.hello"] >= 3
    assert caplog.text.count("size") >= 2 * sum(seen.values())


def test_another_strategy_in_the_same_run() -> None:
    """Two rounds of FedAvg, then FedZGE from its model, with one ClientApp for both."""
    app = ClientApp()
    register_endpoints(app, torch_black_box)
    averaged = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model = mlp((1, 8, 8), 10)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        number = int(context.node_config["partition-id"])
        averaged.append(number)
        content = {
            "arrays": ArrayRecord({k: v + number for k, v in model.state_dict().items()}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    settings = make_settings(
        num_clients=3,
        num_server_rounds=1,
        num_train_images=120,
        synthetic_batch_size=12,
        local_models="cnn",
        server_threads=1,
        central_distill_steps=2,
        client_distill_steps=2,
    )
    grid = InProcessGrid(app, settings.to_run_config(), 3)
    central = mlp((1, 8, 8), 10)
    first = FedAvg(fraction_evaluate=0.0).start(grid, ArrayRecord(central.state_dict()), 2)
    assert sorted(averaged) == [0, 0, 1, 1, 2, 2]
    for name, value in first.arrays.to_torch_state_dict().items():
        # Each round adds 0, 1 and 2: 1 in the mean.
        np.testing.assert_allclose(value, central.state_dict()[name] + 2, rtol=1e-5)
    accuracies = []

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord:
        accuracies.append(round_)
        return MetricRecord({"accuracy": 0.5})

    second = FedZGE(settings, central).start(grid, first.arrays, 1, evaluate_fn=evaluate)
    assert accuracies == [0, 1]
    found = second.arrays.to_torch_state_dict()
    averages = first.arrays.to_torch_state_dict()
    moved = max(float((found[name] - value).abs().max()) for name, value in averages.items())
    # Distilled from where FedAvg had ended: two steps are small beside its 2.
    assert 0 < moved < 0.5
    assert len(averaged) == 6
