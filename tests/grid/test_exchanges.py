"""A round in one exchange is the same round as in phases, bit for bit, whatever gets lost."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Result

from fedzge_flwr.black_boxes.contract import FitReport, State
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.client.endpoints import register_endpoints
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.grid.exchange import Failure, GridExchange
from fedzge_flwr.grid.standing import Standing
from fedzge_flwr.wire.codec import encode
from fedzge_flwr.wire.messages import (
    CompactDistillRequest,
    DistillReply,
    HelloReply,
    HelloRequest,
    ImagesNeeded,
)
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.running import rows_of, run_server
from tests.helpers.strategies import make_strategy

ROUNDS = 3
TRAINING = {"train.local", "train.round"}


def run(make_grid: Any, config: dict[str, Any], **options: Any) -> tuple[InProcessGrid, Result]:
    grid = make_grid(config, **options)
    strategy, central = make_strategy(config)
    return grid, strategy.start(grid, ArrayRecord(central.state_dict()), num_rounds=ROUNDS)


def models(grid: InProcessGrid, result: Result) -> list[bytes]:
    """The bytes of the central model and of every client's."""
    records = [result.arrays] + [
        context.state["fedzge-private-model"] for _, context in sorted(grid.contexts.items())
    ]
    return [array.numpy().tobytes() for record in records for array in record.values()]


def actions(grid: InProcessGrid, round_: int) -> Counter[str]:
    sent = (m for m in grid.sent if m.content["message"]["round"] == round_)
    return Counter(message.metadata.message_type for message in sent)


def node(grid: InProcessGrid, message: Message) -> int:
    """The number of the node that a message goes to."""
    return sorted(grid.contexts).index(message.metadata.dst_node_id)


@pytest.fixture
def config(efficient_config: dict[str, Any]) -> dict[str, Any]:
    return {
        **efficient_config,
        "num-server-rounds": ROUNDS,
        "client-distill-rounds": 0,
        "eval-every": 100,
        "client-evaluation": "off",
    }


def both_ways(
    make_grid: Any, config: dict[str, Any], **options: Any
) -> list[tuple[InProcessGrid, Result]]:
    return [
        run(make_grid, {**config, "transport": transport}, **options)
        for transport in ("dense", "compact")
    ]


def in_round(message: Message, round_: int) -> bool:
    return (
        message.metadata.message_type in TRAINING and message.content["message"]["round"] == round_
    )


@pytest.mark.parametrize(
    "more", [{}, {"client-evaluation": "test", "eval-every": 1}, {"local-rounds": 2}]
)
def test_one_exchange_is_the_phases_bit_for_bit(
    make_grid: Any, config: dict[str, Any], more: dict[str, Any]
) -> None:
    phases, one = both_ways(make_grid, {**config, **more})
    assert models(*phases) == models(*one)
    assert phases[1].evaluate_metrics_clientapp == one[1].evaluate_metrics_clientapp


def test_a_round_is_one_exchange_and_the_last_is_followed_by_one(
    make_grid: Any, config: dict[str, Any]
) -> None:
    grid, _ = run(make_grid, config)
    assert actions(grid, 1) == actions(grid, 2) == {"train.round": 3}
    assert actions(grid, 3) == {"train.round": 3, "train.distill": 3}
    evaluated, _ = run(make_grid, {**config, "client-evaluation": "test", "eval-every": 2})
    assert actions(evaluated, 1) == {"train.round": 3}
    assert actions(evaluated, 2) == {"train.round": 3, "train.distill": 3, "evaluate.local": 3}


