"""Nodes that come and go while a run goes on, and nodes that say that they are others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from fedzge_flwr.common.errors import ConfigError, RosterError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.grid.roster import is_simulated
from fedzge_flwr.observers.run_folder import RunFolder
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


def after(grid: InProcessGrid, acts: dict[tuple[int, int], Any]) -> None:
    """Have things done, each once: in a round, after so many clients' answers."""
    answers: dict[int, int] = {}

    def look(request: Message, reply: Message) -> Message:
        round_ = int(request.content["message"]["round"])
        if request.metadata.message_type == "train.round":
            answers[round_] = answers.get(round_, 0) + 1
            acts.pop((round_, answers[round_]), lambda: None)()
        return reply

    grid.tamper = look
    # What goes to a node that is gone is not sent.
    grid.lose = lambda message: message.metadata.dst_node_id not in grid.contexts


def warnings_of(caplog: pytest.LogCaptureFixture, about: str) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and about in record.getMessage()
    ]


def nodes_that_worked(grid: InProcessGrid) -> set[int]:
    return {
        message.metadata.dst_node_id
        for message in grid.sent
        if message.metadata.message_type != "query.hello"
    }


# -- nodes that are whom they say -----------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize("changes", ["refuse", "warn"])
def test_a_restarted_node_goes_on_with_its_model(
    make_grid: Any,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: str,
) -> None:
    """Under its own id, that of its key; or under another, where the settings allow that."""
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "a"))
    run_server(make_grid(config), config)
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "b"))
    again = {**config, "run-name": "restarted", "node-changes": changes}
    grid = make_grid(again)
    node = sorted(grid.contexts)[1]
    new = {"refuse": node, "warn": 99_999}[changes]

    def restart() -> None:
        context = another_node(grid, node, new)
        del grid.contexts[node]
        grid.contexts[new] = context

    after(grid, {(1, 3): restart})
    folder = run_server(grid, again)
    assert all(not row["missing"] for row in rows_of(folder))
    warned = warnings_of(caplog, "client 1 is node 99999 now: node 1017, which it was, is gone; ")
    assert len(warned) == (changes == "warn")
    whole, restarted = central_of(folder_of(config)), central_of(folder)
    assert all(bool((whole[name] == restarted[name]).all()) for name in whole)


