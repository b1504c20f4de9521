"""Clients that are silent, slow, odd or huge: what they cost, and that each is accounted for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, Context, Error, Message
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from fedzge_flwr import FunctionBlackBox, make_settings, register_endpoints
from fedzge_flwr.grid.backoff import ClientBackOff
from fedzge_flwr.grid.clients import GridClients
from fedzge_flwr.query.question import Question
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.wire.codec import encode
from fedzge_flwr.wire.messages import ImagesNeeded, Refused
from tests.helpers.boxes import SHAPE, TINY
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.launching import ROOT
from tests.helpers.running import folder_of, rows_of, run_server

ROUNDS = 12


@pytest.fixture
def config(efficient_config: dict[str, Any]) -> dict[str, Any]:
    return {
        **efficient_config,
        "num-server-rounds": ROUNDS,
        "client-distill-rounds": 0,
        "exchange-timeout": 0.3,
        "min-clients": 2,
    }


def reasons_of(rows: list[dict[str, Any]], partition: int) -> list[list[str]]:
    """Why a client is missing, by round."""
    return [
        [item["reason"] for item in row["missing"] if item["partition"] == partition]
        for row in rows
    ]


# -- silence --------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["compact", "dense"])
@pytest.mark.parametrize("dies", ["before", "between"])
def test_a_silent_client_costs_three_timeouts_in_twelve_rounds(
    make_grid: Any, config: dict[str, Any], transport: str, dies: str
) -> None:
    """Evaluation and delivery included; it may have answered the first round's question."""
    config = {**config, "transport": transport}
    grid = make_grid(config)
    mute = sorted(grid.contexts)[1]
    last = {"compact": "train.round", "dense": "query.logits"}[transport]
    asked: list[tuple[int, str]] = []

    def slow(message: Message) -> float:
        action = message.metadata.message_type
        if message.metadata.dst_node_id != mute or action == "query.hello":
            return 0.0
        if dies == "between" and last not in {of for _, of in asked}:
            asked.append((0, action))
            return 0.0
        asked.append((int(message.content["message"]["round"]), action))
        return math.inf

    grid.slow = slow
    rows = rows_of(run_server(grid, config))
    assert len([round_ for round_, _ in asked if round_]) == 3
    reasons = reasons_of(rows, 1)
    waited = [text for of_round in reasons for text in of_round if "no reply within" in text]
    assert waited == ["no reply within 0.3 s"] * 3
    # Also in the rounds in which it is not asked, it is said why.
    assert all(reasons)
    silent = "passed over: silent in round 1, next asked in round "
    assert silent + {"before": "3", "between": "2"}[dies] in reasons[0]
    assert [row["participants"] for row in rows[1:]] == [[0, 2]] * (ROUNDS - 1)


@pytest.mark.faults
def test_who_is_silent_at_evaluation_alone_goes_on_answering(
    make_grid: Any, config: dict[str, Any]
) -> None:
    grid = make_grid(config)
    mute = sorted(grid.contexts)[1]
    asked: list[int] = []

    def slow(message: Message) -> float:
        of_it = message.metadata.dst_node_id == mute
        if of_it and message.metadata.message_type == "evaluate.local":
            asked.append(int(message.content["message"]["round"]))
            return math.inf
        return 0.0

    grid.slow = slow
    rows = rows_of(run_server(grid, config))
    assert [row["participants"] for row in rows] == [[0, 1, 2]] * ROUNDS
    assert asked == [1, 3, 7]


def test_a_reply_ends_the_waiting() -> None:
    back_off = ClientBackOff()

    def asked(rounds: Iterable[int], action: str) -> list[int]:
        return [round_ for round_ in rounds if back_off.reason(round_, 0, action) is None]

    back_off.note_silence(1, 0, "a")
    back_off.note_silence(3, 0, "a")
    assert asked(range(3, 10), "a") == asked(range(3, 10), "b") == [7, 8, 9]
    assert back_off.reason(4, 1, "a") is None
    back_off.note_reply(7, 0, "a")
    assert asked(range(7, 10), "a") == [7, 8, 9]
    back_off.note_silence(8, 0, "a")
    assert asked(range(8, 12), "a") == [10, 11]
    assert back_off.reason(9, 0, "a") == "passed over: silent in round 8, next asked in round 10"
    # Who has answered in the same round is there.
    back_off.note_reply(20, 0, "a")
    back_off.note_silence(20, 0, "b")
    assert asked(range(20, 24), "a") == [21, 22, 23]
    assert asked(range(20, 24), "b") == [22, 23]


# -- slowness -------------------------------------------------------------------------------------


