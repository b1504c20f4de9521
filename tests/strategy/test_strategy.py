"""The strategy as another Flower project uses it: a class with Flower's own signature."""

from __future__ import annotations

import inspect
import logging
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import Strategy

import fedzge_flwr.strategy as strategy_module
from fedzge_flwr import Observer, RoundRow, make_settings
from fedzge_flwr.common.errors import DataError, TooFewClientsError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import PAPER, preset_file, read_settings
from fedzge_flwr.data.evaluation import TestSetEvaluation
from fedzge_flwr.server.build import build_central
from fedzge_flwr.strategy import FedZGE
from tests.helpers.strategies import make_strategy


def test_start_has_flowers_signature() -> None:
    """But for what the settings say already."""
    ours, theirs = (inspect.signature(cls.start) for cls in (FedZGE, Strategy))
    assert list(ours.parameters) == list(theirs.parameters)
    for name, parameter in theirs.parameters.items():
        wanted = None if name in ("num_rounds", "timeout") else parameter.default
        assert ours.parameters[name].default == wanted


@pytest.mark.parametrize("fails", [False, True])
def test_start_takes_rounds_patience_and_threads_from_the_settings(
    make_grid: Any, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    patience, threads = [], []
    whole = strategy_module.GridClients

    def noted(*args: Any) -> Any:
        patience.append(args[2])
        return whole(*args)

    monkeypatch.setattr(strategy_module, "GridClients", noted)

    class Notes(Observer):
        def on_round(self, server: object, current: object, row: RoundRow) -> None:
            threads.append(torch.get_num_threads())
            if fails:
                raise RuntimeError("no more")

    config = {**tiny_config, "server-threads": 3, "exchange-timeout": 77.0, "client-threads": 3}
    settings = from_run_config(config)
    central = build_central(settings)
    strategy = FedZGE(settings, central, observers=[Notes()])
    with pytest.raises(RuntimeError, match="no more") if fails else nullcontext():
        strategy.start(make_grid(config), ArrayRecord(central.state_dict()))
    assert threads == [3] if fails else [3, 3]
    assert patience == [77.0]
    assert torch.get_num_threads() == 1
    if not fails:
        strategy.start(make_grid(config), ArrayRecord(central.state_dict()), 1, 5.0)
        assert (len(threads), patience) == (3, [77.0, 5.0])


def test_a_project_keeps_its_threads(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    del tiny_config["server-threads"]
    settings = make_settings(**{key.replace("-", "_"): v for key, v in tiny_config.items()})
    central, threads = build_central(settings), []

    class Notes(Observer):
        def on_round(self, server: object, current: object, row: RoundRow) -> None:
            threads.append(torch.get_num_threads())

    torch.set_num_threads(3)
    grid = make_grid({**tiny_config, "client-threads": 1})
    FedZGE(settings, central, observers=[Notes()]).start(grid, ArrayRecord(central.state_dict()), 1)
    assert threads == [torch.get_num_threads()] == [3]


def test_result(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    strategy, central = make_strategy(tiny_config)
    initial = ArrayRecord(central.state_dict())
    seen: list[int] = []

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(round_)
        return MetricRecord({"accuracy": float(round_), "loss": 1.0})

    result = strategy.start(make_grid(tiny_config), initial, num_rounds=3, evaluate_fn=evaluate)
    assert seen == [0, 1, 2, 3]
    assert list(result.evaluate_metrics_serverapp) == [0, 1, 2, 3]
    assert list(result.evaluate_metrics_clientapp) == [1, 2, 3]
    assert 0 <= float(result.evaluate_metrics_clientapp[1]["accuracy"]) <= 1  # type: ignore[arg-type]
    assert {"total", "fidelity", "central_distillation"} <= set(result.train_metrics_clientapp[3])
    final = result.arrays.to_torch_state_dict()
    assert final.keys() == central.state_dict().keys()
    given = {name: tensor.cpu() for name, tensor in central.state_dict().items()}
    assert all(torch.equal(final[name], tensor) for name, tensor in given.items())


def test_classes_of_the_test_images_are_of_the_row_and_no_metric(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    settings = from_run_config(tiny_config)
    _, central = make_strategy(tiny_config)
    evaluation, rows = TestSetEvaluation(settings), []

    class Notes(Observer):
        def on_round(self, server: object, current: object, row: RoundRow) -> None:
            rows.append(row)

    strategy = FedZGE(settings, central, test_set=evaluation, observers=[Notes()])
    initial = ArrayRecord(central.state_dict())
    result = strategy.start(
        make_grid(tiny_config), initial, num_rounds=1, evaluate_fn=evaluation.central
    )
    assert rows[0].recalls.central_recalls
    assert rows[0].recalls.confusion
    assert all(
        set(record) == {"loss", "accuracy"} for record in result.evaluate_metrics_serverapp.values()
    )


def test_classes_that_do_not_fit_the_test_set(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    settings = from_run_config(tiny_config)
    _, central = make_strategy(tiny_config)
    strategy = FedZGE(settings, central, test_set=TestSetEvaluation(settings))
    with pytest.raises(DataError, match=r"2 classes of .* give 'test_set' the labels"):
        strategy.start(
            make_grid(tiny_config),
            ArrayRecord(central.state_dict()),
            num_rounds=1,
            evaluate_fn=lambda *_: MetricRecord({"accuracy": 0.5, "classes": [1, 2]}),
        )


def test_training_starts_from_the_initial_arrays(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    results = []
    for scale in (1.0, 0.5):
        strategy, central = make_strategy(tiny_config)
        arrays = {
            name: tensor * scale if tensor.is_floating_point() else tensor
            for name, tensor in central.state_dict().items()
        }
        result = strategy.start(make_grid(tiny_config), ArrayRecord(arrays), num_rounds=1)
        results.append(result.arrays.to_torch_state_dict()["features.0.weight"])
    assert not torch.allclose(results[0], results[1])


def test_configuration_for_clients_is_refused(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    strategy, central = make_strategy(tiny_config)
    arrays = ArrayRecord(central.state_dict())
    with pytest.raises(ValueError, match="sends clients no configuration"):
        strategy.start(make_grid(tiny_config), arrays, train_config=ConfigRecord({"lr": 1.0}))


@pytest.mark.parametrize("differences", ["forward", "central"])
def test_compact_transport_is_the_dense_one_bit_for_bit(
    make_grid: Any, efficient_config: dict[str, Any], differences: str
) -> None:
    """Central and client models alike; the client that lost what it was asked gets it again."""
    outcomes, asked = [], []
    for transport in ("dense", "compact", "forgetful"):
        config = {
            **efficient_config,
            "differences": differences,
            "client-distill-rounds": 0,
            "transport": transport.replace("forgetful", "compact"),
        }
        grid = make_grid(config)
        if transport == "forgetful":
            forgetful = min(grid.contexts)

            def forget(request: Message, reply: Message, grid: Any = grid) -> Message:
                if request.metadata.dst_node_id == min(grid.contexts):
                    grid.contexts[min(grid.contexts)].state.pop("fedzge-asked", None)
                return reply

            grid.tamper = forget
        strategy, central = make_strategy(config)
        result = strategy.start(grid, ArrayRecord(central.state_dict()), num_rounds=2)
        models = [result.arrays, *(c.state["fedzge-private-model"] for c in grid.contexts.values())]
        outcomes.append([array.numpy().tobytes() for model in models for array in model.values()])
        asked.append(
            [
                message.metadata.dst_node_id
                for message in grid.sent
                if _type_of(message) in ("CompactDistillRequest", "RoundRequest")
                and message.content["arrays"]["images"].shape[0]
            ]
        )
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert asked[1] == []
    assert asked[2] == [forgetful, forgetful]


def test_the_papers_images_are_rounded_for_the_compact_transport(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    config = {**tiny_config, "transport": "compact"}
    grid = make_grid(config)
    strategy, central = make_strategy(config)
    strategy.start(grid, ArrayRecord(central.state_dict()), num_rounds=1)
    (base,) = {
        message.content["arrays"]["base"].numpy().tobytes()
        for message in grid.sent
        if _type_of(message) == "RoundRequest"
    }
    assert len(base) == 12 * 64


@pytest.mark.parametrize(
    ("config", "lacking"),
    [
        ({"recipe": "paper"}, r"transport, .*, q, eps, .*class-balance"),
        ({**read_settings(preset_file(PAPER)), "q": 2}, "q"),
        (read_settings(preset_file(PAPER)), None),
        ({}, None),
    ],
    ids=["phases alone", "all but one value", "preset", "default recipe"],
)
def test_a_run_of_the_papers_phases_with_other_values_is_warned_of(
    config: dict[str, Any], lacking: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    strategy, _ = make_strategy(config)
    strategy.summary()
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    if lacking is None:
        assert warnings == []
        return
    (line,) = warnings
    assert re.fullmatch(
        f"recipe 'paper' with the default, not the paper's value of {lacking}: "
        "the preset 'paper' has them all",
        line,
    ), line


def _type_of(message: Message) -> str:
    return str(message.content["message"]["type"])


def test_a_strategy_that_is_started_again_begins_its_count_anew(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    """Two rounds skipped in a first start are not two of the second's."""
    config = {**tiny_config, "min-clients": 3, "too-few-clients": "skip"}
    strategy, central = make_strategy(config)
    deaf = make_grid(config, lose=lambda message: message.metadata.message_type == "train.local")
    initial = ArrayRecord(central.state_dict())
    with pytest.raises(TooFewClientsError, match="all 2 rounds were skipped"):
        strategy.start(deaf, initial, num_rounds=2)

    def lost(message: Message) -> bool:
        training = message.metadata.message_type == "train.local"
        return training and message.content["message"]["round"] > 1

    strategy.start(make_grid(config, lose=lost), initial, num_rounds=3)
    with pytest.raises(TooFewClientsError, match="all 2 rounds were skipped"):
        strategy.start(make_grid(config, lose=deaf.lose), initial, num_rounds=2)