@pytest.mark.parametrize("lost_client", [0, 1, 2])
def test_partial_participation_and_a_client_that_never_ran(
    make_grid: Any, config: dict[str, Any], lost_client: int
) -> None:
    """Targets of a client that is not sampled, or not reached, wait for its next turn."""
    outcomes = []
    for transport in ("dense", "compact"):
        grid = make_grid({**config, "fraction-train": 0.6, "transport": transport})

        def lost(message: Message, grid: InProcessGrid = grid) -> bool:
            return in_round(message, 2) and node(grid, message) == lost_client

        grid.lose = lost
        strategy, central = make_strategy({**config, "fraction-train": 0.6, "transport": transport})
        result = strategy.start(grid, ArrayRecord(central.state_dict()), num_rounds=ROUNDS)
        outcomes.append(models(grid, result))
        assert sum(actions(grid, number)["train.round"] for number in (1, 2, 3)) in (0, 6)
    assert outcomes[0] == outcomes[1]


def test_a_reply_lost_after_the_work_was_done(make_grid: Any, config: dict[str, Any]) -> None:
    """The client has distilled and trained: it is left out, and distills nothing twice."""
    outcomes = []
    for transport in ("dense", "compact"):
        grid = make_grid({**config, "transport": transport})

        def drop(request: Message, reply: Message, grid: InProcessGrid = grid) -> Message | None:
            return None if in_round(request, 2) and node(grid, request) == 1 else reply

        grid.tamper = drop
        strategy, central = make_strategy({**config, "transport": transport})
        result = strategy.start(grid, ArrayRecord(central.state_dict()), num_rounds=ROUNDS)
        outcomes.append(models(grid, result))
        again = [
            message.content["message"]["targets_round"]
            for message in grid.sent
            if message.metadata.message_type == "train.round" and node(grid, message) == 1
        ]
        assert again == ([] if transport == "dense" else [0, 1, 1])
    assert outcomes[0] == outcomes[1]


class Recording(TorchBlackBox):
    """Notes the rounds that it trains for."""

    fitted: dict[int, list[int]]

    def fit(self, round_: int) -> FitReport:
        self.fitted.setdefault(self._partition, []).append(round_)
        return super().fit(round_)


def rounds_trained_for(
    make_grid: Any, config: dict[str, Any], **losses: Any
) -> dict[int, list[int]]:
    """Run with requests or replies lost; return the rounds that each client has trained for."""
    app, fitted = ClientApp(), {}

    def make(context: Context) -> Recording:
        box = Recording(from_run_config(config), int(context.node_config["partition-id"]), 3)
        box.fitted = fitted
        return box

    register_endpoints(app, make)
    grid = make_grid(config, app=app)
    for name, loss in losses.items():
        setattr(grid, name, loss(grid))
    run_server(grid, config)
    return fitted


def lose_of_second(*rounds: int) -> Any:
    """Lose the requests of those rounds to the second node."""
    return lambda grid: (
        lambda message: (
            any(in_round(message, number) for number in rounds) and node(grid, message) == 1
        )
    )


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["dense", "compact"])
@pytest.mark.parametrize(
    ("most", "trained"), [(0, [1, 4]), (1, [1, 3, 4]), (2, [1, 2, 3, 4]), (500, [1, 2, 3, 4])]
)
def test_missed_training_is_made_up_for(
    make_grid: Any, config: dict[str, Any], transport: str, most: int, trained: list[int]
) -> None:
    """Two rounds missed; once made up for, they are no longer owed."""
    config = {**config, "transport": transport, "catch-up-rounds": most, "num-server-rounds": 5}
    fitted = rounds_trained_for(make_grid, config, lose=lose_of_second(2, 3))
    assert fitted == {0: [1, 2, 3, 4, 5], 1: [*trained, 5], 2: [1, 2, 3, 4, 5]}


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["dense", "compact"])
def test_training_whose_reply_was_lost_is_not_done_twice(
    make_grid: Any, config: dict[str, Any], transport: str
) -> None:
    """Without a state-dir the client has gone on, to a state that the server does not know."""
    config = {**config, "transport": transport}

    def drop(grid: InProcessGrid) -> Any:
        lost = lose_of_second(2)(grid)
        return lambda request, reply: None if lost(request) else reply

    assert rounds_trained_for(make_grid, config, tamper=drop)[1] == [1, 2, 3]


