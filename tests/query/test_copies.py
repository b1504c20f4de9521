"""How many images a question asks about, by the one rule of both sides."""

from __future__ import annotations

import pytest

from fedzge_flwr.query.copies import COPIES, copies_asked, num_copies, num_queries


def test_each_direction_is_a_copy_or_two() -> None:
    assert [num_copies(q, "forward") for q in (0, 1, 5)] == [1, 2, 6]
    assert [num_copies(q, "central") for q in (0, 1, 5)] == [1, 3, 11]
    assert num_queries(num_base=20, num_perturbed=4, copies=3) == 28


def test_an_estimator_may_ask_about_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert copies_asked("surrogate", 5, "central") == 1
    assert copies_asked("guided", 5, "central") == copies_asked("mine", 5, "central") == 11
    monkeypatch.setitem(COPIES, "mine", lambda q, two_sided: 3 * q + two_sided)
    assert copies_asked("mine", 5, "central") == 16
    assert copies_asked("mine", 5, "forward") == 15
