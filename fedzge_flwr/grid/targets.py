"""Targets that clients have yet to distill, and requests that name their images.

A client keeps the images that it was last asked about: targets on them need name them only, and
the images are sent again to those alone that no longer have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from fedzge_flwr.common.arrays import ByteArray
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.wire.messages import ImagesNeeded, Reply, Request

R = TypeVar("R", bound=Reply)

Group: TypeAlias = tuple[Request, Sequence[int]]
"""A request, and the partitions that it goes to."""

Send: TypeAlias = Callable[[Sequence[Group], Sequence[type[Reply]]], Mapping[int, Reply]]
"""Sends groups, all to one action, and returns decoded replies by partition."""


class PendingTargets:
    """The targets that each client has yet to distill, by partition."""

    def __init__(self) -> None:
        self._targets: dict[int, Targets] = {}

    def __len__(self) -> int:
        return len(self._targets)

    def put(self, partitions: Sequence[int], targets: Targets) -> None:
        """Put off what these clients are to distill, in place of what they had put off."""
        self._targets |= dict.fromkeys(partitions, targets)

    def of(self, partition: int, otherwise: Targets) -> Targets:
        """Return a client's targets."""
        return self._targets.get(partition, otherwise)

    def all(self) -> dict[int, Targets]:
        """Return all, in order of partition."""
        return dict(sorted(self._targets.items()))

    def done(self, partition: int) -> None:
        """Forget what a client has distilled."""
        self._targets.pop(partition, None)

    def snapshot(self) -> dict[str, Any]:
        """Return all, each round's targets once, for `restore`."""
        return {
            "pending": {partition: item.round for partition, item in self._targets.items()},
            "targets": {item.round: vars(item) for item in self._targets.values()},
        }

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Take up what `snapshot` returned."""
        targets = {round_: Targets(**fields) for round_, fields in snapshot["targets"].items()}
        self._targets = {
            partition: targets[round_] for partition, round_ in snapshot["pending"].items()
        }


def send_by_name(
    send: Send,
    make: Callable[[Targets, ByteArray], Request],
    targets: Mapping[int, Targets],
    reply_type: type[R],
) -> dict[int, R]:
    """Send clients a request with targets; the images, to those alone that have not kept them.

    Whoever has been sent the images and says that it needs them breaks the wire's rules.

    Parameters
    ----------
    send : Send
        Carries the messages.
    make : Callable[[Targets, ndarray], Request]
        Makes the request of targets and of the images to send.
    targets : Mapping[int, Targets]
        By partition; clients with targets of one round are sent one and the same request.
    reply_type : type[Reply]
        What they reply.

    Returns
    -------
    dict[int, Reply]
        By partition, in that order.
    """
    replies: dict[int, R] = {}
    waiting = dict(targets)
    for with_images in (False, True):
        rounds: dict[int, list[int]] = {}
        for partition, item in waiting.items():
            rounds.setdefault(item.round, []).append(partition)
        groups: list[Group] = []
        for partitions in rounds.values():
            item = waiting[partitions[0]]
            # Under the compact transport images are held as levels.
            levels: Any = item.images if with_images else item.images[:0]
            groups.append((make(item, levels), partitions))
        got = send(groups, (reply_type,) if with_images else (reply_type, ImagesNeeded))
        replies |= {p: reply for p, reply in got.items() if isinstance(reply, reply_type)}
        waiting = {p: targets[p] for p, reply in got.items() if isinstance(reply, ImagesNeeded)}
        if not waiting:
            break
    return dict(sorted(replies.items()))
