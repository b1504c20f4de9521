from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedzge_flwr.black_boxes.contract import State
from fedzge_flwr.black_boxes.node import torch_black_box
from fedzge_flwr.black_boxes.partition import TorchBlackBox, cap_memory
from fedzge_flwr.client.endpoints import register_endpoints
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.images.pixels import to_levels
from fedzge_flwr.learning.distillation import distill
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question, image_digest
from fedzge_flwr.wire.codec import encode
from fedzge_flwr.wire.messages import (
    CompactDistillRequest,
    DistillReply,
    DistillRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    ImagesNeeded,
    LogitsReply,
    LogitsRequest,
    Request,
    TrainReply,
    TrainRequest,
)
from tests.helpers.node import IMAGES, LEVELS, LOGITS, Node, compact


@pytest.fixture
def node(make_grid: Any, tiny_config: dict[str, Any]) -> Node:
    return Node(make_grid, tiny_config)


def test_hello(node: Node) -> None:
    hello = node.answer(HelloRequest(round=0, version="x"), HelloReply)
    assert (hello.partition, hello.num_partitions) == (0, 3)
    assert hello.num_examples > 0
    here = ("cuda", 1.0) if torch.cuda.is_available() else ("cpu", 0.0)
    assert (hello.device, hello.gpu_share) == here
    assert not node.state()


def test_only_training_and_distillation_change_the_model(node: Node) -> None:
    query = LogitsRequest(round=1, images=IMAGES)
    untrained = node.answer(query, LogitsReply).logits
    assert not node.state()
    node.answer(TrainRequest(round=1), TrainReply)
    trained = node.state()
    assert trained
    answers = node.answer(query, LogitsReply).logits
    assert not np.allclose(untrained, answers)
    node.answer(EvaluateRequest(round=1, split="test", num_logits=60), EvaluateReply)
    # Neither query nor evaluation leaks into running statistics.
    assert all((node.state()[name] == value).all() for name, value in trained.items())
    assert (node.answer(query, LogitsReply).logits == answers).all()
    distilled = DistillRequest(round=1, temperature=2.0, images=IMAGES, logits=LOGITS)
    assert node.answer(distilled, DistillReply).loss > 0
    assert any((node.state()[name] != value).any() for name, value in trained.items())


