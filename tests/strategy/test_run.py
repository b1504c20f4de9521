"""Whole runs in process: the real apps, real Messages, real digits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ConfigRecord, Error, Message

from fedzge_flwr.common.errors import RosterError, TooFewClientsError
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.running import central_of, folder_of, rows_of, run_server


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logging.getLogger("flwr").propagate = True
    caplog.set_level(logging.INFO)
    return caplog


def named(config: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
    return {**config, "run-name": name, **{key.replace("_", "-"): v for key, v in more.items()}}


@pytest.mark.parametrize("recipe", ["paper", "efficient"])
def test_the_order_of_replies_and_the_node_ids_do_not_matter(
    make_grid: Any, tiny_config: dict[str, Any], efficient_config: dict[str, Any], recipe: str
) -> None:
    tiny_config = tiny_config if recipe == "paper" else efficient_config
    config = {**tiny_config, "num-clients": 4, "fraction-train": 0.75, "num-server-rounds": 3}
    files = []
    for name, shuffle in (("a", None), ("b", 1), ("c", 2)):
        own = named(config, name)
        folder = run_server(make_grid(own, shuffle=shuffle), own)
        files.append((folder / "central.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


def test_another_seed_gives_another_model(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    files = []
    for seed in (0, 1):
        own = named(tiny_config, f"seed{seed}", seed=seed)
        files.append((run_server(make_grid(own), own) / "central.safetensors").read_bytes())
    assert files[0] != files[1]


def test_clients_are_sampled_by_seed_and_round(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    config = {**tiny_config, "num-clients": 6, "fraction-train": 0.3, "num-server-rounds": 5}
    rows = rows_of(run_server(make_grid(config, shuffle=3), config))
    sampled = [tuple(row["sampled"]) for row in rows]
    assert all(len(chosen) == 2 and chosen == tuple(sorted(chosen)) for chosen in sampled)
    assert len(set(sampled)) > 1
    again = named(config, "again")
    rows = rows_of(run_server(make_grid(again), again))
    assert [tuple(row["sampled"]) for row in rows] == sampled


class Loss:
    """Spoils the replies of one client to one action."""

    def __init__(self, partition: int, action: str, spoil: Any) -> None:
        self.partition, self.action, self.spoil = partition, action, spoil

    def __call__(self, request: Message, reply: Message) -> Message | None:
        nodes = sorted({int(request.metadata.dst_node_id)} | self.nodes)
        self.nodes = set(nodes)
        if request.metadata.message_type != self.action:
            return reply
        if request.metadata.dst_node_id != nodes[self.partition]:
            return reply
        spoiled: Message | None = self.spoil(request, reply)
        return spoiled

    nodes: set[int] = set()  # noqa: RUF012 - replaced on the instance


def lost(request: Message, reply: Message) -> None:
    return None


def error(request: Message, reply: Message) -> Message:
    failed = Message(Error(code=3, reason="the node\nis gone"), reply_to=request)
    failed.metadata.__dict__["_src_node_id"] = 1  # as Flower does for dead nodes
    return failed


def not_finite(request: Message, reply: Message) -> Message:
    logits = reply.content["arrays"]["logits"].numpy().copy()
    logits[0, 0] = np.nan
    reply.content["arrays"]["logits"] = Array(logits)
    return reply


def misshapen(request: Message, reply: Message) -> Message:
    logits = reply.content["arrays"]["logits"].numpy()
    reply.content["arrays"]["logits"] = Array(logits[:-1])
    return reply


def stale(request: Message, reply: Message) -> Message:
    message = reply.content["message"]
    assert isinstance(message, ConfigRecord)
    message["round"] = 77
    return reply


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lost, "no message could be sent to its node"),
        (error, "the node"),
        (not_finite, "'logits': holds values that are not finite"),
        (misshapen, "'logits': shape (35, 10), expected (36, 10)"),
        (stale, "'round': 77, expected 1"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_failing_client_is_left_out_and_named(
    make_grid: Any,
    tiny_config: dict[str, Any],
    log: pytest.LogCaptureFixture,
    spoil: Any,
    reason: str,
) -> None:
    loss = Loss(1, "query.logits", spoil)
    folder = run_server(make_grid(tiny_config, tamper=loss), tiny_config)
    rows = rows_of(folder)
    assert rows[0]["sampled"] == [0, 1, 2]
    assert rows[0]["participants"] == [0, 2]
    (missing,) = rows[0]["missing"]
    assert (missing["partition"], missing["action"]) == (1, "query.logits")
    assert reason in missing["reason"]
    told = f"client 1 left out of query.logits: {missing['reason']}"
    assert told in log.text
    # A line a round, and none after the run's end.
    logging.getLogger("flwr.fedzge").warning("of another run")
    of_recipe, *warnings = (folder / "warnings.log").read_text().splitlines()
    # This small run of the paper's has 2 directions, which is the default.
    assert of_recipe.startswith("recipe 'paper' with the default, not the paper's value of q:")
    assert [line.split(":")[0] for line in warnings] == ["round 1", "round 2"]
    assert warnings[0] == f"round 1: {told}"
    # It is evaluated all the same, as clients that were not sampled are.
    assert set(rows[0]["client_accuracy"]) == {"0", "1", "2"}


def test_too_few_clients_fail_the_run(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    config = {**tiny_config, "min-clients": 3}
    with pytest.raises(TooFewClientsError, match="round 1: 2 of 3 clients answered"):
        run_server(make_grid(config, tamper=Loss(0, "query.logits", lost)), config)
    # What there was is kept.
    folder = folder_of(config)
    assert (folder / "central.safetensors").is_file()
    assert "failed: TooFewClientsError" in (folder / "config.json").read_text()


def test_too_few_clients_skip_the_round(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    config = {**tiny_config, "min-clients": 3, "too-few-clients": "skip"}

    def only_in_round_1(request: Message, reply: Message) -> Message | None:
        return None if request.metadata.group_id == "1" else reply

    loss = Loss(0, "train.local", only_in_round_1)
    rows = rows_of(run_server(make_grid(config, tamper=loss), config))
    assert "round 1: 2 of 3 clients answered, 'min-clients' = 3" in rows[0]["skipped"]
    assert rows[1]["skipped"] is None
    assert rows[1]["participants"] == [0, 1, 2]


def test_a_client_whose_answers_do_not_move_is_named_once(
    make_grid: Any, tiny_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def rounded(request: Message, reply: Message) -> Message:
        logits = reply.content["arrays"]["logits"].numpy().round()
        reply.content["arrays"]["logits"] = Array(logits)
        return reply

    grid = make_grid(tiny_config, tamper=Loss(2, "query.logits", rounded))
    rows = rows_of(run_server(grid, tiny_config))
    assert [row["unmoved"] for row in rows] == [[2], [2]]
    assert [row["participants"] for row in rows] == [[0, 1, 2], [0, 1, 2]]
    named = [r.getMessage() for r in caplog.records if "their copies" in r.getMessage()]
    assert len(named) == 1
    assert "round 1: client 2 answered the same to images and to their copies" in named[0]


def test_another_number_of_partitions_is_refused(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    config = {**tiny_config, "node-timeout": 0.6}
    grid = make_grid(config, num_nodes=5)
    with pytest.raises(
        RosterError,
        match=r"0 of 5 nodes take part, 'min-clients' = 1: node 1000 has partition 0 of 5, but "
        r"'num-clients' = 3; .*supernodes=3.* \(and 2 other reasons\)$",
    ):
        run_server(grid, config)
    assert {m.metadata.message_type for m in grid.sent} == {"query.hello"}


def test_missing_nodes_are_waited_for_and_then_named(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    config = {**tiny_config, "node-timeout": 0.6}
    with pytest.raises(RosterError, match="2 of 'num-clients' = 3 nodes connected within"):
        run_server(make_grid(config, num_nodes=2), config)


def test_nodes_that_cannot_say_hello(
    make_grid: Any, tiny_config: dict[str, Any], log: pytest.LogCaptureFixture
) -> None:
    wrong = {"partition-id": 1, "num-partitions": 3, "model": "vgg"}
    rows = rows_of(run_server(make_grid(tiny_config, node_configs={1: wrong}), tiny_config))
    # The node's own log names the model; the server's line tells no value of the node's config.
    assert "node config: 'model' = 'vgg': no such model; known: cnn, " in log.text
    (line,) = [r.getMessage() for r in log.records if "does not take part" in r.getMessage()][:1]
    assert line.endswith(
        "its config, or the run's settings, cannot be used; the node's own log says why"
    )
    assert rows[0]["participants"] == [0, 2]
    assert rows[0]["missing"][0]["reason"] == "not connected"


# -- what is on the wire --


def arrays_of(message: Message) -> dict[str, np.ndarray[Any, Any]]:
    return {
        name: array.numpy()
        for record in message.content.array_records.values()
        for name, array in record.items()
    }


@pytest.fixture
def captured(make_grid: Any, tiny_config: dict[str, Any]) -> tuple[InProcessGrid, Path]:
    grid = make_grid(tiny_config)
    return grid, run_server(grid, tiny_config)


def encoded(message: Message) -> bytes:
    """Everything that Flower sends of a message."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return b"".join(item.deflate() for item in get_all_nested_objects(message).values())


