"""Bytes of a client's round by transport, from encoded messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fedzge_flwr.config.sections import Settings
from fedzge_flwr.grid.clients import compact_fields
from fedzge_flwr.query.copies import num_copies
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question
from fedzge_flwr.wire.codec import encode
from fedzge_flwr.wire.messages import (
    DistillReply,
    DistillRequest,
    LogitsReply,
    LogitsRequest,
    Request,
    RoundReply,
    RoundRequest,
    TrainReply,
    TrainRequest,
    WireMessage,
)
from fedzge_flwr.wire.size import encoded_bytes, payload_bytes
from fedzge_flwr.wire.traffic import split


def byte_rows(settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield the bytes of a client's round after the first, by transport, from encoded messages."""
    # Flower's messages name the run and the node that they come from.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 2**63 - 1, 1, 1
    for name, messages in (
        ("compact, directions from a seed", compact_round(settings, "seeded")),
        ("compact, guided directions", compact_round(settings, "ternary")),
        ("compact, float32 directions", compact_round(settings, "float32")),
        ("dense", dense_round(settings)),
    ):
        sizes: dict[str, dict[str, int]] = {"down": {}, "up": {}}
        contents = [
            Message(encode(message), 2**63 - 1, "train.round", group_id="2") for message in messages
        ]
        for message, size in zip(messages, encoded_bytes(contents), strict=True):
            way = sizes["down" if isinstance(message, Request) else "up"]
            for purpose, part in split(size, payload_bytes(message)).items():
                way[purpose] = way.get(purpose, 0) + part
        yield {
            "transport": name,
            **sizes,
            "total": sum(sum(way.values()) for way in sizes.values()),
        }


def compact_round(settings: Settings, code: str) -> list[WireMessage]:
    """Return a round's messages: targets of the round before, the question, the answer."""
    rng = np.random.default_rng(0)
    queries, spec = settings.queries, settings.data.spec
    shape, num = spec.image_shape, settings.images.synthetic_batch_size
    drawn = rng.normal(size=(queries.q, num, *shape)).astype(np.float32)
    directions = {
        "seeded": Directions.from_seed(queries.q, num, shape, seed=1),
        "ternary": Directions.ternary(drawn),
        "float32": Directions.written_out(drawn),
    }[code]
    levels = rng.integers(256, size=(num, *shape), dtype=np.uint8)
    question = Question(levels, directions, queries.eps)
    request = RoundRequest(
        round=2,
        targets_round=1,
        temperature=settings.distillation.temperature,
        digest=question.digest,
        images=levels[:0],
        targets=_floats(rng, num, spec.num_classes),
        **compact_fields(question, to_distill=True),
    )
    answer = RoundReply(
        round=2,
        num_examples=100,
        train_loss=1.0,
        distill_loss=1.0,
        distill_problem="",
        query="0" * 64,
        logits=_floats(rng, question.num_images, spec.num_classes),
    )
    return [request, answer]


def dense_round(settings: Settings) -> list[WireMessage]:
    """Return a round's messages in float32, an exchange each for training, query, distillation."""
    rng = np.random.default_rng(0)
    spec, num = settings.data.spec, settings.images.synthetic_batch_size
    copies = num_copies(settings.queries.q, "forward")
    images = _floats(rng, num * copies, *spec.image_shape)
    return [
        TrainRequest(round=2),
        TrainReply(round=2, num_examples=100, loss=1.0),
        LogitsRequest(round=2, images=images),
        LogitsReply(round=2, query="0" * 64, logits=_floats(rng, num * copies, spec.num_classes)),
        DistillRequest(
            round=2,
            temperature=settings.distillation.temperature,
            images=images[:num],
            logits=_floats(rng, num, spec.num_classes),
        ),
        DistillReply(round=2, loss=1.0, problem=""),
    ]


def _floats(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return rng.normal(size=shape).astype(np.float32)