SHAPE = (1, 8, 8)
NORMAL = np.random.default_rng(4).normal(size=(2, 4, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize(
    "directions",
    [
        Directions.written_out(NORMAL),
        Directions.ternary(NORMAL),
        Directions.from_seed(2, 4, SHAPE, seed=9),
    ],
    ids=["written out", "ternary", "from a seed"],
)
def test_compact_and_dense_queries_are_answered_alike(node: Node, directions: Directions) -> None:
    node.answer(TrainRequest(round=1), TrainReply)
    request = compact(directions=directions.payload_QGP, seed=directions.seed)
    images = Question(LEVELS, directions, request.eps).images_BCHW
    dense = node.answer(LogitsRequest(round=1, images=images), LogitsReply).logits
    assert len(dense) == 12 + 2 * 4
    assert np.array_equal(node.answer(request, LogitsReply).logits, dense)


def test_distillation_on_images_asked_about_is_that_on_images_sent(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    digest = image_digest(to_levels(LEVELS))
    common = {"round": 1, "temperature": 2.0, "logits": LOGITS}
    ways = (
        DistillRequest(images=LEVELS, **common),
        CompactDistillRequest(digest="", images=to_levels(LEVELS), **common),
        CompactDistillRequest(digest=digest, images=to_levels(LEVELS[:0]), **common),
    )
    losses, models = set(), []
    for request in ways:
        node = Node(make_grid, tiny_config)
        node.answer(compact(), LogitsReply)
        reply = node.answer(request, DistillReply)
        losses.add(reply.loss)
        models.append(b"".join(v.tobytes() for k, v in sorted(node.state().items()) if k != digest))
    assert len(losses) == 1
    assert len(set(models)) == 1


def test_images_that_are_not_kept_are_asked_for(node: Node) -> None:
    """Those of another query, of one that foretold no distillation, or of none."""
    digest = image_digest(to_levels(LEVELS))
    request = CompactDistillRequest(
        round=1, temperature=2.0, digest=digest, images=to_levels(LEVELS[:0]), logits=LOGITS
    )
    node.answer(request, ImagesNeeded)
    node.answer(compact(to_distill=False), LogitsReply)
    node.answer(request, ImagesNeeded)
    node.answer(compact(), LogitsReply)
    node.answer(compact(base=255 - to_levels(LEVELS)), LogitsReply)
    node.answer(request, ImagesNeeded)
    # Only the newest query's images are kept: a client's state does not grow.
    assert len(node.context.state.array_records["fedzge-asked"]) == 1


def test_answers_do_not_depend_on_the_rest_of_the_query(node: Node) -> None:
    node.answer(TrainRequest(round=1), TrainReply)
    together = node.answer(LogitsRequest(round=1, images=IMAGES), LogitsReply).logits
    alone = node.answer(LogitsRequest(round=1, images=IMAGES[3:4]), LogitsReply).logits
    np.testing.assert_allclose(together[3:4], alone, rtol=1e-5, atol=1e-6)


def test_distillation_learns_the_teacher(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    request = DistillRequest(round=1, temperature=2.0, images=IMAGES, logits=LOGITS)
    losses = []
    for steps in (1, 40):
        config = {**tiny_config, "client-distill-steps": steps, "client-distill-lr": 0.01}
        losses.append(Node(make_grid, config).answer(request, DistillReply).loss)
    assert losses[1] < 0.3 * losses[0]


def test_local_training_obeys_its_switches(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    query, answers = LogitsRequest(round=1, images=IMAGES), []
    switches = ("mixup", "logit-adjustment", "random-shifts", "random-erasing")
    for switched_off in ("none", *switches):
        settings = {**dict.fromkeys(switches, True), switched_off: False}
        settings.pop("none", None)
        node = Node(make_grid, {**tiny_config, **settings})
        node.answer(TrainRequest(round=1), TrainReply)
        answers.append(node.answer(query, LogitsReply).logits.tobytes())
    assert len(set(answers)) == 5


def test_clients_rehearse_their_own_images_if_told_to(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    """A client that has learned its data keeps what it knows while it distills."""
    accuracies = []
    for rehearsal in (True, False):
        config = {
            **tiny_config,
            "local-epochs": 40,
            "client-distill-steps": 40,
            "client-distill-lr": 0.01,
            "client-rehearsal": rehearsal,
        }
        owner = {"partition-id": 0, "num-partitions": 3, "max-accuracy-loss": 100.0}
        node = Node(lambda config, o=owner: make_grid(config, node_configs={0: o}), config)
        node.answer(TrainRequest(round=1), TrainReply)
        request = DistillRequest(round=1, temperature=1.0, images=IMAGES, logits=LOGITS)
        node.answer(request, DistillReply)
        evaluated = EvaluateRequest(round=1, split="test", num_logits=60)
        accuracies.append(node.answer(evaluated, EvaluateReply).accuracy)
    assert accuracies[0] > accuracies[1] + 0.1


def test_distillation_is_told_of_class_balance_and_of_unseen_classes(
    make_grid: Any, tiny_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rehearsal leaves classes alone of which the client has no image."""
    given: list[dict[str, Any]] = []

    def spy(*arguments: Any, **named: Any) -> float:
        given.append(named)
        return distill(*arguments, **named)

    monkeypatch.setattr("fedzge_flwr.black_boxes.module.distill", spy)
    config = {**tiny_config, "alpha": 0.1, "client-rehearsal": True, "class-balance": 0.25}
    node = Node(make_grid, config)
    node.answer(
        DistillRequest(round=1, temperature=1.0, images=IMAGES, logits=LOGITS), DistillReply
    )
    assert given[0]["class_balance"] == 0.25
    own = given[0]["rehearsed"]
    seen = torch.bincount(own.labels_N, minlength=10) > 0
    assert 0 < int(seen.sum()) < 10
    assert torch.equal(own.log_prior_K.isfinite(), seen)


def test_every_client_begins_and_shuffles_by_itself(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    """Initial weights depend on the partition; the order of examples on partition and round."""
    config = {**tiny_config, "batch-size": 8, "num-clients": 2, "partition": "iid"}
    query = LogitsRequest(round=1, images=IMAGES)
    nodes = [Node(make_grid, config, number) for number in (0, 1)]
    first, second = (node.answer(query, LogitsReply).logits for node in nodes)
    assert not np.allclose(first, second)
    trained = []
    for round_ in (1, 2, 1):
        node = Node(make_grid, config)
        node.answer(TrainRequest(round=round_), TrainReply)
        trained.append(node.answer(query, LogitsReply).logits)
    assert (trained[0] == trained[2]).all()
    assert not np.allclose(trained[0], trained[1])


def test_evaluation_on_the_common_test_set_returns_logits(node: Node) -> None:
    outcome = node.answer(EvaluateRequest(round=1, split="test", num_logits=60), EvaluateReply)
    assert outcome.num_examples == 60
    assert outcome.logits.shape == (60, 10)


def test_evaluation_on_held_out_images_returns_none(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    node = Node(
        make_grid, {**tiny_config, "client-evaluation": "held-out", "holdout-fraction": 0.3}
    )
    outcome = node.answer(EvaluateRequest(round=1, split="held-out", num_logits=60), EvaluateReply)
    assert outcome.num_examples > 0
    assert outcome.logits.shape == (0, 10)


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (LogitsRequest(round=1, images=np.zeros((3, 1, 9, 8), np.float32)), "'images': shape"),
        (LogitsRequest(round=1, images=np.zeros((999, 1, 8, 8), np.float32)), "'images': shape"),
        (LogitsRequest(round=1, images=np.full((3, 1, 8, 8), np.nan, np.float32)), "not finite"),
        (
            DistillRequest(
                round=1, temperature=1.0, images=IMAGES, logits=np.zeros((12, 9), np.float32)
            ),
            "'logits': shape",
        ),
        (
            compact(directions=np.zeros((3, 12, 256), np.uint8)),
            "'base': 48 images with copies; at most 36",
        ),
        (
            compact(directions=np.zeros((0, 13, 256), np.uint8)),
            "'directions': for 13 of 12 images",
        ),
        (
            compact(directions=np.zeros((1, 1, 252), np.uint8)),
            "'directions': 252 bytes a direction",
        ),
        (
            compact(directions=np.zeros((9, 4, 0), np.uint8)),
            "'base': 48 images with copies; at most 36",
        ),
        (compact(directions=np.zeros((1, 1, 13), np.uint8)), "'directions': ternary digits beyond"),
        (compact(directions=np.full((1, 1, 256), 255, np.uint8)), "'directions': values that are"),
    ],
)
def test_bad_requests_are_refused_and_change_nothing(
    node: Node, request_: Request, complaint: str
) -> None:
    node.answer(TrainRequest(round=1), TrainReply)
    before = node.state()
    reply = node.ask(request_)
    assert reply.has_error()
    assert complaint in str(reply.error.reason)
    assert all((node.state()[name] == value).all() for name, value in before.items())


def test_another_test_set_than_the_servers_is_refused(node: Node) -> None:
    reply = node.ask(EvaluateRequest(round=1, split="test", num_logits=59))
    assert "the test set has 60 images here and 59 at the server" in str(reply.error.reason)
    outcome = node.answer(EvaluateRequest(round=1, split="test", num_logits=0), EvaluateReply)
    assert (outcome.num_examples, len(outcome.logits)) == (60, 0)


def test_a_distillation_that_diverges_changes_nothing(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    node = Node(make_grid, {**tiny_config, "client-distill-lr": 1e30, "client-distill-steps": 4})
    node.answer(TrainRequest(round=1), TrainReply)
    before = node.state()
    request = DistillRequest(round=1, temperature=2.0, images=IMAGES, logits=LOGITS)
    reply = node.answer(request, DistillReply)
    assert reply.loss == 0
    assert reply.problem.startswith("it went wrong and the model is as before: the model diverged")
    assert all((node.state()[name] == value).all() for name, value in before.items())
    assert node.answer(TrainRequest(round=2), TrainReply).loss >= 0


def test_training_that_diverges_is_refused(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    node = Node(make_grid, {**tiny_config, "local-lr": 1e30, "local-epochs": 5})
    reply = node.ask(TrainRequest(round=1))
    assert "diverged" in str(reply.error.reason)
    assert "is kept as it was before" in str(reply.error.reason)
    assert not node.state()


def test_partitions_too_small_for_batch_norm(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    """With 60 clients at α = 0.01 some have no image, some one: they answer, untrained."""
    config = {**tiny_config, "num-clients": 60, "alpha": 0.01, "min-partition-size": 0}
    nodes = [Node(make_grid, config, number) for number in range(60)]
    seen = set()
    for node in nodes:
        hello = node.answer(HelloRequest(round=0, version="x"), HelloReply)
        if hello.num_examples < 2 and hello.num_examples not in seen:
            seen.add(hello.num_examples)
            assert node.answer(TrainRequest(round=1), TrainReply).num_examples == 0
            logits = node.answer(LogitsRequest(round=1, images=IMAGES), LogitsReply).logits
            assert np.isfinite(logits).all()
    assert seen == {0, 1}


def test_model_by_partition_and_by_owner(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    config = {**tiny_config, "local-models": "cnn,resnet18-3x3,cnn"}
    grid = make_grid(
        config,
        node_configs={2: {"partition-id": 2, "num-partitions": 3, "model": "resnet18"}},
    )
    sizes = {}
    for node_id, context in sorted(grid.contexts.items()):
        (reply,) = grid.send_and_receive(
            [Message(encode(TrainRequest(round=1)), node_id, "train.local")]
        )
        assert reply.has_content()
        record = next(iter(context.state.array_records.values()))
        sizes[node_id] = {name: tuple(array.shape) for name, array in record.items()}
    cnn, small_stem, owners = (sizes[node_id] for node_id in sorted(sizes))
    assert len(cnn) < len(small_stem) == len(owners)
    assert small_stem["conv1.weight"] == (64, 1, 3, 3)
    assert owners["conv1.weight"] == (64, 1, 7, 7)


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({}, "'partition-id' = None"),
        ({"partition-id": "zero"}, "'partition-id' = 'zero'"),
        ({"partition-id": 0, "num-partitions": "two"}, "'num-partitions' = 'two'"),
        (
            {"partition-id": 0, "num-partitions": 3, "model": "vgg"},
            "'model' = 'vgg': no such model; known: cnn",
        ),
    ],
)
def test_bad_node_configs(
    make_grid: Any, tiny_config: dict[str, Any], node_config: dict[str, Any], message: str
) -> None:
    grid = make_grid(tiny_config, node_configs={0: node_config})
    with pytest.raises(ConfigError, match=message):
        torch_black_box(next(iter(grid.contexts.values())))


def test_a_foreign_state_is_refused(node: Node) -> None:
    box = torch_black_box(node.context)
    with pytest.raises(ValueError, match="not one of a cnn"):
        box.load_state({"weight": np.zeros(3)})


def test_black_boxes_are_closed_after_each_message(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    """Whether it could be answered or not, and after the model has been kept."""
    seen: list[tuple[str, bool]] = []

    class Noted(TorchBlackBox):
        def state(self) -> State:
            seen.append(("state", self._built is None))
            return super().state()

        def close(self) -> None:
            seen.append(("close", self._built is None))
            super().close()
            assert self._built is None

    def make(context: Context) -> TorchBlackBox:
        return Noted(from_run_config(context.run_config), 0, 3)

    app = ClientApp()
    register_endpoints(app, make)
    node = Node(lambda config: make_grid(config, app=app), tiny_config)
    node.answer(TrainRequest(round=1), TrainReply)
    assert seen == [("state", False), ("close", False)]
    seen.clear()
    assert node.ask(EvaluateRequest(round=1, split="test", num_logits=7)).has_error()
    assert [name for name, _ in seen] == ["close"]


def test_a_clients_part_of_a_gpus_memory_is_its_share_of_the_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[float, int]] = []
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda *given: calls.append(given)
    )
    gpu = torch.device("cuda", 0)
    for device, share in ((gpu, 0.25), (gpu, 1.0), (gpu, 0.0), (torch.device("cpu"), 0.25)):
        cap_memory(device, share)
    # By number: torch refuses a device without one.
    assert calls == [(0.25, 0)]
