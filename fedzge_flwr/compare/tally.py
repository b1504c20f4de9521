"""What a client has done: gradient steps and processor seconds, kept by its node.

Counted around every message but those of evaluation, in the client's own process, so that a
simulation, a deployment and one process count alike.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message, MetricRecord, RecordDict

from fedzge_flwr.compare.meter import UNCOUNTED

if TYPE_CHECKING:
    from collections.abc import Callable

_RECORD = "compare.tally"


@dataclass
class Work:
    """Gradient steps, and seconds of all processors."""

    steps: int = 0
    seconds: float = 0.0


@contextmanager
def counted() -> Iterator[Work]:
    """Count the steps of all of torch's optimisers, and this process's processor seconds."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    work = Work()

    def count(_optimizer: Any, _args: Any, _options: Any) -> None:
        work.steps += 1

    handle = register_optimizer_step_post_hook(count)
    started = time.process_time()
    try:
        yield work
    finally:
        handle.remove()
        work.seconds = time.process_time() - started


def tally(
    message: Message, context: Context, call: Callable[[Message, Context], Message]
) -> Message:
    """Count what a message has a client do; a mod of Flower's."""
    if message.metadata.message_type.startswith(UNCOUNTED):
        return call(message, context)
    with counted() as work:
        reply = call(message, context)
    before = context.state.metric_records.get(_RECORD, MetricRecord({"steps": 0, "seconds": 0.0}))
    context.state[_RECORD] = MetricRecord(
        {
            "steps": int(before["steps"]) + work.steps,  # type: ignore[arg-type]
            "seconds": float(before["seconds"]) + work.seconds,  # type: ignore[arg-type]
        }
    )
    return reply


def tell(message: Message, context: Context) -> Message:
    """Answer with what has been counted: the endpoint ``query.tally``."""
    found = context.state.metric_records.get(_RECORD, MetricRecord({"steps": 0, "seconds": 0.0}))
    return Message(RecordDict({"tally": found}), reply_to=message)
