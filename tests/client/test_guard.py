"""What a node's owner allows: each key of the node config, asked through the real endpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from fedzge_flwr.black_boxes.function import FunctionBlackBox
from fedzge_flwr.client.account import ContextAccount, FolderAccount
from fedzge_flwr.client.endpoints import register_endpoints
from fedzge_flwr.client.guard import Guard
from fedzge_flwr.common.errors import ConfigError, RefusedError, StateError
from fedzge_flwr.config.owner import OwnerSettings, owner_settings
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.grid.exchange import Failure, GridExchange
from fedzge_flwr.grid.standing import Standing
from fedzge_flwr.images.pixels import to_levels
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.wire.messages import (
    DistillReply,
    DistillRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    ImagesNeeded,
    LogitsReply,
    LogitsRequest,
    Refused,
    RoundReply,
    RoundRequest,
    TrainReply,
    TrainRequest,
)
from tests.helpers.node import IMAGES, LEVELS, LOGITS, Node, compact
from tests.helpers.running import rows_of, run_server

EXPERIMENT = "0f" * 16
QUERY = LogitsRequest(round=1, images=IMAGES, experiment=EXPERIMENT)
TRAIN = TrainRequest(round=1, experiment=EXPERIMENT)


@pytest.fixture(autouse=True)
def _no_state_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDZGE_STATE_DIR", raising=False)


@pytest.fixture
def owned(make_grid: Any, tiny_config: dict[str, Any]) -> Any:
    """Make a node of an owner who has set some keys; each is a new Flower run or a restart."""

    def make(**keys: Any) -> Node:
        node_config = {"partition-id": 0, "num-partitions": 3}
        node_config |= {key.replace("_", "-"): value for key, value in keys.items()}
        return Node(lambda config: make_grid(config, node_configs={0: node_config}), tiny_config)

    return make


@pytest.fixture
def state_dir(tmp_path: Path) -> str:
    return str(tmp_path / "states")


def tally_of(state_dir: str) -> int:
    """Return how many images a node is known to have answered."""
    return int(json.loads((Path(state_dir) / "node" / "tally.json").read_text())["images"])


def refusal(node: Node, request: Any) -> str:
    """Return why a request is refused; nothing may have changed."""
    before = node.state()
    reply = node.answer(request, Refused)
    after = node.state()
    assert before.keys() == after.keys()
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    return str(reply.reason)


def round_request(**changed: Any) -> RoundRequest:
    """Ask about 20 images; targets of round 1 are referred to, and not sent."""
    asked = dataclasses.asdict(compact(round=2, to_distill=True, experiment=EXPERIMENT))
    fields = {
        **asked,
        "targets_round": 1,
        "temperature": 2.0,
        "digest": "never-asked",
        "images": to_levels(LEVELS[:0]),
        "targets": LOGITS,
    }
    return RoundRequest(**{**fields, **changed})


# -- max-query-images, query-range ------------------------------------------------------------


@pytest.mark.parametrize("request_", [QUERY, compact(), round_request(targets_round=0)])
def test_max_query_images(owned: Any, request_: Any) -> None:
    """Copies that the client makes itself count too."""
    num_images = 12 if request_ is QUERY else 20
    reply_type = RoundReply if isinstance(request_, RoundRequest) else LogitsReply
    owned(max_query_images=num_images).answer(request_, reply_type)
    node = owned(max_query_images=num_images - 1)
    node.answer(dataclasses.replace(TRAIN, experiment=request_.experiment), TrainReply)
    assert refusal(node, request_) == (
        f"{num_images} images in a query are more than this node answers ('max-query-images')"
    )


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"max_query_images": 100}, "max-query-images"),
        ({"query_budget": 100}, "query-budget"),
        ({"min_query_interval": 1e6}, "min-query-interval"),
    ],
)
@pytest.mark.parametrize("kind", ["query", "round", "of no image"])
def test_a_refusal_costs_little(
    make_grid: Any, tmp_path: Path, keys: dict[str, Any], name: str, kind: str
) -> None:
    """Some kilobytes ask for 60,000 copies of an image: 740 MB, of which none is made."""
    app, shape = ClientApp(), (3, 32, 32)
    register_endpoints(
        app,
        lambda context: FunctionBlackBox(context, lambda x: np.zeros((len(x), 10)), shape, 10, 5),
    )
    node_config = {"partition-id": 0, "num-partitions": 1, "state-dir": str(tmp_path)}
    node_config |= {key.replace("_", "-"): value for key, value in keys.items()}
    config = {"num-clients": 1}
    node = Node(lambda c: make_grid(c, node_configs={0: node_config}, app=app), config)
    base = np.zeros((1, *shape), np.uint8)
    few = compact(base=base, directions=np.zeros((0, 0, 0), np.uint8))
    node.answer(few, LogitsReply)
    perturbed = 0 if kind == "of no image" else 1
    many = dataclasses.replace(few, directions=np.zeros((60_000, perturbed, 0), np.uint8))
    if kind == "round":
        fields = {field.name: getattr(many, field.name) for field in dataclasses.fields(many)}
        nothing = {"images": base[:0], "targets": LOGITS[:0], "digest": "", "temperature": 1.0}
        many = RoundRequest(**fields, **nothing, targets_round=0)
    tracemalloc.start()
    try:
        reply = node.ask(many)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5e6
    if kind != "of no image" or name == "min-query-interval":
        assert name in str(reply.content["message"]["reason"])


def test_query_range(owned: Any) -> None:
    at_range = np.clip(4 * IMAGES, -1.5, 1.5)
    owned(query_range=1.5).answer(dataclasses.replace(QUERY, images=at_range), LogitsReply)
    beyond = at_range.copy()
    beyond[-1, 0, 0, 0] = -1.51
    reason = refusal(owned(query_range=1.5), dataclasses.replace(QUERY, images=beyond))
    assert reason == "a pixel of magnitude 1.51 is beyond what this node answers ('query-range')"
    # Images are in range and their copies are not.
    owned(query_range=1.5).answer(compact(eps=1e-3), LogitsReply)
    assert "('query-range')" in refusal(owned(query_range=1.5), compact(eps=10.0))


@pytest.mark.parametrize("eps", [1e39, 1e300])
def test_copies_that_are_not_finite_pass_no_guard(owned: Any, eps: float) -> None:
    """Infinite steps along zeros make pixels that are no number, and compare with nothing."""
    zeros = np.zeros((2, 4, 1, 8, 8), np.float32)
    reply = owned(query_range=1.5).ask(
        compact(eps=eps, directions=Directions.written_out(zeros).payload_QGP)
    )
    assert "field 'eps'" in str(reply.error.reason)
    guard = Guard(OwnerSettings(query_range=1.5), ContextAccount(RecordDict()))
    with pytest.raises(RefusedError, match="query-range"):
        guard.admit(np.array([np.nan, 0.5], np.float32))


# -- query-budget -----------------------------------------------------------------------------


def test_budget_is_exact_and_outlives_restarts(owned: Any, state_dir: str) -> None:
    keys = {"query_budget": 24, "state_dir": state_dir}
    owned(**keys).answer(QUERY, LogitsReply)
    assert tally_of(state_dir) == 12
    # A new context, as after a restart or in a resumed run.
    node = owned(**keys)
    too_many = dataclasses.replace(QUERY, images=np.concatenate((IMAGES, IMAGES[:1])))
    assert refusal(node, too_many) == (
        "13 images are more than what is left of all that this node will answer ('query-budget')"
    )
    assert tally_of(state_dir) == 12
    node.answer(QUERY, LogitsReply)
    assert tally_of(state_dir) == 24
    one = dataclasses.replace(QUERY, images=IMAGES[:1])
    for before_or_after in (node, owned(**keys)):
        assert refusal(before_or_after, one).startswith("1 images are more than what is left")
    assert tally_of(state_dir) == 24
    # What is no query needs no budget.
    node.answer(TRAIN, TrainReply)
    node.answer(dataclasses.replace(QUERY, images=IMAGES[:0]), LogitsReply)
    assert tally_of(state_dir) == 24
    # A larger one goes on from there.
    owned(query_budget=25, state_dir=state_dir).answer(one, LogitsReply)
    assert tally_of(state_dir) == 25


def test_a_budget_is_not_given_back_by_going_back_to_an_older_state(
    owned: Any, state_dir: str
) -> None:
    keys = {"query_budget": 36, "state_dir": state_dir}
    node = owned(**keys)
    first = node.answer(TRAIN, TrainReply).state
    asked = node.answer(dataclasses.replace(QUERY, state=first), LogitsReply)
    again = dataclasses.replace(TRAIN, round=2, state=first)
    second = node.answer(again, TrainReply).state
    node.answer(dataclasses.replace(QUERY, state=second), LogitsReply)
    node = owned(**keys)
    back = node.answer(dataclasses.replace(QUERY, state=first), LogitsReply)
    assert back.began == first
    assert np.array_equal(back.logits, asked.logits)
    assert tally_of(state_dir) == 36
    for state in ("", first, second):
        assert "'query-budget'" in refusal(node, dataclasses.replace(QUERY, state=state))


def test_a_round_whose_images_are_asked_for_again_is_counted_once(
    owned: Any, state_dir: str
) -> None:
    node = owned(query_budget=20, state_dir=state_dir)
    node.answer(round_request(), ImagesNeeded)
    assert not (Path(state_dir) / "node" / "tally.json").exists()
    done = node.answer(round_request(images=to_levels(LEVELS)), RoundReply)
    assert done.distill_loss > 0
    assert tally_of(state_dir) == 20
    more = round_request(images=to_levels(LEVELS), round=3, targets_round=2, state=done.state)
    files = sorted(Path(state_dir).glob("*/client-0/*.safetensors"))
    assert "'query-budget'" in refusal(node, more)
    assert sorted(Path(state_dir).glob("*/client-0/*.safetensors")) == files


def test_a_round_that_breaks_the_wires_rules_is_not_counted(owned: Any, state_dir: str) -> None:
    node = owned(query_budget=20, state_dir=state_dir)
    reply = node.ask(round_request(images=to_levels(LEVELS[:11])))
    assert "field 'targets': 12 rows, 11 images" in str(reply.error.reason)
    assert not list(Path(state_dir).rglob("*.json"))


def test_a_run_has_one_experiment(owned: Any, state_dir: str) -> None:
    node = owned(state_dir=state_dir)
    node.answer(QUERY, LogitsReply)
    other = dataclasses.replace(QUERY, experiment="1e" * 16)
    assert refusal(node, other) == "this run began with another experiment: submit it anew"
    owned(state_dir=state_dir).answer(other, LogitsReply)


def test_a_budget_is_for_all_experiments_and_evaluations(owned: Any, state_dir: str) -> None:
    """100 images over 20 experiments, by queries, rounds and evaluations, of two partitions."""
    answered = 0
    for number in range(20):
        partition = number % 2
        node = owned(
            query_budget=100, state_dir=state_dir, partition_id=partition, num_partitions=3
        )
        requests = (QUERY, EVALUATE, dataclasses.replace(EVALUATE, num_logits=0))
        for request in (requests[number % 3], compact(), round_request(targets_round=0)):
            reply = node.ask(dataclasses.replace(request, experiment=f"{number:032x}"))
            (_, kind) = reply.content["message"]["wire-version"], reply.content["message"]["type"]
            if kind == "Refused":
                continue
            arrays = reply.content["arrays"]
            answered += arrays["logits"].shape[0] or reply.content["message"]["num_examples"]
    assert 80 < answered <= 100
    assert tally_of(state_dir) == answered


_COUNT = """
import pathlib, sys
from fedzge_flwr.client.account import FolderAccount
store = FolderAccount(pathlib.Path(sys.argv[1]))
for _ in range(150):
    with store.tally() as tally:
        tally.images += 1
