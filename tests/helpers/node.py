"""One node of an in-process federation, asked directly."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Message

from fedzge_flwr.images.pixels import from_levels, to_levels
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.wire.codec import decode, encode
from fedzge_flwr.wire.messages import (
    CompactLogitsRequest,
    Reply,
    Request,
)

IMAGES = np.random.default_rng(0).uniform(-1, 1, (12, 1, 8, 8)).astype(np.float32)


LOGITS = np.random.default_rng(1).normal(size=(12, 10)).astype(np.float32)


DIMS = {"K": 10}


class Node:
    """One node of an in-process federation, asked directly."""

    def __init__(self, make_grid: Any, config: dict[str, Any], number: int = 0) -> None:
        self.grid = make_grid(config)
        self.node_id = sorted(self.grid.contexts)[number]
        self.context = self.grid.contexts[self.node_id]

    def ask(self, request: Request) -> Message:
        (reply,) = self.grid.send_and_receive(
            [Message(encode(request), self.node_id, request.ACTION)]
        )
        return reply

    def answer(self, request: Request, reply_type: type[Reply]) -> Any:
        reply = self.ask(request)
        assert reply.has_content(), reply.error
        return decode(
            (reply_type,),
            reply.content,
            sender="node",
            dims=DIMS,
            limits={"B": 100, "M": 1000},
            expect={"round": request.round},
        )

    def state(self) -> dict[str, Any]:
        records = self.context.state.array_records
        return {
            name: array.numpy() for record in records.values() for name, array in record.items()
        }


def compact(*, perturbed: int = 4, to_distill: bool = True, **changed: Any) -> CompactLogitsRequest:
    """Ask about 12 images on their levels, the first of them along two directions."""
    normal = np.random.default_rng(2).normal(size=(2, perturbed, 1, 8, 8)).astype(np.float32)
    fields: dict[str, Any] = {
        "round": 1,
        "base": to_levels(LEVELS),
        "directions": Directions.written_out(normal).payload_QGP,
        "seed": 0,
        "eps": 0.125,
        "differences": "forward",
        "to_distill": to_distill,
    }
    return CompactLogitsRequest(**{**fields, **changed})


LEVELS = from_levels(np.random.default_rng(3).integers(256, size=(12, 1, 8, 8), dtype=np.uint8))