def test_a_quorum_waits_for_the_others_no_longer_than_the_grace_period(
    make_grid: Any, config: dict[str, Any]
) -> None:
    config = {**config, "num-server-rounds": 3, "exchange-timeout": 60.0, "eval-every": 3}
    config |= {"quorum": 0.6, "grace-period": 0.25, "client-evaluation": "off"}
    grid = make_grid(config)
    nodes = sorted(grid.contexts)

    def slow(message: Message) -> float:
        rounds = message.metadata.message_type == "train.round"
        return {nodes[1]: 0.15, nodes[2]: 20.0}.get(message.metadata.dst_node_id, 0.0) * rounds

    grid.slow = slow
    started = time.monotonic()
    rows = rows_of(run_server(grid, config))
    assert time.monotonic() - started < 15
    assert [row["participants"] for row in rows] == [[0, 1]] * 3
    # It costs no timeout, and is asked in each round.
    assert [texts[0] for texts in reasons_of(rows, 2)] == [
        "no reply within 'grace-period' = 0.25 s after a quorum's"
    ] * 3


def test_without_a_quorum_all_are_waited_for(make_grid: Any, config: dict[str, Any]) -> None:
    config = {**config, "num-server-rounds": 1, "exchange-timeout": 60.0, "grace-period": 0.0}
    grid = make_grid(config, slow=lambda message: 0.4 * (message.metadata.dst_node_id == 1017))
    (row,) = rows_of(run_server(grid, config))
    assert row["participants"] == [0, 1, 2]


# -- size -----------------------------------------------------------------------------------------


def swollen(reply: Message, megabytes: int) -> Message:
    reply.content["message"]["reason"] = b"x" * (megabytes * 10**6)
    return reply


