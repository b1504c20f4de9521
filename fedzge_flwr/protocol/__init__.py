"""The one owner of the wire: typed messages to and from Flower's RecordDict, and their sizes."""

from fedzge_flwr.protocol.codec import WIRE_VERSION, decode, encode
from fedzge_flwr.protocol.messages import (
    CompactDistillRequest,
    CompactLogitsRequest,
    DistillReply,
    DistillRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    ImagesNeeded,
    LogitsReply,
    LogitsRequest,
    Reply,
    Request,
    RoundReply,
    RoundRequest,
    TrainReply,
    TrainRequest,
    WireMessage,
)
from fedzge_flwr.protocol.size import encoded_bytes

__all__ = [
    "WIRE_VERSION",
    "CompactDistillRequest",
    "CompactLogitsRequest",
    "DistillReply",
    "DistillRequest",
    "EvaluateReply",
    "EvaluateRequest",
    "HelloReply",
    "HelloRequest",
    "ImagesNeeded",
    "LogitsReply",
    "LogitsRequest",
    "Reply",
    "Request",
    "RoundReply",
    "RoundRequest",
    "TrainReply",
    "TrainRequest",
    "WireMessage",
    "decode",
    "encode",
    "encoded_bytes",
]
