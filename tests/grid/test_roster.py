"""Nodes that come and go while a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from tests.helpers.inprocess import InProcessGrid
from tests.helpers.running import central_of, folder_of, rows_of, run_server


@pytest.fixture
def config(efficient_config: dict[str, Any]) -> dict[str, Any]:
    return {**efficient_config, "num-server-rounds": 3, "client-evaluation": "off"}


def another_node(grid: InProcessGrid, like: int, node_id: int) -> Context:
    """A node of the same node config whose Flower state is empty, as after a restart."""
    old = grid.contexts[like]
    return Context(
        run_id=old.run_id,
        node_id=node_id,
        node_config=dict(old.node_config),
        state=RecordDict(),
        run_config=dict(old.run_config),
    )


def after_round(grid: InProcessGrid, round_: int, act: Any) -> None:
    """Have something done once, when the last client has answered in a round."""
    seen: list[int] = []

    def look(request: Message, reply: Message) -> Message:
        if request.content["message"]["round"] == round_:
            seen.append(request.metadata.dst_node_id)
            if len(seen) == 3:
                act(sorted(seen))
        return reply

    grid.tamper = look


def test_a_restarted_node_goes_on_with_its_model(
    make_grid: Any,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "a"))
    run_server(make_grid(config), config)
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "b"))
    again = {**config, "run-name": "restarted"}
    grid = make_grid(again)

    def restart(nodes: list[int]) -> None:
        grid.contexts[99_999] = another_node(grid, nodes[1], 99_999)
        del grid.contexts[nodes[1]]

    after_round(grid, 1, restart)
    folder = run_server(grid, again)
    assert all(not row["missing"] for row in rows_of(folder))
    assert "client 1 is reached through node 99999 now" in caplog.text
    whole, restarted = central_of(folder_of(config)), central_of(folder)
    assert all(bool((whole[name] == restarted[name]).all()) for name in whole)


def test_a_node_that_claims_a_client_that_is_there_is_turned_away(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = {**config, "num-server-rounds": 4}
    grid = make_grid(config)

    def intrude(nodes: list[int]) -> None:
        # Client 2 is gone for good; two others both say that they are client 1.
        for number, like in ((99_998, nodes[1]), (99_999, nodes[1])):
            grid.contexts[number] = another_node(grid, like, number)
        del grid.contexts[nodes[2]]

    after_round(grid, 1, intrude)
    grid.lose = lambda message: message.metadata.dst_node_id not in grid.contexts
    folder = run_server(grid, config)
    rows = rows_of(folder)
    assert [row["participants"] for row in rows] == [[0, 1, 2], [0, 1], [0, 1], [0, 1]]
    turned_away = [
        r.getMessage() for r in caplog.records if "both have partition" in r.getMessage()
    ]
    # Each is told once, not in every round.
    assert len(turned_away) == 2
    greeted = [m for m in grid.sent if m.metadata.message_type == "query.hello"]
    assert len(greeted) == 5


def test_a_node_that_does_not_say_hello_is_asked_again_ever_more_rarely(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is connected, but hangs; each hello would be waited for. In the end it answers."""
    config = {**config, "num-server-rounds": 10, "exchange-timeout": 9.0, "node-timeout": 8.0}
    grid = make_grid(config)
    dumb = sorted(grid.contexts)[1]
    hellos: list[int] = []
    rounds: set[int] = set()

    def lose(message: Message) -> bool:
        if message.metadata.message_type == "train.round":
            rounds.add(int(message.content["message"]["round"]))
        if message.metadata.message_type != "query.hello" or message.metadata.dst_node_id != dumb:
            return False
        hellos.append(len(rounds))
        return len(hellos) < 3

    grid.lose = lose
    rows = rows_of(run_server(grid, config))
    # Before the first round, before the second, and, after three without, before the sixth.
    assert hellos == [0, 1, 5]
    assert [1 in row["participants"] for row in rows] == [False] * 5 + [True] * 5
    assert f"node {dumb} does not take part: no reply within 8 s" in caplog.text
    assert f"node {dumb} still does not take part: no reply within 8 s" in caplog.text


def test_a_silent_node_that_comes_back_is_asked_at_once(
    make_grid: Any, config: dict[str, Any]
) -> None:
    config = {**config, "num-server-rounds": 5}
    grid = make_grid(config)
    dumb = sorted(grid.contexts)[1]
    context = grid.contexts[dumb]
    silent = True
    hellos = 0

    def lose(message: Message) -> bool:
        nonlocal hellos
        of_it = message.metadata.message_type == "query.hello" and (
            message.metadata.dst_node_id == dumb
        )
        hellos += of_it
        return of_it and silent

    def look(request: Message, reply: Message) -> Message:
        nonlocal silent
        round_ = request.content["message"]["round"]
        if round_ == 2:
            grid.contexts.pop(dumb, None)
        if round_ == 3 and silent:
            silent = False
            grid.contexts[dumb] = context
        return reply

    grid.lose, grid.tamper = lose, look
    rows = rows_of(run_server(grid, config))
    assert [1 in row["participants"] for row in rows] == [False, False, False, True, True]
    assert hellos == 3