@pytest.mark.parametrize("resumed", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_who_sends_far_too_much_is_barred(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture, resumed: bool
) -> None:
    config = {**config, "num-server-rounds": 4, "client-evaluation": "off"}
    grid = make_grid(config)
    huge = sorted(grid.contexts)[1]

    def tamper(request: Message, reply: Message) -> Message:
        return (
            swollen(reply, 3)
            if request.metadata.dst_node_id == huge
            and (request.metadata.message_type != "query.hello")
            else reply
        )

    grid.tamper = tamper
    rows = rows_of(run_server(grid, config))
    if resumed:
        grid = make_grid({**config, "resume": str(folder_of(config))})
        (folder_of(config) / "checkpoints" / "round-000004.checkpoint").unlink()
        rows = rows_of(run_server(grid, {**config, "resume": str(folder_of(config))}))
        assert not [
            m
            for m in grid.sent
            if m.metadata.message_type != "query.hello" and (m.metadata.dst_node_id == huge)
        ]
    assert [row["participants"] for row in rows] == [[0, 2]] * 4
    first, *later = [texts[0] for texts in reasons_of(rows, 1)]
    told = "its reply takes 3.0 MB; at most 1.1 MB are right"
    assert first == f"{told}; it is not asked any more in this run"
    assert later == [f"barred: in round 1 {told}"] * 3
    warned = [
        r for r in caplog.records if r.levelname == "WARNING" and "client 1" in r.getMessage()
    ]
    assert len(warned) == 1


def test_who_says_hello_with_far_too_much_is_turned_away(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = {**config, "num-server-rounds": 2, "client-evaluation": "off", "node-timeout": 0.6}
    grid = make_grid(config)
    huge = sorted(grid.contexts)[1]
    grid.tamper = lambda request, reply: (
        swollen(reply, 3) if request.metadata.dst_node_id == huge else reply
    )
    rows = rows_of(run_server(grid, config))
    assert [row["participants"] for row in rows] == [[0, 2]] * 2
    assert len([m for m in grid.sent if m.metadata.dst_node_id == huge]) == 1
    warned = [r.getMessage() for r in caplog.records if f"node {huge} is turned away" in r.message]
    assert warned == [
        f"node {huge} is turned away: its reply takes 3.0 MB; at most 1.0 MB are right"
    ]


@pytest.mark.parametrize(
    ("kind", "most_mb"),
    [
        # What comes in pieces is not loaded to its end.
        pytest.param("array", 100, marks=pytest.mark.faults),
        pytest.param("scalar", 1000, marks=pytest.mark.faults),
        pytest.param("error", 1000, marks=pytest.mark.faults),
    ],
)
def test_a_reply_of_300_mb_costs_the_server_less_than_a_gigabyte(kind: str, most_mb: int) -> None:
    """By Flower's own grid, in a process of its own; the other node's hello arrives."""
    found = huge_reply(kind, "300")
    assert found["replies"] == [12]
    assert "its reply takes" in found["failures"]["11"]
    assert "attack=True" in found["failures"]["11"]
    assert found["more_mb"] < most_mb


def test_a_reply_that_flower_cannot_rebuild_ends_no_run() -> None:
    found = huge_reply("unreadable")
    assert found["replies"] == [12]
    assert "its reply cannot be read (KeyError('shape'))" in found["failures"]["11"]


def huge_reply(*arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.huge_reply", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# -- all of them ----------------------------------------------------------------------------------


def no_error(request: Message, reply: Message) -> Message:
    return reply


def error(request: Message, reply: Message) -> Message:
    return Message(Error(code=3, reason="the node\nis gone"), reply_to=request)


def refusal(request: Message, reply: Message) -> Message:
    round_ = int(request.content["message"]["round"])
    return Message(encode(Refused(round=round_, reason="not today")), reply_to=request)


def images_needed(request: Message, reply: Message) -> Message:
    round_ = int(request.content["message"]["round"])
    return Message(encode(ImagesNeeded(round=round_)), reply_to=request)


def rubbish(request: Message, reply: Message) -> Message:
    if "arrays" in reply.content:
        reply.content["arrays"]["logits"] = Array(np.full((2, 3), np.nan))
    else:
        del reply.content["message"]["type"]
    return reply


def another_round(request: Message, reply: Message) -> Message:
    reply.content["message"]["round"] = 77
    return reply


def empty(request: Message, reply: Message) -> Message:
    reply.content.clear()
    return reply


def huge(request: Message, reply: Message) -> Message:
    return swollen(reply, 3)


FAULTS = {
    fault.__name__: fault
    for fault in (no_error, error, refusal, images_needed, rubbish, another_round, empty, huge)
}
TRANSPORT_FAULTS = ("lost", "never", "twice", "unreadable", "away")


class Faulty(InProcessGrid):
    """Each client does something wrong in each round, to all or to one of its messages."""

    round = 0
    faults: list[list[tuple[str, bool]]]

    def fault(self, request: Message) -> str:
        partition = sorted(self.contexts).index(request.metadata.dst_node_id)
        name, always = self.faults[self.round][partition]
        of_round = [
            message
            for message in self.sent
            if message.metadata.group_id == request.metadata.group_id
            and message.metadata.dst_node_id == request.metadata.dst_node_id
        ]
        return name if always or len(of_round) == 1 else "no_error"

    def get_node_ids(self) -> list[int]:
        there = zip(sorted(self.contexts), self.faults[self.round], strict=True)
        return [node for node, (name, _) in there if name != "away"]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        found = list(super().pull_messages(message_ids))
        requests = {message.metadata.message_id: message for message in self.sent}
        faults = [self.fault(requests[reply.metadata.reply_to_message_id]) for reply in found]
        if "unreadable" in faults:
            raise ValueError("Unexpected set of `children`.")
        return [
            reply
            for reply, name in zip(found, faults, strict=True)
            for _ in range(1 + (name == "twice"))
        ]


def answer(images: Any) -> Any:
    return images.reshape(len(images), -1)[:, :10]


def faulty_grid(faults: list[list[tuple[str, bool]]]) -> Faulty:
    app = ClientApp()

    def make(context: Context) -> FunctionBlackBox:
        return FunctionBlackBox(context, answer, SHAPE, 10, 20)

    register_endpoints(app, make)
    grid = Faulty(app, {}, 3)
    grid.faults = [[("no_error", True)] * 3, *faults]
    grid.tamper = lambda request, reply: FAULTS.get(grid.fault(request), no_error)(request, reply)
    grid.lose = lambda request: grid.fault(request) in ("lost", "away")
    grid.slow = lambda request: math.inf if grid.fault(request) == "never" else 0.0
    return grid


@hypothesis_settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    transport=st.sampled_from(["compact", "dense"]),
    quorum=st.sampled_from([0.4, 1.0]),
    faults=st.lists(
        st.lists(
            st.tuples(st.sampled_from([*FAULTS, *TRANSPORT_FAULTS]), st.booleans()),
            min_size=3,
            max_size=3,
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_whoever_is_asked_is_accounted_for(
    transport: str, quorum: float, faults: list[list[tuple[str, bool]]]
) -> None:
    """Whatever clients do, each one asked has answered or is missing with a reason."""
    run = make_settings(
        **{**TINY, "num_clients": 3, "transport": transport},
        quorum=quorum,
        grace_period=0.02,
        exchange_timeout=0.05,
        node_timeout=0.05,
    )
    clients = GridClients(faulty := faulty_grid(faults), run, 0.05)
    clients.channel.gather()
    levels = np.random.default_rng(0).integers(256, size=(4, *SHAPE), dtype=np.uint8)
    for round_ in range(1, 4):
        faulty.round = round_
        question = Question.unperturbed(levels)
        got = clients.ask(round_, (0, 1, 2), question, to_distill=True)
        targets = Targets.on(question, round_, np.zeros((4, 10), np.float32), 1.0)
        clients.distill(round_, tuple(got), targets)
        clients.deliver(round_)
        missing = clients.channel.close_round().missing
        assert all(item.reason for item in missing)

        undistilled = {item.partition for item in missing if item.action == "train.distill"}
        unanswered = {item.partition for item in missing if item.action != "train.distill"}
        assert set(got) | unanswered == {0, 1, 2}
        assert not set(got) & unanswered
        # Whoever was to distill and has not done so.
        assert set(clients.snapshot()["pending"]) <= undistilled