def windows(values: bytes, width: int) -> set[bytes]:
    """A few pieces of a value that are telling: not the same few bytes over and over."""
    step = max(len(values) // 5, 4) // 4 * 4
    pieces = {values[start : start + width] for start in range(0, len(values), step)}
    return {piece for piece in pieces if len(piece) == width and len(set(piece)) > width // 3}


def leaks(grid: InProcessGrid, secrets: set[bytes]) -> list[str]:
    found = []
    for message in grid.sent + grid.received:
        blob = encoded(message)
        if any(secret in blob for secret in secrets):
            found.append(message.metadata.message_type)
    return found


def secrets_of(grid: InProcessGrid) -> set[bytes]:
    """Pieces of every value that any parameter had after any message, and of training images."""
    from fedzge_flwr.config.parsing import from_run_config
    from fedzge_flwr.data.loading import load_split
    from fedzge_flwr.images.pixels import PIXEL_RANGE

    found: set[bytes] = set()
    for values in grid.parameters.values():
        for value in values:
            found |= windows(value, 32)
    assert len(found) > 3 * 2 * 2 * 10  # clients × rounds × changes × tensors
    settings = from_run_config(next(iter(grid.contexts.values())).run_config)
    images = torch.from_numpy(np.array(load_split(settings.data, "train").images_NCHW))
    for image in images:
        found |= windows(image.numpy().tobytes(), 16)
        found |= windows(PIXEL_RANGE.from_uint8(image).numpy().tobytes(), 64)
    return found


def test_no_message_carries_a_piece_of_a_parameter_or_of_a_private_image(
    captured: tuple[InProcessGrid, Path],
) -> None:
    grid, _ = captured
    # 5 actions, 2 rounds (hello: once), 3 clients, both ways.
    assert len(grid.sent + grid.received) == 2 * 3 * (1 + 2 * 4)
    names = set(grid.parameters)
    assert "features.0.weight" in names
    for message in grid.sent + grid.received:
        assert set(message.content) <= {"message", "arrays"}
        if "arrays" in message.content:
            assert set(arrays_of(message)) <= {"images", "logits"}
        blob = encoded(message)
        assert not [name for name in names if name.encode() in blob]
    assert leaks(grid, secrets_of(grid)) == []


def test_a_leak_would_be_found(captured: tuple[InProcessGrid, Path]) -> None:
    """Weights, flattened and reshaped into a reply's logits, are seen."""
    grid, _ = captured
    secrets = secrets_of(grid)
    largest = max((value for values in grid.parameters.values() for value in values), key=len)
    weights = np.frombuffer(largest[128:], np.float32)
    reply = next(m for m in grid.received if m.metadata.message_type == "evaluate.local")
    reply.content["arrays"]["logits"] = Array(weights[: len(weights) // 10 * 10].reshape(-1, 10))
    assert leaks(grid, secrets) == ["evaluate.local"]


def test_the_byte_ledger_is_the_encoded_size(captured: tuple[InProcessGrid, Path]) -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    def encoded_size(messages: list[Message], evaluation: bool, round_: str) -> int:
        return sum(
            len(item.deflate())
            for message in messages
            if (message.metadata.message_type == "evaluate.local") == evaluation
            and message.metadata.group_id in ({"0", "1"} if round_ == "1" else {round_})
            for item in get_all_nested_objects(message).values()
        )

    grid, folder = captured
    rows = rows_of(folder)
    for row in rows:
        round_ = str(row["round"])
        assert row["bytes_down"] == encoded_size(grid.sent, False, round_)
        assert row["bytes_up"] == encoded_size(grid.received, False, round_)
        assert row["evaluation_bytes_down"] == encoded_size(grid.sent, True, round_)
        assert row["evaluation_bytes_up"] == encoded_size(grid.received, True, round_)
        by_client = row["client_bytes"].values()
        assert row["bytes_down"] == sum(sum(item["down"].values()) for item in by_client)
        assert row["bytes_up"] == sum(sum(item["up"].values()) for item in by_client)
        for item in by_client:
            assert {k: v for k, v in item["down"].items() if k != "envelope"} == {
                "base": 3 * 12 * 64 * 4,
                "targets": 12 * (64 + 10) * 4,
            }
            assert {k: v for k, v in item["up"].items() if k != "envelope"} == {
                "logits": 3 * 12 * 10 * 4
            }
            assert 0 < item["down"]["envelope"] < 12_000
            assert 0 < item["up"]["envelope"] < 12_000
    assert rows[-1]["bytes_down_total"] == sum(row["bytes_down"] for row in rows)
    # (1+q)·N float32 images of a query and N of a distillation, 3 clients, 2 rounds.
    assert rows[-1]["bytes_down_total"] > 3 * 2 * (3 * 12 + 12) * 64 * 4


def test_queries_are_counted(captured: tuple[InProcessGrid, Path]) -> None:
    grid, folder = captured
    asked = sum(
        len(arrays_of(message)["images"])
        for message in grid.sent
        if message.metadata.message_type == "query.logits"
    )
    assert rows_of(folder)[-1]["queries"] == asked == 3 * 2 * 3 * 12
    assert rows_of(folder)[-1]["queries_per_client"] == 2 * 3 * 12


def test_one_query_message_holds_all_copies(captured: tuple[InProcessGrid, Path]) -> None:
    grid, _ = captured
    queries = [m for m in grid.sent if m.metadata.message_type == "query.logits"]
    assert len(queries) == 3 * 2
    images = arrays_of(queries[0])["images"].reshape(3, 12, 64)
    steps = np.linalg.norm(images[1:] - images[0], axis=2)
    np.testing.assert_allclose(steps, 1e-3, rtol=1e-3)


# -- evaluation --


def test_another_number_of_test_logits_leaves_only_that_client_out(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    loss = Loss(1, "evaluate.local", misshapen)
    rows = rows_of(run_server(make_grid(tiny_config, tamper=loss), tiny_config))
    assert rows[0]["ensemble_accuracy"] is not None
    assert set(rows[0]["client_accuracy"]) == {"0", "2"}
    (missing,) = rows[0]["missing"]
    assert "'logits': shape (59, 10), expected (60, 10)" in missing["reason"]


def test_a_run_of_skipped_rounds_has_failed(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    config = {**tiny_config, "min-clients": 3, "too-few-clients": "skip"}
    with pytest.raises(TooFewClientsError, match="all 2 rounds were skipped"):
        run_server(make_grid(config, tamper=Loss(0, "train.local", lost)), config)


def test_a_federation_with_tiny_partitions(
    make_grid: Any, tiny_config: dict[str, Any], log: pytest.LogCaptureFixture
) -> None:
    """Clients without an image, or with one, take part and weigh accordingly."""
    config = {**tiny_config, "num-clients": 12, "alpha": 0.02, "min-partition-size": 0}
    rows = rows_of(run_server(make_grid(config), config))
    assert rows[-1]["missing"] == []
    assert "has not trained (it has 0 images)" in log.text


def test_training_images_need_not_be_on_the_server(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    from fedzge_flwr.config.parsing import from_run_config
    from fedzge_flwr.data.evaluation import TestSetEvaluation, check_partition
    from tests.helpers.fabricate import make_dataset

    make_dataset("mnist", tmp_path)
    for path in (tmp_path / "MNIST" / "raw").glob("train-*"):
        path.unlink()
    settings = from_run_config({"dataset": "mnist", "data-dir": str(tmp_path)})
    assert len(TestSetEvaluation(settings).labels_M) == 30
    check_partition(settings)
    assert "are not checked here, but by the clients" in log.text


def test_evaluation_rounds(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    config = {**tiny_config, "eval-every": 2, "num-server-rounds": 3}
    rows = rows_of(run_server(make_grid(config), config))
    assert [row["central_accuracy"] is None for row in rows] == [True, False, False]
    assert [row["ensemble_accuracy"] is None for row in rows] == [True, False, False]
    assert [row["client_accuracy"] == {} for row in rows] == [True, False, False]


def test_held_out_and_no_evaluation(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    own = named(tiny_config, "own", client_evaluation="held-out", holdout_fraction=0.3)
    rows = rows_of(run_server(make_grid(own), own))
    assert rows[0]["ensemble_accuracy"] is None
    assert len(rows[0]["client_accuracy"]) == 3
    none = named(tiny_config, "none", client_evaluation="off", server_evaluation="off")
    grid = make_grid(none)
    rows = rows_of(run_server(grid, none))
    assert rows[0]["central_accuracy"] is rows[0]["mean_client_accuracy"] is None
    assert "evaluate.local" not in {m.metadata.message_type for m in grid.sent}


def test_evaluation_changes_nothing(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    models = []
    for name, on in (("on", "test"), ("off", "off")):
        own = named(tiny_config, name, client_evaluation=on, server_evaluation=on)
        models.append((run_server(make_grid(own), own) / "central.safetensors").read_bytes())
    assert models[0] == models[1]


def test_clients_that_never_distill(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    config = {**tiny_config, "client-distill-steps": 0}
    grid = make_grid(config)
    run_server(grid, config)
    assert "train.distill" not in {m.metadata.message_type for m in grid.sent}


def test_central_statistics_come_from_distillation_alone(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    """Neither evaluating the objective nor testing counts as a training batch."""
    folder = run_server(make_grid(tiny_config), tiny_config)
    assert int(central_of(folder)["features.2.num_batches_tracked"]) == 2 * 2  # rounds × steps
