"""Every message of the system, as a frozen dataclass whose fields declare what the wire allows.

Requests go from the server to a client, replies back. No message has room for a parameter, a
private image or an architecture. Dimensions are named: B images of a query, N images of a batch,
(C, H, W) of an image, K classes, M test images, Q directions of each of G images in P bytes,
S images and T logits of targets;
`fedzge_flwr.protocol.decode` checks that a name has one value throughout a message, and the values
and limits that the receiver knows. An action may take one of several types of requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from fedzge_flwr.arrays import ByteArray, FloatArray
from fedzge_flwr.directions import SEEDS

Purpose: TypeAlias = Literal["base", "directions", "logits", "targets"]
"""What an array is for: images asked about, directions, answers, or distillation."""


@dataclass(frozen=True)
class ScalarSpec:
    """What a scalar field allows: its exact type, a closed range, or a choice."""

    kind: type
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ArraySpec:
    """What an array field allows, its dtype and the names of its dimensions; and what it is for."""

    dtype: str
    dims: tuple[str, ...]
    purpose: Purpose


def _scalar(
    kind: type,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    return field(metadata={"wire": ScalarSpec(kind, low, high, choices)})


def _array(purpose: Purpose, dims: str, dtype: str = "float32") -> Any:
    return field(metadata={"wire": ArraySpec(dtype, tuple(dims.split()), purpose)})


_MAX_COUNT = 2**62
_MAX_LOSS = 1e30
"""Of any number of losses up to it the sum is finite, so that none can spoil a report."""


@dataclass(frozen=True)
class WireMessage:
    """Base of all messages.

    Parameters
    ----------
    round : int
        The round that it belongs to, from 1; 0 before the first. A reply repeats its request's.
    """

    round: int = _scalar(int, low=0, high=_MAX_COUNT)


@dataclass(frozen=True)
class Reply(WireMessage):
    """Base of replies."""


@dataclass(frozen=True)
class Request(WireMessage):
    """Base of requests."""

    ACTION: ClassVar[str]
    """Flower's message type, ``category.action``: the endpoint."""


@dataclass(frozen=True)
class HelloReply(Reply):
    """Who a client is (see `fedzge_flwr.blackbox.ClientProfile`) and the version that it runs."""

    partition: int = _scalar(int, low=0, high=_MAX_COUNT)
    num_partitions: int = _scalar(int, low=1, high=_MAX_COUNT)
    num_examples: int = _scalar(int, low=0, high=_MAX_COUNT)
    device: str = _scalar(str)
    gpu_share: float = _scalar(float, low=0.0)
    version: str = _scalar(str)


@dataclass(frozen=True)
class HelloRequest(Request):
    """Ask a node who it is."""

    ACTION = "query.hello"

    version: str = _scalar(str)


@dataclass(frozen=True)
class TrainReply(Reply):
    """Local training is done (see `fedzge_flwr.blackbox.FitReport`)."""

    num_examples: int = _scalar(int, low=0, high=_MAX_COUNT)
    loss: float = _scalar(float, low=0.0, high=_MAX_LOSS)


@dataclass(frozen=True)
class TrainRequest(Request):
    """Train on your own data, as your own settings say."""

    ACTION = "train.local"


@dataclass(frozen=True)
class LogitsReply(Reply):
    """The logits of each image asked about."""

    logits: FloatArray = _array("logits", "B K")


@dataclass(frozen=True)
class LogitsRequest(Request):
    """Ask for logits on these images; which are perturbed copies of which is not said."""

    ACTION = "query.logits"

    images: FloatArray = _array("base", "B C H W")


@dataclass(frozen=True)
class CompactLogitsRequest(Request):
    """Ask for logits on images and on copies of the first of them, which the client makes itself.

    See `fedzge_flwr.question.Question`.

    Parameters
    ----------
    base : ndarray of uint8
        The images, as levels of the shared pixel range.
    directions : ndarray of uint8
        The payload of `fedzge_flwr.directions.Directions`.
    seed : int
        Its seed.
    eps : float
        Step along a direction.
    two_sided : bool
        Whether the copies are on both sides.
    to_distill : bool
        Whether the answers may be sent back to be distilled: then the client keeps the images.
    """

    ACTION = "query.logits"

    base: ByteArray = _array("base", "N C H W", "uint8")
    directions: ByteArray = _array("directions", "Q G P", "uint8")
    seed: int = _scalar(int, low=0, high=SEEDS - 1)
    eps: float = _scalar(float, low=1e-30)
    two_sided: bool = _scalar(bool)
    to_distill: bool = _scalar(bool)


