"""The one owner of the wire: typed messages to and from Flower's RecordDict, and their sizes."""

from fedzge_flwr.protocol.codec import WIRE_VERSION, decode, decode_any, encode
from fedzge_flwr.protocol.messages import (
    CompactDistillRequest,
    CompactLogitsRequest,
    DistillAskedRequest,
    DistillReply,
    DistillRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    LogitsReply,
    LogitsRequest,
    Reply,
    Request,
    TrainReply,
    TrainRequest,
    WireMessage,
)
from fedzge_flwr.protocol.size import encoded_bytes

__all__ = [
    "WIRE_VERSION",
    "CompactDistillRequest",
    "CompactLogitsRequest",
    "DistillAskedRequest",
    "DistillReply",
    "DistillRequest",
    "EvaluateReply",
    "EvaluateRequest",
    "HelloReply",
    "HelloRequest",
    "LogitsReply",
    "LogitsRequest",
    "Reply",
    "Request",
    "TrainReply",
    "TrainRequest",
    "WireMessage",
    "decode",
    "decode_any",
    "encode",
    "encoded_bytes",
]