@pytest.mark.faults
def test_a_new_id_that_comes_before_the_old_one_is_gone_is_taken_when_it_is(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A SuperNode that is killed is listed for another minute."""
    config = {**config, "num-server-rounds": 5, "node-changes": "warn"}
    # Client 2 never comes, so that whoever comes is asked.
    grid = make_grid(config)
    first, second, third = sorted(grid.contexts)
    grid.contexts[third].node_config["num-partitions"] = 7
    config |= {"node-timeout": 0.6}

    def come() -> None:
        grid.contexts[99_999] = another_node(grid, second, 99_999)

    after(grid, {(1, 2): come, (3, 2): lambda: grid.contexts.pop(second)})
    rows = rows_of(run_server(grid, config))
    assert [row["participants"] for row in rows] == [[0, 1]] * 5
    assert nodes_that_worked(grid) == {first, second, 99_999}
    assert len(warnings_of(caplog, "node 99999 says that it is client 1: that is node 1017")) == 1
    assert len(warnings_of(caplog, "client 1 is node 99999 now: node 1017, which it was")) == 1


# -- nodes that say that they are others ----------------------------------------------------------


def test_takeover_before_is_refused_where_the_nodes_are_named(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The stranger is there first; client 2 comes while the run goes on."""
    grid = make_grid(config)
    honest = sorted(grid.contexts)
    config |= {
        "node-timeout": 0.6,
        "node-ids": ", ".join(f"{number}:{node}" for number, node in enumerate(honest)),
    }
    late = grid.contexts.pop(honest[2])
    grid.contexts[5] = another_node(grid, honest[0], 5)
    grid.contexts[5].node_config["partition-id"] = 2
    after(grid, {(1, 2): lambda: grid.contexts.__setitem__(honest[2], late)})
    rows = rows_of(run_server(grid, config))
    assert [row["participants"] for row in rows] == [[0, 1], [0, 1, 2], [0, 1, 2]]
    assert nodes_that_worked(grid) == set(honest)
    (line,) = warnings_of(caplog, "node 5 ")
    assert "node 5 is turned away: all 3 clients are other nodes (client 2 is node 1034: away)" in (
        line
    )
    # What it might answer is not even waited for.
    assert 5 not in {message.metadata.dst_node_id for message in grid.sent}


@pytest.mark.faults
def test_takeover_during_absence_is_refused_and_the_client_is_asked_again(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = {**config, "num-server-rounds": 5}
    grid = make_grid(config)
    honest = sorted(grid.contexts)
    away: list[Context] = []

    def leave() -> None:
        for stranger in (99_998, 99_999):
            grid.contexts[stranger] = another_node(grid, honest[2], stranger)
        away.append(grid.contexts.pop(honest[2]))

    def come_back() -> None:
        grid.contexts[honest[2]] = away.pop()

    after(grid, {(1, 3): leave, (3, 2): come_back})
    rows = rows_of(run_server(grid, config))
    assert [2 in row["participants"] for row in rows] == [True, False, True, True, True]
    assert nodes_that_worked(grid) == set(honest)
    for stranger in (99_998, 99_999):
        (line,) = warnings_of(caplog, f"node {stranger} ")
        assert "client 2 is node 1034: away" in line
        assert "'node-ids'" in line
    assert len(warnings_of(caplog, "turned away")) == 2


def stopped_in_round_2(
    make_grid: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Stop a run; return its nodes."""

    class Stop(BaseException):
        pass

    def on_phase(self: RunFolder, round_: int, name: str) -> None:
        if (round_, name) == (2, "ask_clients"):
            raise Stop

    grid = make_grid(config)
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "on_phase", on_phase)
        # The kernel lets go of what is locked.
        patched.setattr(RunFolder, "on_end", lambda folder, *_: folder._let_go())
        with pytest.raises(Stop):
            run_server(grid, config)
    return sorted(grid.contexts)


@pytest.mark.faults
def test_takeover_after_a_restart_of_the_server_is_refused(
    make_grid: Any,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Client 2 is away when the server comes back, and a stranger is there."""
    honest = stopped_in_round_2(make_grid, config, monkeypatch)
    again = {**config, "resume": str(folder_of(config)), "node-timeout": 0.6}
    grid = make_grid(again)
    late = grid.contexts.pop(honest[2])
    grid.contexts[5] = another_node(grid, honest[0], 5)
    grid.contexts[5].node_config["partition-id"] = 2
    after(grid, {(2, 2): lambda: grid.contexts.__setitem__(honest[2], late)})
    rows = rows_of(run_server(grid, again))
    assert [row["participants"] for row in rows] == [[0, 1, 2], [0, 1], [0, 1, 2]]
    assert rows[1]["missing"][0]["reason"] == "not connected"
    assert nodes_that_worked(grid) == set(honest)
    assert len(warnings_of(caplog, "node 5 is turned away: all 3 clients are other nodes")) == 1


def test_in_a_simulation_nodes_are_new_in_each_run(
    make_grid: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import client_app

    class InMemoryGrid(InProcessGrid):
        """By its name Flower's grid of a simulation."""

    assert not is_simulated(make_grid(config))
    stopped_in_round_2(make_grid, config, monkeypatch)
    again = {**config, "resume": str(folder_of(config))}
    grid = InMemoryGrid(client_app.app, again, 3, shuffle=5)
    rows = rows_of(run_server(grid, again))
    assert [row["participants"] for row in rows] == [[0, 1, 2]] * 3


def test_flowers_grid_of_a_simulation_is_known_by_its_name() -> None:
    from flwr.superlink.grid import HttpGrid, InMemoryGrid

    assert is_simulated(InMemoryGrid.__new__(InMemoryGrid))
    assert not is_simulated(HttpGrid.__new__(HttpGrid))


@pytest.mark.faults
@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (
            {"partition-id": 0, "num-partitions": 3},
            "node 1017 says that it is client 0: that is node 1000; give each node a partition-id",
        ),
        (
            {"partition-id": 3, "num-partitions": 4},
            "node 1017 has partition 3 of 4, but 'num-clients' = 3; make the two equal",
        ),
        ({"partition-id": 2**40, "num-partitions": 2**41}, "node 1017 has partition 1099511627776"),
    ],
    ids=["duplicate", "partitions", "impossible"],
)
def test_a_bad_first_hello_ends_no_run_and_takes_nobodys_place(
    make_grid: Any,
    config: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    wrong: dict[str, Any],
    reason: str,
) -> None:
    import client_app

    class Coming(InProcessGrid):
        """Client 1 comes when the first three nodes have been asked."""

        def get_node_ids(self) -> list[int]:
            if any(message.metadata.message_type == "query.hello" for message in self.sent):
                self.contexts.setdefault(2000, late)
            return list(self.contexts)

    config = {**config, "num-server-rounds": 2, "min-clients": 3}
    # Whatever a black box makes of its node config, the hello says this.
    grid = Coming(client_app.app, config, 3)
    late = another_node(grid, 1017, 2000)
    grid.tamper = lambda request, reply: lie(request, reply)

    def lie(request: Message, reply: Message) -> Message:
        said = reply.content["message"]
        if request.metadata.dst_node_id == 1017 and said["type"] == "HelloReply":
            said["partition"] = wrong["partition-id"]
            said["num_partitions"] = wrong["num-partitions"]
        return reply

    rows = rows_of(run_server(grid, config))
    assert [row["participants"] for row in rows] == [[0, 1, 2], [0, 1, 2]]
    assert len(warnings_of(caplog, reason)) == 1
    assert len(warnings_of(caplog, "node 1017 ")) == 1
    assert nodes_that_worked(grid) == {1000, 1034, 2000}


def test_when_too_few_are_left_the_reasons_are_named(
    make_grid: Any, config: dict[str, Any]
) -> None:
    config = {**config, "min-clients": 3, "node-timeout": 0.6}
    twice = {"partition-id": 0, "num-partitions": 3}
    grid = make_grid(config, node_configs={1: twice})
    with pytest.raises(
        RosterError,
        match=r"2 of 3 nodes take part, 'min-clients' = 3: node 1017 says that it is client 0: "
        r"that is node 1000; give each node a partition-id of its own",
    ):
        run_server(grid, config)
    assert {m.metadata.message_type for m in grid.sent} == {"query.hello"}


@pytest.mark.faults
def test_a_client_cannot_become_another(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Client 0's node is restarted as client 2, who has never been there."""
    config = {**config, "num-server-rounds": 4, "node-timeout": 0.6, "node-changes": "warn"}
    grid = make_grid(config, node_configs={2: {"partition-id": 0, "num-partitions": 3}})
    rows = rows_of(run_server(grid, config))
    assert [row["participants"] for row in rows] == [[0, 1]] * 4
    grid = make_grid({**config, "node-ids": "0:1000,1:1017,2:1034"})
    grid.contexts[1000].node_config["partition-id"] = 2
    again = {**config, "run-name": "again", "node-ids": "0:1000,1:1017,2:1034"}
    rows = rows_of(run_server(grid, again))
    assert [row["participants"] for row in rows] == [[1, 2]] * 4
    assert len(warnings_of(caplog, "node 1000 says that it is client 2: it is client 0; ")) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0:5,0:6", "'node-ids' names partition 0 twice; name each once"),
        ("0:5,1:5", "'node-ids' names node 5 twice; name each once"),
        ("3:5", "'node-ids' names partition 3, but 'num-clients' = 3: the first is 0"),
        ("0=5", "node-ids"),
    ],
)
def test_who_may_be_whom_is_read_strictly(given: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_run_config({"num-clients": 3, "node-ids": given})
    run = from_run_config({"num-clients": 3, "node-ids": f" 2:7, 0:{2**64 - 1} "}).run
    assert run.node_of == {2: 7, 0: 2**64 - 1}


# -- nodes that say nothing -----------------------------------------------------------------------


@pytest.mark.faults
def test_a_node_that_does_not_say_hello_is_asked_again_ever_more_rarely(
    make_grid: Any, config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """It is connected, but hangs; each hello would be waited for. In the end it answers."""
    config = {**config, "num-server-rounds": 10, "exchange-timeout": 9.0, "node-timeout": 0.7}
    grid = make_grid(config)
    dumb = sorted(grid.contexts)[1]
    hellos: list[int] = []
    rounds: set[int] = set()

    def slow(message: Message) -> float:
        if message.metadata.message_type == "train.round":
            rounds.add(int(message.content["message"]["round"]))
        if message.metadata.message_type != "query.hello" or message.metadata.dst_node_id != dumb:
            return 0.0
        hellos.append(len(rounds))
        return math.inf if len(hellos) < 3 else 0.0

    grid.slow = slow
    rows = rows_of(run_server(grid, config))
    # Before the first round, before the second, and, after three without, before the sixth.
    assert hellos == [0, 1, 5]
    assert [1 in row["participants"] for row in rows] == [False] * 5 + [True] * 5
    assert f"node {dumb} does not take part: no reply within 0.7 s" in caplog.text
    assert f"node {dumb} still does not take part: no reply within 0.7 s" in caplog.text


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