@dataclass(frozen=True)
class DistillReply(Reply):
    """Distillation is done; its last loss.

    Parameters
    ----------
    loss : float
        0 if it had been done before, or went wrong.
    problem : str
        What went wrong; empty if nothing did. The model is then as it was before.
    """

    loss: float = _scalar(float, low=0.0, high=_MAX_LOSS)
    problem: str = _scalar(str)


@dataclass(frozen=True)
class ImagesNeeded(Reply):
    """Nothing was done: the images that a digest names are not here."""


@dataclass(frozen=True)
class DistillRequest(Request):
    """Distil the ensemble's logits on these images into your model."""

    ACTION = "train.distill"

    temperature: float = _scalar(float, low=1e-6)
    images: FloatArray = _array("targets", "N C H W")
    logits: FloatArray = _array("targets", "N K")


@dataclass(frozen=True)
class CompactDistillRequest(Request):
    """The same, on images that ``digest`` names: those last asked about, or those sent here.

    Parameters
    ----------
    images : ndarray of uint8
        The images, as levels of the shared pixel range, if they are sent again; else none.
    """

    ACTION = "train.distill"

    temperature: float = _scalar(float, low=1e-6)
    digest: str = _scalar(str)
    images: ByteArray = _array("targets", "S C H W", "uint8")
    logits: FloatArray = _array("targets", "T K")


@dataclass(frozen=True)
class RoundReply(Reply):
    """Targets are distilled, local training is done, the query is answered.

    Parameters
    ----------
    num_examples, train_loss
        As in `TrainReply`.
    distill_loss, distill_problem
        As in `DistillReply`; 0 and empty if there were no targets.
    logits : ndarray of float32
        As in `LogitsReply`.
    """

    num_examples: int = _scalar(int, low=0, high=_MAX_COUNT)
    train_loss: float = _scalar(float, low=0.0, high=_MAX_LOSS)
    distill_loss: float = _scalar(float, low=0.0, high=_MAX_LOSS)
    distill_problem: str = _scalar(str)
    logits: FloatArray = _array("logits", "B K")


@dataclass(frozen=True)
class RoundRequest(CompactLogitsRequest):
    """Distil the targets of an earlier round, train locally, and answer this query, in that order.

    Parameters
    ----------
    targets_round : int
        The round that the targets are of; 0: there are none. Targets that have been distilled
        before, of this round or a later one, are not distilled again.
    temperature : float
        As in `DistillRequest`.
    digest : str
        Which images the targets are of.
    images : ndarray of uint8
        The images, if they are sent again; else none.
    targets : ndarray of float32
        The ensemble's logits on them.
    """

    ACTION = "train.round"

    targets_round: int = _scalar(int, low=0, high=_MAX_COUNT)
    temperature: float = _scalar(float, low=1e-6)
    digest: str = _scalar(str)
    images: ByteArray = _array("targets", "S C H W", "uint8")
    targets: FloatArray = _array("targets", "T K")


@dataclass(frozen=True)
class EvaluateReply(Reply):
    """Outcome of an evaluation (see `fedzge_flwr.blackbox.ClientEvaluation`)."""

    num_examples: int = _scalar(int, low=0, high=_MAX_COUNT)
    loss: float = _scalar(float, low=0.0, high=_MAX_LOSS)
    accuracy: float = _scalar(float, low=0.0, high=1.0)
    logits: FloatArray = _array("logits", "M K")


@dataclass(frozen=True)
class EvaluateRequest(Request):
    """Evaluate your model, on the common test set or on your own held-out images.

    Parameters
    ----------
    num_logits : int
        0, or how many images the common test set has: then their logits are returned too.
    """

    ACTION = "evaluate.local"

    split: str = _scalar(str, choices=("test", "held-out"))
    num_logits: int = _scalar(int, low=0, high=_MAX_COUNT)