"""


def test_no_count_is_lost_between_processes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _COUNT, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    with FolderAccount(tmp_path).tally() as tally:
        assert tally.images == 300


# -- min-query-interval -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["context", "folder"])
def test_min_query_interval(kind: str, tmp_path: Path) -> None:
    store = ContextAccount(RecordDict()) if kind == "context" else FolderAccount(tmp_path)
    now = [1_000_000.0]
    guard = Guard(OwnerSettings(min_query_interval=10.0), store, clock=lambda: now[0])
    guard.admit(IMAGES)
    now[0] += 9.5
    with pytest.raises(RefusedError, match=r"^asked again too soon \('min-query-interval'\)$"):
        guard.admit(IMAGES)
    # The interval counts from what was answered, not from what was refused.
    now[0] += 0.5
    guard.admit(IMAGES)
    # A clock set back by a day makes nobody wait for a day, and starts the interval anew.
    now[0] -= 86400
    guard.admit(IMAGES)
    now[0] += 9.0
    with pytest.raises(RefusedError, match="too soon"):
        guard.admit(IMAGES)
    now[0] += 1.0
    guard.admit(IMAGES)
    with store.tally() as tally:
        assert tally.images == 4 * len(IMAGES)


def test_min_query_interval_at_the_endpoint(owned: Any) -> None:
    node = owned(min_query_interval=3600.0)
    node.answer(QUERY, LogitsReply)
    node.answer(TRAIN, TrainReply)
    assert refusal(node, QUERY) == "asked again too soon ('min-query-interval')"
    node.answer(
        EvaluateRequest(round=1, split="test", num_logits=60, experiment=EXPERIMENT), EvaluateReply
    )


# -- logit-decimals, logit-noise --------------------------------------------------------------

EVALUATE = EvaluateRequest(round=1, split="test", num_logits=60, experiment=EXPERIMENT)
DISTILL = DistillRequest(
    round=1, temperature=2.0, images=IMAGES, logits=LOGITS, experiment=EXPERIMENT
)


def answers_of(node: Node) -> list[Any]:
    """Return logits by every way that they leave a client, after training and distillation."""
    node.answer(TRAIN, TrainReply)
    first = node.answer(QUERY, LogitsReply).logits
    node.answer(DISTILL, DistillReply)
    return [
        first,
        node.answer(dataclasses.replace(compact(), experiment=EXPERIMENT), LogitsReply).logits,
        node.answer(EVALUATE, EvaluateReply).logits,
        node.answer(round_request(targets_round=0), RoundReply).logits,
    ]


def same_model(one: Node, other: Node) -> bool:
    mine, others = one.state(), other.state()
    return mine.keys() == others.keys() and all(
        np.array_equal(value, others[name]) for name, value in mine.items()
    )


@pytest.mark.parametrize("decimals", [0, 2])
def test_logit_decimals(owned: Any, decimals: int) -> None:
    clean, rounded = owned(), owned(logit_decimals=decimals)
    for exact, seen in zip(answers_of(clean), answers_of(rounded), strict=True):
        assert seen.dtype == np.float32
        assert np.array_equal(seen, np.round(exact.astype(np.float64), decimals).astype("f4"))
        assert not np.array_equal(seen, exact)
    assert same_model(clean, rounded)


def test_rounding_is_exact() -> None:
    """In float32 the first would be taken for 2.675 and the last for infinite."""
    guard = Guard(OwnerSettings(logit_decimals=2), ContextAccount(RecordDict()))
    logits = np.array([[2.675, -2.675, 0.004, 1e37]], np.float32)
    wanted = np.array([[2.67, -2.67, 0.0, 1e37]], np.float32)
    assert np.array_equal(guard.perturbed(logits, lambda: [b""], lambda: b""), wanted)


def test_labels_alone(owned: Any) -> None:
    """By every endpoint; the class is told with nine chances in ten, and nothing else is."""
    clean, labels = owned(), owned(label_only=True)
    for exact, seen in zip(answers_of(clean), answers_of(labels), strict=True):
        assert seen.dtype == np.float32
        assert np.array_equal(seen.argmax(axis=1), exact.argmax(axis=1))
        probabilities = np.exp(seen) / np.exp(seen).sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probabilities.max(axis=1), 0.9, rtol=1e-5)
        assert {len(set(row)) for row in seen.tolist()} == {2}
    assert same_model(clean, labels)


def test_labels_are_those_of_noisy_logits(owned: Any) -> None:
    clean, labels = owned(), owned(logit_noise=5.0, label_only=True)
    for exact, seen in zip(answers_of(clean), answers_of(labels), strict=True):
        assert not np.array_equal(seen.argmax(axis=1), exact.argmax(axis=1))
    assert same_model(clean, labels)


def test_logit_noise(owned: Any) -> None:
    clean, noisy = owned(), owned(logit_noise=0.5)
    for exact, seen in zip(answers_of(clean), answers_of(noisy), strict=True):
        assert 0.35 < float(np.std(seen - exact)) < 0.65
        assert abs(float(np.mean(seen - exact))) < 0.25
    # The model knows nothing of it.
    assert same_model(clean, noisy)


def test_asking_again_does_not_average_noise_away(owned: Any, state_dir: str) -> None:
    """By whatever endpoint, in whatever batch, after a restart, in another encoding of zero."""
    keys = {"logit_noise": 1.0, "state_dir": state_dir}
    exact_node = owned()
    exact_node.answer(TRAIN, TrainReply)
    test_images = load_split(from_run_config(exact_node.context.run_config).data, "test")
    images = test_images.inputs_NCHW
    ask = dataclasses.replace(QUERY, images=images[:12])
    exact = exact_node.answer(ask, LogitsReply).logits
    node = owned(**keys)
    state = node.answer(TRAIN, TrainReply).state
    ask = dataclasses.replace(ask, state=state)
    evaluate = dataclasses.replace(EVALUATE, state=state)
    twelve = images[:12] + np.float32(0)
    twelve[twelve == 0] = -0.0
    answers = [node.answer(ask, LogitsReply).logits for _ in range(5)]
    answers += [node.answer(evaluate, EvaluateReply).logits[:12] for _ in range(5)]
    again = owned(**keys)
    answers.append(again.answer(ask, LogitsReply).logits)
    answers.append(again.answer(evaluate, EvaluateReply).logits[:12])
    answers.append(again.answer(dataclasses.replace(ask, images=twelve), LogitsReply).logits)
    backwards = dataclasses.replace(ask, images=images[:12][::-1].copy())
    answers.append(again.answer(backwards, LogitsReply).logits[::-1])
    levels = test_images.images_NCHW[:12]
    in_copies = dataclasses.replace(compact(base=levels), experiment=EXPERIMENT, state=state)
    asked = again.answer(in_copies, LogitsReply).logits
    answers.append(np.concatenate((asked[:4], asked[12:])))
    rms = float(np.sqrt(np.mean((np.mean(answers, axis=0) - exact) ** 2)))
    assert rms > 0.8
    # The same but for the last bits of what is under the noise.
    assert max(float(np.abs(answer - answers[0]).max()) for answer in answers) < 1e-4
    # Another image has other noise, and another state of the model, and another node.
    assert len(np.unique((answers[0] - exact).round(3))) > 100
    node.answer(dataclasses.replace(TRAIN, round=2, state=state), TrainReply)
    later = node.answer(dataclasses.replace(ask, state=""), LogitsReply).logits
    assert float(np.abs(later - answers[0]).max()) > 0.5


def test_two_nodes_have_two_secrets(tmp_path: Path) -> None:
    one, other = (FolderAccount(tmp_path / name).secret() for name in ("one", "other"))
    assert one != other
    assert FolderAccount(tmp_path / "one").secret() == one
    assert (tmp_path / "one" / "noise.key").stat().st_mode & 0o077 == 0
    (tmp_path / "one" / "noise.key").write_bytes(b"")
    with pytest.raises(StateError, match="is not a key"):
        FolderAccount(tmp_path / "one").secret()


@pytest.mark.parametrize(("allowed", "splits"), [("held-out", ["held-out"]), ("none", [])])
def test_allow_evaluation(owned: Any, allowed: str, splits: list[str]) -> None:
    node = owned(allow_evaluation=allowed)
    for split in ("test", "held-out"):
        request = dataclasses.replace(EVALUATE, split=split)
        if split in splits:
            node.answer(request, EvaluateReply)
        else:
            assert refusal(node, request) == (
                f"no evaluation on '{split}' images here ('allow-evaluation')"
            )


# -- training, states, experiments ------------------------------------------------------------


def trainings_of(node: Node) -> int:
    return int(node.context.state.config_records["fedzge-progress"]["trained"])


def test_a_message_trains_no_longer_than_the_owner_wants(owned: Any) -> None:
    request = dataclasses.replace(TRAIN, round=101, owed=100)
    for most in (0, 3):
        node = owned(max_catch_up_rounds=most)
        node.answer(request, TrainReply)
        assert trainings_of(node) == 1 + most
    # Without a word of the owner's, too.
    node = owned()
    node.answer(request, TrainReply)
    assert trainings_of(node) == 11


def test_max_trainings_counts_what_was_gone_back_behind(owned: Any, state_dir: str) -> None:
    keys = {"max_trainings": 4, "state_dir": state_dir}
    for number in range(6):
        # The server goes back to the initial state each time, and the node has restarted.
        done = owned(**keys).answer(dataclasses.replace(TRAIN, state=""), TrainReply)
        assert (done.num_examples > 0) == (number < 4)
    node = owned(**keys)
    assert node.answer(dataclasses.replace(TRAIN, round=2, state=done.state), TrainReply)
    assert node.answer(dataclasses.replace(QUERY, state=done.state), LogitsReply)


def test_states_are_kept_up_to_a_number(owned: Any, state_dir: str) -> None:
    """Of a server that never says `durable`."""
    node, state, states = owned(max_states=3, state_dir=state_dir), "", []
    for round_ in range(1, 7):
        state = node.answer(dataclasses.replace(TRAIN, round=round_, state=state), TrainReply).state
        states.append(state)
    kept = sorted(Path(state_dir).glob("*/client-0/0*.safetensors"))
    assert [path.stem.split("-")[1] for path in kept] == states[-3:]
    # The one that the server goes on from is spared.
    back = node.answer(dataclasses.replace(TRAIN, round=7, state=states[3]), TrainReply)
    assert back.began == states[3]
    again = node.answer(dataclasses.replace(TRAIN, round=7, state=states[3]), TrainReply)
    assert again.began == states[3]
    # What is gone is not mistaken for another: the reply says from where it went on.
    gone = node.answer(dataclasses.replace(TRAIN, round=8, state=states[0]), TrainReply)
    assert gone.began == again.state


def test_experiments_are_kept_up_to_a_number(owned: Any, state_dir: str) -> None:
    keys = {"max_experiments": 2, "state_dir": state_dir}

    def train(number: int) -> Any:
        return dataclasses.replace(TRAIN, experiment=f"{number:032x}")

    for number in (1, 2):
        owned(**keys).answer(train(number), TrainReply)
    assert refusal(owned(**keys), train(3)) == (
        "this node keeps the models of as many experiments as its owner allows ('max-experiments')"
    )
    owned(**keys).answer(train(1), TrainReply)
    # Days later that which has rested longest makes room, and it alone.
    folders = sorted(p for p in Path(state_dir).iterdir() if p.name != "node")
    for days, folder in enumerate(folders, start=2):
        os.utime(folder, (time.time() - 86400 * days,) * 2)
    owned(**keys).answer(train(3), TrainReply)
    left = [p for p in Path(state_dir).iterdir() if p.name != "node"]
    assert len(left) == 2
    assert folders[0] in left


def test_noise_is_rounded_too(owned: Any) -> None:
    logits = owned(logit_noise=0.5, logit_decimals=1).answer(QUERY, LogitsReply).logits
    assert np.array_equal(logits, np.round(logits.astype(np.float64), 1).astype(np.float32))


# -- refusals at the server -------------------------------------------------------------------


def test_the_exchange_turns_a_refusal_into_a_missing_client(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    from fedzge_flwr.config.parsing import from_run_config

    owner = {"partition-id": 1, "num-partitions": 3, "max-query-images": 3}
    grid = make_grid(tiny_config, node_configs={1: owner})
    exchange = GridExchange(grid, from_run_config(tiny_config).run, 10.0)
    replies, failures = exchange.send(
        [(QUERY, list(grid.contexts))],
        (LogitsReply,),
        lambda _: Standing(EXPERIMENT),
        dims={"B": 12, "K": 10},
    )
    first, second, third = grid.contexts
    assert set(replies) == {first, third}
    assert failures == {
        second: Failure(
            "refused: 12 images in a query are more than this node answers ('max-query-images')"
        )
    }


@pytest.mark.parametrize("transport", ["compact", "dense"])
def test_a_run_goes_on_without_a_client_that_refuses(
    make_grid: Any, efficient_config: dict[str, Any], transport: str
) -> None:
    owner = {"partition-id": 1, "num-partitions": 3, "query-range": 0.001}
    config = {**efficient_config, "transport": transport}
    rows = rows_of(run_server(make_grid(config, node_configs={1: owner}), config))
    assert len(rows) == 2
    for row in rows:
        assert row["participants"] == [0, 2]
        refused = [item for item in row["missing"] if item["reason"].startswith("refused:")]
        assert [item["partition"] for item in refused] == [1]
        assert "('query-range')" in refused[0]["reason"]
        assert refused[0]["action"] == ("train.round" if transport == "compact" else "query.logits")


# -- where the settings come from -------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_node_configs_state_dir_wins(
    owned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "environment"))
    owned(state_dir=str(tmp_path / "node")).answer(TRAIN, TrainReply)
    assert names(tmp_path) == ["node"]
    # An empty one too: this node keeps nothing.
    node = owned(state_dir="")
    node.answer(TRAIN, TrainReply)
    assert node.state()
    assert names(tmp_path) == ["node"]
    node = owned(query_budget=100)
    node.answer(TRAIN, TrainReply)
    assert not node.state()
    assert names(tmp_path) == ["environment", "node"]


BAD = [
    ({"max-query-images": -1}, "'max-query-images' = -1: "),
    ({"max-query-images": 2.5}, "'max-query-images' = 2.5: "),
    ({"max-query-images": True}, "'max-query-images' = True: "),
    ({"query-range": -0.5}, "'query-range' = -0.5: "),
    ({"query-range": float("nan")}, "'query-range' = nan: "),
    ({"query-range": "1"}, "'query-range' = '1': "),
    ({"query-budget": -3, "state-dir": "x"}, "'query-budget' = -3: "),
    ({"query-budget": 5}, "'query-budget' = 5 needs a 'state-dir' (or FEDZGE_STATE_DIR): a re"),
    ({"min-query-interval": float("inf")}, "'min-query-interval' = inf: "),
    ({"logit-decimals": 9}, "'logit-decimals' = 9: "),
    ({"logit-decimals": -2}, "'logit-decimals' = -2: "),
    ({"allow-evaluation": "some"}, "'allow-evaluation' = 'some': "),
    ({"allow-distillation": 1}, "'allow-distillation' = 1: "),
    ({"max-accuracy-loss": 101.0}, "'max-accuracy-loss' = 101.0: "),
    ({"max-states": -1}, "'max-states' = -1: "),
    ({"logit-noise": -1.0}, "'logit-noise' = -1.0: "),
    ({"state-dir": 5}, "'state-dir' = 5: "),
    ({"state-dir": "a\0b"}, "'state-dir' = 'a\\x00b' has a null character"),
    (
        {"state-dir": "~no-such-user-here/x"},
        "'state-dir' = '~no-such-user-here/x': there is no such home folder here",
    ),
]


@pytest.mark.parametrize(("keys", "line"), BAD, ids=[next(iter(keys)) for keys, _ in BAD])
def test_bad_values_are_named_in_one_line(
    owned: Any, caplog: pytest.LogCaptureFixture, keys: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        owner_settings(keys, {})
    assert str(caught.value).startswith(f"node config: {line}")
    assert str(caught.value).isprintable()
    # And at the endpoint, which answers nothing; the server is told no value.
    node = owned(**keys)
    reply = node.ask(HelloRequest(round=0, version="x"))
    assert "Message: its config, or the run's settings, cannot be used" in str(reply.error.reason)
    assert f"node config: {line}" in caplog.text
    assert not node.state()


def test_integers_do_for_numbers_and_other_keys_are_others(owned: Any) -> None:
    settings = owner_settings({"query-range": 2, "logit-noise": 0, "colour": "red"}, {})
    assert (settings.query_range, settings.logit_noise) == (2.0, 0.0)
    owned(min_query_interval=1, colour="red").answer(HelloRequest(round=0, version="x"), HelloReply)
