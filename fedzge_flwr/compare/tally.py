"""What a client has done: gradient steps and processor seconds, kept by its node.

Counted around every message, in the client's own process, so that a simulation, a deployment and
one process count alike. Evaluation is for the experimenter's sake: its seconds are kept apart.
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
    """Gradient steps, and seconds of all processors; those of evaluation apart."""

    steps: int = 0
    seconds: float = 0.0
    evaluating: float = 0.0


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
    with counted() as work:
        reply = call(message, context)
    if message.metadata.message_type.startswith(UNCOUNTED):
        work = Work(evaluating=work.seconds)
    before = work_of(_kept(context))
    context.state[_RECORD] = MetricRecord(
        {
            "steps": before.steps + work.steps,
            "seconds": before.seconds + work.seconds,
            "evaluating": before.evaluating + work.evaluating,
        }
    )
    return reply


def tell(message: Message, context: Context) -> Message:
    """Answer with what has been counted: the endpoint ``query.tally``."""
    return Message(RecordDict({"tally": _kept(context)}), reply_to=message)


def work_of(record: MetricRecord) -> Work:
    """Return what `tell` tells of."""
    found: dict[str, Any] = dict(record)
    return Work(int(found["steps"]), float(found["seconds"]), float(found["evaluating"]))


def _kept(context: Context) -> MetricRecord:
    nothing = MetricRecord({"steps": 0, "seconds": 0.0, "evaluating": 0.0})
    return context.state.metric_records.get(_RECORD, nothing)
