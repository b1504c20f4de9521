"""Every byte of a round is somebody's, and for something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from flwr.app import ArrayRecord, Error, Message

from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.observers.round_row import RoundRow
from fedzge_flwr.server.build import build_central, build_generator
from fedzge_flwr.server.round import RoundState
from fedzge_flwr.server.state import ServerState
from fedzge_flwr.strategy import FedZGE


class Rows:
    """An observer that keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[RoundRow] = []

    def on_start(self, server: ServerState, clients: Mapping[int, str]) -> None: ...

    def on_phase(self, round_: int, phase: str) -> None: ...

    def on_replies(self, answered: int, asked: int) -> None: ...

    def on_round(self, server: ServerState, current: RoundState, row: RoundRow) -> None:
        self.rows.append(row)

    def on_end(self, server: ServerState, error: BaseException | None) -> None: ...


def rows_of(make_grid: Any, config: dict[str, Any], **options: Any) -> list[RoundRow]:
    settings, seen = from_run_config(config), Rows()
    central = build_central(settings)
    strategy = FedZGE(settings, central, build_generator(settings), observers=[seen])
    strategy.start(make_grid(config, **options), ArrayRecord(central.state_dict()), num_rounds=2)
    return seen.rows


def without_envelope(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name != "envelope" and size}


@pytest.mark.parametrize(
    ("more", "bytes_of_directions"),
    [
        ({"estimator": "guided"}, 2 * 4 * 13),
        ({"estimator": "per-image", "directions": "rademacher"}, 0),
        ({"estimator": "per-image", "directions": "sphere"}, 2 * 4 * 64 * 4),
    ],
)
def test_a_compact_round_by_what_its_bytes_are_for(
    make_grid: Any, efficient_config: dict[str, Any], more: dict[str, str], bytes_of_directions: int
) -> None:
    config = {**efficient_config, "client-distill-rounds": 0, "client-evaluation": "off", **more}
    first, second = rows_of(make_grid, config)
    # 20 images of 64 bytes, 4 of them along 2 directions; the answers come back as targets, those
    # of round 1 with the question of round 2 and those of round 2, the last, after it.
    directions = {"directions": bytes_of_directions} if bytes_of_directions else {}
    targets = {"targets": 20 * 10 * 4}
    for row, due in ((first, {}), (second, {"targets": 2 * targets["targets"]})):
        assert set(row.client_bytes) == {0, 1, 2}
        for traffic in row.client_bytes.values():
            assert without_envelope(traffic.down) == {"base": 20 * 64, **directions, **due}
            assert without_envelope(traffic.up) == {"logits": 28 * 10 * 4}
            assert min(traffic.down["envelope"], traffic.up["envelope"]) > 0
    assert second.bytes_down_total == first.bytes_down + second.bytes_down


def test_a_failing_client_costs_what_it_was_sent(
    make_grid: Any, efficient_config: dict[str, Any]
) -> None:
    failing = 1017

    def fail(request: Message, reply: Message) -> Message:
        if request.metadata.dst_node_id == failing and "round" in request.metadata.message_type:
            return Message(Error(code=0, reason="Message: out of order"), reply_to=request)
        return reply

    rows = rows_of(make_grid, {**efficient_config, "client-evaluation": "off"}, tamper=fail)
    for row in rows:
        assert row.client_bytes[1].down["base"] == row.client_bytes[0].down["base"]
        assert without_envelope(row.client_bytes[1].up) == {}
        assert row.client_bytes[1].up["envelope"] > 0


def test_evaluation_is_kept_apart(make_grid: Any, efficient_config: dict[str, Any]) -> None:
    # In the last round alone: an evaluation has waiting targets delivered in messages of their own.
    config = {**efficient_config, "client-distill-rounds": 1}
    apart = rows_of(make_grid, config)
    without = rows_of(make_grid, {**config, "client-evaluation": "off"})
    assert [row.bytes_up for row in apart] == [row.bytes_up for row in without]
    assert all(row.evaluation_bytes_up > 0 for row in apart)
    assert not any(row.evaluation_bytes_up for row in without)
