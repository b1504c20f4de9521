"""How many bytes a message takes on Flower's wire.

Flower sends a message as a tree of objects: the message itself (metadata, or an error), its
RecordDict, the records, the arrays and the chunks of their data; equal objects travel once. The
size counted here is that of all of them, serialised, without HTTP headers, acknowledgements, polls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flwr.app import Message
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
