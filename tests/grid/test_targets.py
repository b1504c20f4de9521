"""Targets that are put off, and requests that name their images: no Flower, no messages sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from fedzge_flwr.common.arrays import ByteArray
from fedzge_flwr.grid.targets import Group, PendingTargets, send_by_name
from fedzge_flwr.query.question import Question
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.wire.messages import (
    CompactDistillRequest,
    DistillReply,
    ImagesNeeded,
    Reply,
)

SHAPE = (1, 2, 2)
NOTHING = Targets.none(SHAPE, 3)


def targets_of(round_: int) -> Targets:
    levels = np.random.default_rng(round_).integers(256, size=(5, *SHAPE), dtype=np.uint8)
    logits = np.random.default_rng(round_).normal(size=(5, 3)).astype(np.float32)
    return Targets.on(Question.unperturbed(levels), round_, logits, 1.5)


# -- what is put off --------------------------------------------------------------------------


def test_targets_wait_until_they_are_done_or_replaced() -> None:
    pending = PendingTargets()
    assert not pending
    first, second = targets_of(1), targets_of(2)
    pending.put([2, 0], first)
    pending.put([2, 1], second)
    assert list(pending.all().items()) == [(0, first), (1, second), (2, second)]
    assert pending.of(0, NOTHING) is first
    assert pending.of(7, NOTHING) is NOTHING
    pending.done(0)
    # Who had none is done with them all the same.
    pending.done(7)
    assert pending.of(0, NOTHING) is NOTHING
    assert list(pending.all()) == [1, 2]
    assert len(pending) == 2


def test_what_is_put_off_lives_through_a_restart_each_rounds_targets_once() -> None:
    pending, restored = PendingTargets(), PendingTargets()
    pending.put([0, 1, 2], targets_of(1))
    pending.put([1], targets_of(2))
    snapshot = pending.snapshot()
    assert snapshot["pending"] == {0: 1, 1: 2, 2: 1}
    assert set(snapshot["targets"]) == {1, 2}
    assert np.array_equal(snapshot["targets"][2]["images"], targets_of(2).images)
    restored.restore(snapshot)
    assert {number: item.round for number, item in restored.all().items()} == {0: 1, 1: 2, 2: 1}
    for number, item in pending.all().items():
        again = restored.all()[number]
        assert (again.digest, again.temperature) == (item.digest, item.temperature)
        assert np.array_equal(again.images, item.images)
        assert np.array_equal(again.logits_NK, item.logits_NK)


# -- sending by name --------------------------------------------------------------------------


class Clients:
    """Some no longer have images, some never reply; all that is sent is kept."""

    def __init__(self, *, forgetful: Sequence[int] = (), silent: Sequence[int] = ()) -> None:
        self.forgetful, self.silent = forgetful, silent
        self.exchanges: list[list[tuple[CompactDistillRequest, list[int]]]] = []

    def send(
        self, groups: Sequence[Group], reply_types: Sequence[type[Reply]]
    ) -> Mapping[int, Reply]:
        # Whoever has been sent the images does not need them.
        again = {ImagesNeeded} if not self.exchanges else set()
        assert set(reply_types) == {DistillReply} | again
        sent: list[Any] = [(request, list(partitions)) for request, partitions in groups]
        self.exchanges.append(sent)
        replies: dict[int, Reply] = {}
        for request, partitions in sent:
            for number in partitions:
                lacks = number in self.forgetful and not len(request.images)
                if number not in self.silent:
                    replies[number] = (
                        ImagesNeeded(round=request.round)
                        if lacks
                        else DistillReply(round=request.round, loss=float(number), problem="")
                    )
        # As they come in, not in order.
        return dict(reversed(replies.items()))


def request(targets: Targets, images: ByteArray) -> CompactDistillRequest:
    return CompactDistillRequest(
        round=targets.round,
        temperature=targets.temperature,
        digest=targets.digest,
        images=images,
        logits=targets.logits_NK,
    )


def losses_of(clients: Clients, targets: dict[int, Targets]) -> list[tuple[int, float]]:
    replies = send_by_name(clients.send, request, targets, DistillReply)
    return [(number, reply.loss) for number, reply in replies.items()]


def sent(exchange: list[tuple[CompactDistillRequest, list[int]]]) -> list[Any]:
    return [(one.round, len(one.images), sorted(partitions)) for one, partitions in exchange]


def test_images_are_named_and_clients_of_a_round_share_one_request() -> None:
    clients = Clients()
    first, second = targets_of(1), targets_of(2)
    targets = {0: first, 1: second, 2: first, 3: NOTHING}
    assert losses_of(clients, targets) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]
    (exchange,) = clients.exchanges
    assert sent(exchange) == [(1, 0, [0, 2]), (2, 0, [1]), (0, 0, [3])]
    of_first = exchange[0][0]
    assert (of_first.digest, of_first.images.dtype) == (first.digest, np.uint8)
    assert of_first.logits is first.logits_NK


def test_images_are_sent_to_those_alone_that_ask_for_them() -> None:
    clients = Clients(forgetful=(1, 2, 4))
    first, second = targets_of(1), targets_of(2)
    targets = {0: first, 1: first, 2: second, 3: second, 4: first}
    assert losses_of(clients, targets) == [(n, float(n)) for n in range(5)]
    by_name, with_images = clients.exchanges
    assert sent(by_name) == [(1, 0, [0, 1, 4]), (2, 0, [2, 3])]
    assert sorted(sent(with_images)) == [(1, 5, [1, 4]), (2, 5, [2])]
    for again, _ in with_images:
        wanted = {1: first, 2: second}[again.round]
        assert np.array_equal(again.images, wanted.images)
        assert again.digest == wanted.digest


def test_who_does_not_reply_is_absent_and_not_asked_again() -> None:
    clients = Clients(forgetful=(1,), silent=(0,))
    assert losses_of(clients, {0: targets_of(1), 1: targets_of(1)}) == [(1, 1.0)]
    assert [sent(exchange) for exchange in clients.exchanges] == [
        [(1, 0, [0, 1])],
        [(1, 5, [1])],
    ]


@pytest.mark.parametrize("silent", [(), (0,)])
def test_who_needs_images_that_were_sent_is_absent(silent: tuple[int, ...]) -> None:
    class Hopeless(Clients):
        def send(self, groups: Any, reply_types: Any) -> Mapping[int, Reply]:
            super().send(groups, reply_types)
            asked = [(one.round, n) for one, partitions in groups for n in partitions]
            return {n: ImagesNeeded(round=at) for at, n in asked if n not in self.silent}

    clients = Hopeless(silent=silent)
    assert losses_of(clients, {0: targets_of(1)}) == []
    assert len(clients.exchanges) == 2 - len(silent)
