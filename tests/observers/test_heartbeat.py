"""No silent minutes: what a long round is at is logged now and then, and in a short one nothing."""

from __future__ import annotations

import logging

import pytest

from fedzge_flwr.observers import heartbeat
from fedzge_flwr.observers.heartbeat import Heartbeat


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    return now


def test_a_long_round_says_what_it_is_at(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    beat = Heartbeat(every=20.0)
    beat.on_phase(3, "ask_clients")
    for answered in range(5):
        clock[0] += 8.0
        beat.on_replies(answered + 1, 5)
    clock[0] += 21.0
    beat.on_phase(3, "distill_central")
    assert [record.getMessage() for record in caplog.records] == [
        "round 3: ask clients: 3 of 5 clients have replied",
        "round 3: ask clients: 61 s",
    ]


def test_short_rounds_have_their_own_line_alone(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    beat = Heartbeat(every=20.0)
    for round_ in range(1, 6):
        beat.on_phase(round_, "ask_clients")
        clock[0] += 15.0
        beat.on_replies(1, 1)
        beat.on_round(None, None, None)
    assert caplog.records == []