def test_who_missed_the_first_round_makes_up_for_it_and_no_more(
    make_grid: Any, config: dict[str, Any]
) -> None:
    assert rounds_trained_for(make_grid, config, lose=lose_of_second(1))[1] == [1, 2, 3]


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["dense", "compact"])
@pytest.mark.parametrize(("catch_up", "trained"), [(2, [1, 2, 3]), (0, [3, 4, 5])])
def test_local_training_ends_with_a_clients_own_first_rounds(
    make_grid: Any,
    config: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    transport: str,
    catch_up: int,
    trained: list[int],
) -> None:
    """The second misses two rounds, and trains as often as the others all the same."""
    config = {**config, "transport": transport, "local-rounds": 3, "num-server-rounds": 6}
    config |= {"catch-up-rounds": catch_up}
    fitted = rounds_trained_for(make_grid, config, lose=lose_of_second(1, 2))
    assert fitted == {0: [1, 2, 3], 1: trained, 2: [1, 2, 3]}
    assert "has not trained" not in caplog.text


@pytest.mark.parametrize("transport", ["dense", "compact"])
def test_a_client_that_stops_training_has_trained(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    """Its owner allows one training; the others train in every round."""
    config = {**config, "transport": transport, "local-rounds": 0, "num-server-rounds": 3}

    def limited(grid: InProcessGrid) -> Any:
        grid.contexts[sorted(grid.contexts)[1]].node_config["max-trainings"] = 1
        return grid.contexts

    fitted = rounds_trained_for(make_grid, config, contexts=limited)
    assert fitted == {0: [1, 2, 3], 1: [1], 2: [1, 2, 3]}
    assert "has not trained" not in caplog.text


def test_a_client_that_is_through_with_training_answers_from_the_same_state(
    make_grid: Any, config: dict[str, Any]
) -> None:
    config = {**config, "local-rounds": 2, "num-server-rounds": 5, "client-distill-steps": 0}
    grid = make_grid(config)
    rows = rows_of(run_server(grid, config))
    states = [
        reply.content["message"]["state"]
        for request, reply in zip(grid.sent, grid.received, strict=True)
        if request.metadata.message_type == "train.round" and node(grid, request) == 0
    ]
    assert len(states) == 5
    assert states[0] != states[1]
    assert states[1:] == [states[1]] * 4
    assert ["local_training" in row["loss"] for row in rows] == [True] * 2 + [False] * 3


def test_a_client_that_lost_the_images_gets_them_again(
    make_grid: Any, config: dict[str, Any]
) -> None:
    whole = run(make_grid, config)
    grid = make_grid(config)

    def forget(request: Message, reply: Message) -> Message:
        if node(grid, request) == 2:
            grid.contexts[request.metadata.dst_node_id].state.pop("fedzge-asked", None)
        return reply

    grid.tamper = forget
    strategy, central = make_strategy(config)
    result = strategy.start(grid, ArrayRecord(central.state_dict()), num_rounds=ROUNDS)
    assert models(grid, result) == models(*whole)
    # Once more to that client, in both rounds that bring targets, and after the last.
    assert actions(grid, 2) == {"train.round": 4}
    assert actions(grid, 3) == {"train.round": 4, "train.distill": 4}


@pytest.mark.faults
def test_a_distillation_that_diverges_is_left_out_and_not_repeated(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    phases, one = both_ways(make_grid, {**config, "client-distill-lr": 1e30})
    assert models(*phases) == models(*one)
    left_out = [r.getMessage() for r in caplog.records if "train.distill" in r.getMessage()]
    assert len(left_out) == 2 * 3 * ROUNDS
    assert all("diverged" in line and "'client-distill-lr'" in line for line in left_out)
    targets = [
        message.content["message"]["targets_round"]
        for message in one[0].sent
        if message.metadata.message_type == "train.round"
    ]
    assert targets == [0] * 3 + [1] * 3 + [2] * 3


class Stubborn(TorchBlackBox):
    """Fails after it has begun to distill, and changes the arrays that it had handed out."""

    def distill(self, *given: Any) -> float:
        super().distill(*given)
        for array in self.handed_out.values():
            array.fill(0)
        raise RuntimeError("no distillation\nhere")

    def state(self) -> State:
        self.handed_out = super().state()
        return self.handed_out


def test_a_black_box_that_cannot_distill_takes_part_all_the_same(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    outcomes = []
    for transport in ("dense", "compact"):
        more = {**config, "transport": transport}
        app = ClientApp()
        settings = from_run_config(more)
        register_endpoints(
            app,
            lambda context, settings=settings: Stubborn(
                settings, int(context.node_config["partition-id"]), 3
            ),
        )
        outcomes.append(models(*run(make_grid, more, app=app)))
    outcomes.append(models(*run(make_grid, {**config, "client-distill-steps": 0})))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    lines = [r.getMessage() for r in caplog.records if "left out of" in r.getMessage()]
    assert len(lines) == 2 * 3 * ROUNDS
    told = "the model is as before: Stubborn failed: RuntimeError; the node's own log says why"
    assert all(line.endswith(told) for line in lines)


def test_targets_are_delivered_even_if_the_last_round_is_skipped(
    make_grid: Any, config: dict[str, Any]
) -> None:
    config = {**config, "min-clients": 3, "too-few-clients": "skip"}
    outcomes = []
    for transport in ("dense", "compact"):
        grid = make_grid({**config, "transport": transport})

        def lost(message: Message, grid: InProcessGrid = grid) -> bool:
            return in_round(message, 3) and node(grid, message) == 0

        grid.lose = lost
        strategy, central = make_strategy({**config, "transport": transport})
        result = strategy.start(grid, ArrayRecord(central.state_dict()), num_rounds=ROUNDS)
        outcomes.append(models(grid, result))
    assert outcomes[0] == outcomes[1]


def test_images_are_kept_until_they_are_distilled_and_no_longer(
    make_grid: Any, config: dict[str, Any]
) -> None:
    kept: list[bool] = []

    def look(request: Message, reply: Message) -> Message:
        state = grid.contexts[request.metadata.dst_node_id].state
        kept.append("fedzge-asked" in state)
        return reply

    grid = make_grid({**config, "client-distill-rounds": 2}, tamper=look)
    strategy, central = make_strategy({**config, "client-distill-rounds": 2})
    strategy.start(grid, ArrayRecord(central.state_dict()), num_rounds=ROUNDS)
    # The hello, rounds 1 to 3, and the last delivery; distillation begins in round 2.
    assert kept == [False] * 3 + [False] * 3 + [True] * 6 + [False] * 3


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["dense", "compact"])
@pytest.mark.parametrize(("of_round", "field"), [(1, "round"), (2, "query")])
def test_a_reply_to_something_else_is_not_taken_for_this_rounds(
    make_grid: Any, config: dict[str, Any], transport: str, of_round: int, field: str
) -> None:
    """An answer of the round before, as it was, or as if it were of this round."""
    config = {**config, "transport": transport}
    action = "train.round" if transport == "compact" else "query.logits"
    kept: list[RecordDict] = []

    def swap(request: Message, reply: Message) -> Message:
        if request.metadata.message_type == action and node(grid, request) == 1:
            kept.append(reply.content)
            if reply.content["message"]["round"] == 2:
                old = ConfigRecord({**kept[0]["message"], "round": of_round})
                content = RecordDict({"message": old, "arrays": kept[0]["arrays"]})
                return Message(content, reply_to=request)
        return reply

    grid = make_grid(config, tamper=swap)
    folder = run_server(grid, config)
    missing = [row["missing"] for row in rows_of(folder)]
    assert [len(items) for items in missing] == [0, 1, 0]
    assert missing[1][0]["partition"] == 1
    assert f"field '{field}': " in missing[1][0]["reason"]


def test_each_phase_has_its_own_patience(make_grid: Any, config: dict[str, Any]) -> None:
    config = {**config, "transport": "dense", "client-evaluation": "test", "num-server-rounds": 1}
    config |= {"train-timeout": 1.25, "distill-timeout": 1.5, "exchange-timeout": 2.25}
    config |= {"query-timeout": 0.0, "evaluate-timeout": 1.75, "node-timeout": 2.0}
    lost = {"train.local": 0, "query.logits": 1, "train.distill": 2, "evaluate.local": 3}

    def slow(message: Message) -> float:
        lost_here = lost.get(message.metadata.message_type) == node(grid, message)
        return math.inf if lost_here else 0.0

    config = {**config, "num-clients": 4}
    grid = make_grid(config, slow=slow)
    (row,) = rows_of(run_server(grid, config))
    waited = [item for item in row["missing"] if "passed over" not in item["reason"]]
    found = {item["action"]: item["reason"] for item in waited}
    assert found == {
        "train.local": "no reply within 1.25 s",
        "query.logits": "no reply within 2.25 s",
        "train.distill": "no reply within 1.5 s",
        "evaluate.local": "no reply within 1.75 s",
    }


class SlowGrid(InProcessGrid):
    """Each look finds one reply more, the first look none; the last node never replies."""

    looks = 0

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        # A look asks for each reply by itself, for the last one always.
        *_, last = self._replies
        self.looks += last in set(message_ids)
        ready = list(self._replies)[: min(self.looks, len(self.contexts) - 1)]
        found = [number for number in ready if number in set(message_ids)]
        return [self._replies[number] for number in found]


def test_who_needs_images_is_no_quorum(config: dict[str, Any]) -> None:
    """It has done nothing: whoever is at work is not left out for it."""
    run = from_run_config({**config, "num-clients": 4, "quorum": 0.5, "grace-period": 0.2}).run
    grid = InProcessGrid(ClientApp(), {}, 4)
    lazy = set(sorted(grid.contexts)[:2])

    def reply(request: Message, _: Message) -> Message:
        of_lazy = request.metadata.dst_node_id in lazy
        done = ImagesNeeded(round=1) if of_lazy else DistillReply(round=1, loss=1.0, problem="")
        return Message(encode(done), reply_to=request)

    grid.tamper = reply
    grid.slow = lambda request: 0.0 if request.metadata.dst_node_id in lazy else 0.8
    nothing = np.zeros((0, 1, 8, 8), np.uint8)
    request = CompactDistillRequest(
        round=1, temperature=1.0, digest="a", images=nothing, logits=np.zeros((4, 10), np.float32)
    )
    kinds = (DistillReply, ImagesNeeded)
    exchange = GridExchange(grid, run, 30.0)
    replies, failures = exchange.send(
        [(request, list(grid.contexts))], kinds, lambda _: Standing(), dims={"K": 10}
    )
    assert not failures
    assert {node for node, found in replies.items() if isinstance(found, ImagesNeeded)} == lazy
    assert len(replies) == 4


def test_replies_are_told_as_they_come_and_waited_for_no_longer_than_said(
    config: dict[str, Any],
) -> None:
    import client_app

    told: list[tuple[int, int]] = []
    grid = SlowGrid(client_app.app, config, 3)
    run = from_run_config({**config, "node-timeout": 0.6}).run
    exchange = GridExchange(grid, run, 3600.0, lambda *news: told.append(news))
    nodes = list(grid.contexts)
    started = time.monotonic()
    replies, failures = exchange.send(
        [(HelloRequest(round=0, version="1"), nodes)], (HelloReply,), lambda _: Standing()
    )
    assert 0.6 <= time.monotonic() - started < 1.5
    assert [replies[number].partition for number in replies] == [0, 1]
    assert failures == {nodes[2]: Failure("no reply within 0.6 s", silent=True)}
    assert told == [(0, 3), (1, 3), (2, 3)]
    # A tenth of a second between two looks, at first.
    assert 4 <= grid.looks <= 8
