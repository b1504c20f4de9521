"""What a reply of 300 MB costs a server, by Flower's own grid: its objects come from files.

``python -m tests.helpers.huge_reply KIND [MEGABYTES]`` prints as JSON how much memory the process
has taken beyond what it had, in MB, and what came of the replies of two nodes: the first sends the
huge one, the second an honest one. Kinds: array, scalar, error, unreadable (which is small).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedResponse,
    PullObjectResponse,
    PushObjectResponse,
)
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import (
    GetNodesResponse,
    PullAppMessagesResponse,
    PushAppMessagesResponse,
)
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.grid.exchange import GridExchange
from fedzge_flwr.grid.standing import Standing
from fedzge_flwr.wire.codec import encode
from fedzge_flwr.wire.messages import HelloReply, HelloRequest

HUGE_NODE, HONEST_NODE = 11, 12


class Files:
    """The SuperLink's answers to a grid, each reply's objects in files."""

    def __init__(self, folder: Path, kind: str, size: int) -> None:
        self.folder, self.kind, self.size = folder, kind, size
        self.asked: dict[str, Message] = {}

    def GetNodes(self, request: Any) -> GetNodesResponse:
        nodes = [NodeInfo(node_id=node) for node in (HUGE_NODE, HONEST_NODE)]
        return GetNodesResponse(nodes=nodes)

    def PushMessages(self, request: Any) -> PushAppMessagesResponse:
        messages = [message_from_proto(proto) for proto in request.messages_list]
        ids = [message.metadata.message_id for message in messages]
        self.asked |= dict(zip(ids, messages, strict=True))
        for message in messages:
            # What the node needs for it is not the server's.
            child = os.fork()
            if child == 0:
                self.reply(message)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=[])

    def PushObject(self, request: Any) -> PushObjectResponse:
        raise AssertionError

    def reply(self, request: Message) -> None:
        """Write what a node replies."""
        partition = request.metadata.dst_node_id - HUGE_NODE
        hello = HelloReply(
            round=0,
            partition=partition,
            num_partitions=2,
            num_examples=20,
            device="cpu",
            gpu_share=0.0,
            version="1",
        )
        content = encode(hello)
        huge = request.metadata.dst_node_id == HUGE_NODE
        if huge and self.kind == "array":
            data = os.urandom(self.size)
            array = Array("float32", (self.size // 4,), "numpy.ndarray", data)
            content["arrays"] = ArrayRecord({"logits": array})
        elif huge and self.kind == "scalar":
            content["message"]["device"] = "x" * self.size
        elif huge and self.kind == "unreadable":
            content["arrays"] = ArrayRecord({"logits": Array("float32", (1,), "numpy", b"1234")})
        reply = Message(content, reply_to=request)
        if huge and self.kind == "error":
            reply = Message(Error(code=0, reason="x" * self.size), reply_to=request)
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            for name, item in get_all_nested_objects(reply).items():
                stored = item.deflate()
                if huge and self.kind == "unreadable" and stored.startswith(b"Array "):
                    # Flower's SuperLink looks at heads and sizes alone.
                    stored = stored.replace(b'"shape"', b'"shapf"')
                answer = PullObjectResponse(
                    object_found=True, object_available=True, object_content=stored
                )
                (self.folder / name).write_bytes(answer.SerializeToString())
            # A message without its content; an error is no content.
            bare = message_to_proto(
                reply if reply.has_error() else Message(RecordDict(), reply_to=request)
            )
            bare.metadata.message_id = reply.metadata.message_id
            response = PullAppMessagesResponse(
                messages_list=[bare], message_object_trees=[get_object_tree(reply)]
            )
        name = f"reply-{request.metadata.message_id}"
        (self.folder / name).write_bytes(response.SerializeToString())

    def PullMessages(self, request: Any) -> PullAppMessagesResponse:
        response = PullAppMessagesResponse()
        for message_id in request.message_ids:
            path = self.folder / f"reply-{message_id}"
            if path.exists():
                response.MergeFromString(path.read_bytes())
                path.unlink()
        return response

    def PullObject(self, request: Any) -> PullObjectResponse:
        # As the client of Flower's HTTP API does: the body first, then what is in it.
        return PullObjectResponse.FromString((self.folder / request.object_id).read_bytes())

    def ConfirmMessageReceived(self, request: Any) -> Any:
        return ConfirmMessageReceivedResponse()


def peak_mb() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def main(kind: str, megabytes: int = 300) -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 3
    with tempfile.TemporaryDirectory() as folder:
        grid = HttpGrid(token="of no use")
        grid.set_run(Run.create_empty(7))
        grid._client = Files(Path(folder), kind, megabytes * 10**6)  # type: ignore[assignment]
        run = from_run_config({"num-clients": 2, "node-timeout": 5.0}).run
        exchange = GridExchange(grid, run, 5.0)
        before = peak_mb()
        replies, failures = exchange.send(
            [(HelloRequest(round=0, version="1"), list(grid.get_node_ids()))],
            (HelloReply,),
            lambda node: Standing(),
        )
        found = {
            "more_mb": round(peak_mb() - before),
            "replies": sorted(replies),
            "failures": {node: str(reason) for node, reason in failures.items()},
            "up": {node: item.total_up for node, item in exchange.take_ledger().protocol.items()},
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
