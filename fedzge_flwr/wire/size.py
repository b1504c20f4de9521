"""How many bytes a message takes on Flower's wire.

Flower sends a message as a tree of objects: the message itself (metadata, or an error), its
RecordDict, the records, the arrays and the chunks of their data; equal objects travel once. The
size counted here is that of all of them, serialised, without HTTP headers, acknowledgements, polls.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flwr.app import Array, Message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)

from fedzge_flwr.wire.messages import ArraySpec, WireMessage


def payload_bytes(message: WireMessage) -> dict[str, int]:
    """Return the bytes of a message's arrays, by what they are for, headers not counted."""
    sizes: dict[str, int] = {}
    for item in dataclasses.fields(message):
        spec = item.metadata["wire"]
        if isinstance(spec, ArraySpec):
            size = int(getattr(message, item.name).nbytes)
            sizes[spec.purpose] = sizes.get(spec.purpose, 0) + size
    return sizes


def encoded_bytes(messages: Iterable[Message]) -> list[int]:
    """Return the size of each message in bytes.

    Messages that share records (the arrays of a request to many clients) are measured once for
    them.
    """
    sizes: list[int] = []
    record_sizes: dict[int, int] = {}
    with no_object_id_recompute():
        for message in messages:
            size = len(message.deflate())
            if message.has_content():
                size += len(message.content.deflate())
                for record in message.content.values():
                    if id(record) not in record_sizes:
                        nested = get_all_nested_objects(record)
                        record_sizes[id(record)] = sum(
                            len(item.deflate()) for item in nested.values()
                        )
                    size += record_sizes[id(record)]
            sizes.append(size)
    return sizes


_SLACK_BYTES = 2**20
_ITEM_BYTES = 32
"""What an entry of a record takes at least, be it empty."""


def most_bytes(types: Sequence[type[WireMessage]], dims: Mapping[str, int]) -> int:
    """Return how many bytes a message of some types may take before it is an attack.

    Twice its arrays, so that a peer with other numbers is told what is wrong with them, and a MiB
    for all else.

    Parameters
    ----------
    types : Sequence[type[WireMessage]]
        The types that it may have.
    dims : Mapping[str, int]
        The dimensions of all their arrays.
    """
    largest = 0
    for cls in types:
        specs = [item.metadata["wire"] for item in dataclasses.fields(cls)]
        sizes = [
            np.dtype(spec.dtype).itemsize * math.prod(dims[dim] for dim in spec.dims)
            for spec in specs
            if isinstance(spec, ArraySpec)
        ]
        largest = max(largest, sum(sizes))
    return 2 * largest + _SLACK_BYTES


def held_bytes(message: Message) -> int:
    """Return how many bytes a message holds, roughly and never more; none of them is copied."""
    size = len(message.metadata.message_type) + len(message.metadata.group_id)
    if message.has_error():
        return size + len(message.error.reason or "")
    for name, record in message.content.items():
        size += len(name) + _ITEM_BYTES
        for key, value in record.items():
            size += len(key) + _ITEM_BYTES + _held(value)
    return size


def _held(value: object) -> int:
    if isinstance(value, Array):
        return len(value.data) + len(value.dtype) + len(value.stype) + len(value.shape)
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, list):
        return len(value) + sum(len(item) for item in value if isinstance(item, (str, bytes)))
    return 0
