"""The methods of a comparison: their arithmetic, their steps, and that they are what they say."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import nn

from fedzge_flwr.common.errors import ComparisonError, ConfigError, TooFewClientsError
from fedzge_flwr.compare.app import client_app, given_settings, run_here, run_method
from fedzge_flwr.compare.catalogue import METHODS, method_named
from fedzge_flwr.compare.clients import METHOD_KEY, client_settings, server_settings
from fedzge_flwr.compare.local_grid import LocalGrid
from fedzge_flwr.compare.methods.averaged_logits import class_means, others_means
from fedzge_flwr.compare.methods.weights import (
    FedAdamOfParameters,
    proximal,
    weights_of,
    with_weights,
)
from fedzge_flwr.compare.plan import Plan
from fedzge_flwr.compare.public import PUBLIC
from fedzge_flwr.compare.session import Measured, Session, measured, metered
from fedzge_flwr.compare.tally import tally, tell
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.data.evaluation import TestSetEvaluation
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.partition import partition_indices
from fedzge_flwr.learning.models.catalogue import build_model
from tests.helpers.running import rows_of, run_server

TINY: dict[str, Any] = {
    "num-clients": 3,
    "num-server-rounds": 2,
    "num-test-images": 60,
    "synthetic-batch-size": 32,
    "central-distill-steps": 3,
    "client-distill-steps": 4,
    "min-local-steps": 4,
    "alpha": 1.0,
}


def run(name: str, **more: Any) -> Measured:
    return run_here(name, {**TINY, **more}, lambda line: None)


DISTILL_AT_THE_SERVER = {"feddf", "feddf-tenth", "one-round", "fedzge-paper", "fedzge"}


@lru_cache
def ran(name: str) -> Measured:
    """Each method once, for all tests of a process."""
    return run(name)


def plans() -> list[Plan]:
    settings = from_run_config(TINY)
    parts = partition_indices(settings.data, 3, 0)
    return [Plan.of(settings, len(part)) for part in parts]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_with_as_many_steps_to_the_nearest_epoch(name: str) -> None:
    found, method = ran(name), METHODS[name]
    last = found.points[-1]
    accuracy = last.central if method.figure == "central" else last.mean_client
    assert accuracy is not None
    assert 0 <= accuracy <= 1
    settings = server_settings(method, TINY)
    assert last.round == settings.run.num_server_rounds
    assert (last.up > 0) == (method.leaves != "all data")
    assert [point.down for point in found.points] == sorted(point.down for point in found.points)
    nearest = np.mean([plan.steps_an_epoch / 2 for plan in plans()]) * 2
    if name == "pooled":
        planned = sum(plan.total for plan in plans())
        assert found.client_steps == 0
        assert abs(found.server_steps - planned) <= 3 * nearest + 1
    else:
        planned = np.mean([plan.total for plan in plans()])
        assert abs(found.client_steps - planned) <= nearest + 1
    if name == "fedzge":
        assert found.client_steps == planned
    assert (found.server_steps > 0) == (name in {"pooled", *DISTILL_AT_THE_SERVER})


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_averaged_of_clients_that_train_on_images_as_they_are(name: str) -> None:
    """Mixed, moved and covered images help FedZGE and cost FedAvg 14 points: it has none."""
    training = client_settings(METHODS[name], TINY, 0).training
    plain = METHODS[name].leaves == "weights" or name == "fedzge-paper"
    assert {training.mixup, training.random_shifts, training.random_erasing} == {not plain}
    assert training.logit_adjustment == (name != "fedzge-paper")


def test_a_run_is_a_function_of_its_seed() -> None:
    assert run("fedavg").points == ran("fedavg").points
    assert run("fedavg", seed=1).points != ran("fedavg").points


def test_an_average_has_the_same_bits_in_whatever_order_nodes_are_asked() -> None:
    """Flower draws the order without a seed; a run then differed from round 2 on."""
    states: list[dict[str, bytes]] = []

    class Kept(Session):
        def evaluate_fn(self, round_: int, arrays: ArrayRecord) -> MetricRecord | None:
            states[-1] = {name: array.data for name, array in arrays.items()}
            return None

    config = {**TINY, METHOD_KEY: "fedavg", "num-clients": 5}
    settings = server_settings(METHODS["fedavg"], config)
    before = random.getstate()
    for seed in (0, 1):
        states.append({})
        random.seed(seed)
        grid = LocalGrid(client_app(), config, 5)
        METHODS["fedavg"].run(Kept(settings, metered(grid), TestSetEvaluation(settings), print))
    random.setstate(before)
    assert states[0]
    assert states[0] == states[1]


# What is sent


def test_bytes_are_those_that_fedzge_counts(tmp_path: Path) -> None:
    config = {**TINY, "output-dir": str(tmp_path), "run-name": "run"}
    from tests.helpers.inprocess import InProcessGrid
    from client_app import app  # isort: skip

    row = rows_of(run_server(InProcessGrid(app, config, 3), config))[-1]
    last = ran("fedzge").points[-1]
    assert last.central == row["central_accuracy"]
    assert last.mean_client == pytest.approx(row["mean_client_accuracy"])
    assert last.queries == row["queries_per_client"] == 64
    # Flower's own metadata differ by a few bytes a message.
    assert last.up * 3 == pytest.approx(row["bytes_up_total"], rel=0.02)
    assert last.down * 3 == pytest.approx(row["bytes_down_total"], rel=0.02)


def test_evaluation_costs_no_bytes() -> None:
    assert len(ran("local").points) == 2
    assert run("local", **{"eval-every": 2}).points[-1].up == ran("local").points[-1].up


def test_evaluation_is_nobodys_processor_time() -> None:
    """In one process it was counted as the server's."""

    def work(seconds: float) -> None:
        started = time.process_time()
        while time.process_time() - started < seconds:
            pass

    app = ClientApp(mods=[tally])
    app.query("tally")(tell)

    @app.train("alone")
    def train(message: Message, _context: Context) -> Message:
        work(0.05)
        return Message(RecordDict(), reply_to=message)

    @app.evaluate("alone")
    def evaluate(message: Message, _context: Context) -> Message:
        work(0.5)
        metrics = MetricRecord({"accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    settings = from_run_config({"num-clients": 2})
    session = Session(
        settings, metered(LocalGrid(app, {}, 2)), TestSetEvaluation(settings), lambda line: None
    )

    def run_alone(session: Session) -> None:
        session.ask_all("train.alone", RecordDict())
        session.record(1, mean_client=session.mean_of("evaluate.alone", "accuracy"))

    found = measured(session, run_alone)
    assert 0.04 < found.client_seconds < 0.3
    assert 0 <= found.server_seconds < 0.5


# Weights


def test_the_proximal_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    start = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(5, 3)
    with proximal(model, 0.3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        model(x).square().mean().backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    term = sum((p - s).square().sum() for p, s in zip(model.parameters(), start, strict=True))
    (model(x).square().mean() + 0.15 * term).backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    model.zero_grad()
    model(x).square().mean().backward()
    without = [p.grad for p in model.parameters()]
    assert not torch.equal(without[0], found[0])  # type: ignore[arg-type]


def test_weights_come_back_as_they_were() -> None:
    torch.manual_seed(0)
    model, other = (build_model("cnn", (1, 8, 8), 10) for _ in range(2))
    record = weights_of(model)
    assert not [name for name in record if "num_batches" in name]
    with_weights(other, record)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def _reply(arrays: dict[str, Any], examples: int) -> Message:
    content = RecordDict(
        {
            "arrays": ArrayRecord({n: torch.tensor(v) for n, v in arrays.items()}),
            "metrics": MetricRecord({"num-examples": examples}),
        }
    )
    asked = Message(RecordDict(), dst_node_id=1001, message_type="train")
    return Message(content, reply_to=asked)


def test_fedadam_moves_parameters_and_averages_statistics() -> None:
    LocalGrid(client_app(), TINY, 1)  # sets who sends
    strategy = FedAdamOfParameters(eta=0.01, fraction_evaluate=0.0)
    strategy.current_arrays = {"w": np.zeros(1), "bn.running_var": np.ones(1)}
    replies = [
        _reply({"w": [1.0], "bn.running_var": [3.0]}, 1),
        _reply({"w": [1.0], "bn.running_var": [7.0]}, 3),
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert arrays["bn.running_var"].numpy() == pytest.approx(6.0)
    assert 0 < float(arrays["w"].numpy()[0]) < 0.05


def test_fedprox_tells_clients_its_weight() -> None:
    averaged, near = ran("fedavg").points[-1], ran("fedprox").points[-1]
    assert averaged.up == near.up
    assert averaged.down < near.down  # by the key that has μ


def test_a_client_stays_near_by_the_weight_that_it_is_told() -> None:
    grid = LocalGrid(client_app(), {**TINY, "strategy": "fedprox"}, 3)
    start = weights_of(build_model("cnn", (1, 8, 8), 10))

    def moved(mu: float) -> float:
        config = ConfigRecord({"server-round": 1, "proximal-mu": mu})
        content = RecordDict({"arrays": start, "config": config})
        (reply,) = grid.send_and_receive([Message(content, dst_node_id=1000, message_type="train")])
        found = reply.content.array_records["arrays"]
        names = [name for name in start if "running_" not in name]
        return sum(float(np.square(found[n].numpy() - start[n].numpy()).sum()) for n in names)

    assert 0 < moved(100.0) < 0.5 * moved(0.0)


# Logits


def test_class_means_by_hand() -> None:
    logits = np.array([[1, 2, 0], [3, 4, 0], [5, 5, 1]], dtype=np.float32)
    means = class_means(logits, np.array([0, 0, 2]), 3)
    np.testing.assert_array_equal(means[0], [2, 3, 0])
    np.testing.assert_array_equal(means[2], [5, 5, 1])
    assert np.isnan(means[1]).all()


def test_others_means_leave_the_client_itself_out() -> None:
    nan = np.nan
    means = np.array([[[1.0], [nan]], [[3.0], [4.0]], [[5.0], [nan]]])
    np.testing.assert_array_equal(others_means(means, 0), [[4.0], [4.0]])
    np.testing.assert_array_equal(others_means(means, 1), [[3.0], [nan]])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_images_fit_and_are_always_the_same(name: str) -> None:
    data = from_run_config({}).data
    images = PUBLIC[name](data, 50)
    assert images.dtype == np.uint8
    assert images.shape == (50, 1, 8, 8)
    np.testing.assert_array_equal(images, PUBLIC[name](data, 50))
    assert images.std() > 10


@pytest.mark.parametrize("shape", ["3,213,213", "1,300,700", "3,427,640", "2,8,8", "4,16,8"])
def test_photographs_of_any_shape(shape: str) -> None:
    settings = from_run_config({"dataset": "own", "image-shape": shape, "num-classes": 2})
    images = PUBLIC["photographs"](settings.data, 3)
    assert images.shape == (3, *settings.data.spec.image_shape)
    assert images.std() > 10


def test_a_tenth_is_of_the_training_images() -> None:
    data = from_run_config({}).data
    train = {image.tobytes() for image in load_split(data, "train").images_NCHW}
    found = PUBLIC["a tenth"](data, 10_000)
    assert len(found) == 143
    assert {image.tobytes() for image in found} <= train


# Settings


def test_the_published_run_has_the_papers_values_and_no_more_queries() -> None:
    config = {**TINY, "num-server-rounds": 12, "synthetic-batch-size": 2200}
    settings = server_settings(METHODS["fedzge-paper"], config)
    assert settings.run.recipe == "paper"
    assert settings.queries.estimator == "batch-difference"
    assert settings.run.num_server_rounds == 12 * 2200 // 3000
    own = client_settings(METHODS["fedzge-paper"], config, 0)
    assert (
        own.training.local_epochs > server_settings(METHODS["fedzge"], config).training.local_epochs
    )
    assert own.distillation.client_distill_steps == 3
    base = from_run_config(config)
    (num_examples, *_) = (len(p) for p in partition_indices(base.data, 3, 0))
    steps = own.training.local_epochs * math.ceil(num_examples / 256) + 3
    assert abs(8 * steps - Plan.of(base, num_examples).total) <= 8 * math.ceil(num_examples / 256)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("fraction-train", 0.5, "all clients in every round"),
        ("recipe", "paper", "fedzge-paper"),
        ("client-evaluation", "off", "evaluates on the test set"),
        ("server-evaluation", "off", "evaluates on the test set"),
        ("alhpa", 1.0, "did you mean 'alpha'"),
    ],
)
def test_settings_that_no_comparison_has_are_refused(key: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        given_settings({**TINY, key: value})


def test_averages_of_several_architectures_are_refused() -> None:
    several = {"local-models": "cnn,resnet18,cnn"}
    with pytest.raises(ConfigError, match="cnn, resnet18: give 'local-models'"):
        run("fedavg", **several)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fedvag", "no method named 'fedvag'"),
        ("nowhere:X", "No module named 'nowhere'"),
        ("fedzge_flwr.compare.catalogue:METHODS", "is a Registry; give a Method"),
    ],
)
def test_unknown_methods_are_named(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        method_named(name)


FEW: dict[str, Any] = {
    **TINY,
    "num-clients": 4,
    "num-train-images": 60,
    "min-partition-size": 0,
    "alpha": 0.05,
    "num-server-rounds": 1,
}


@pytest.mark.parametrize(("seed", "fewest"), [(5, 0), (14, 1)])
@pytest.mark.parametrize("name", ["local", "fedavg", "feddf-tenth", "fd", "fedmd-tenth", "fedzge"])
def test_clients_without_images_stop_no_method(name: str, seed: int, fewest: int) -> None:
    """They train on nothing, as FedZGE's do."""
    parts = partition_indices(from_run_config(FEW).data, 4, seed)
    assert min(map(len, parts)) == fewest
    assert run(name, **{**FEW, "seed": seed}).points


class Failing(LocalGrid):
    """The last node's app fails, or its reply never comes."""

    def __init__(self, name: str, lost: bool) -> None:
        super().__init__(client_app(), {**TINY, METHOD_KEY: name}, 3)
        self._lost = lost

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for reply in super().pull_messages(message_ids):
            asked = reply.metadata
            if asked.src_node_id != 1002 or asked.message_type.startswith("query"):
                yield reply
            elif not self._lost:
                error = Error(code=0, reason="out of memory")
                to = Message(RecordDict(), dst_node_id=1002, message_type=asked.message_type)
                yield Message(error, reply_to=to)


@pytest.mark.parametrize("name", ["fedavg", "fedadam", "feddf-tenth", "local"])
@pytest.mark.parametrize("lost", [False, True])
def test_no_average_is_of_fewer_clients(name: str, lost: bool) -> None:
    """Flower's strategies go on without a client that failed, and a comparison has them quiet."""
    said = "1 of 3 clients did not answer" if lost else "a client failed: out of memory"
    with pytest.raises(ComparisonError, match=rf"^train(\.\w+)?: {said}"):
        run_method(name, TINY, Failing(name, lost), lambda line: None)


def test_nor_is_fedzge_compared_with_fewer() -> None:
    with pytest.raises(ComparisonError, match=r"^train\.round: a client failed: out of memory"):
        run_method("fedzge", TINY, Failing("fedzge", lost=False), lambda line: None)
    brief = {**TINY, "exchange-timeout": 1.0, "num-server-rounds": 1}
    with pytest.raises(TooFewClientsError, match="2 of 3 clients answered"):
        run_method("fedzge", brief, Failing("fedzge", lost=True), lambda line: None)


def test_a_client_that_fails_ends_the_run_in_one_line() -> None:
    config = {**TINY, "strategy": "local"}
    broken = {**config, "data-dir": "/nowhere", "dataset": "fashionmnist"}
    grid = LocalGrid(client_app(), broken, 3)
    with pytest.raises(ComparisonError, match=r"train\.alone: a client failed: "):
        run_method("local", config, grid, lambda line: None)
