"""Every message of the system, as a frozen dataclass whose fields declare what the wire allows.

Requests go from the server to a client, replies back. No message has room for a parameter, a
private image or an architecture. Dimensions are named: B images of a query, N images of a batch,
(C, H, W) of an image, K classes, M test images, Q directions of each of G images in P bytes,
S images and T logits of targets; `fedzge_flwr.wire.codec.decode` checks that a name has one value
throughout a message, and the values and limits that the receiver knows. An action may take one
of several types of requests.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.query.copies import Differences
from fedzge_flwr.query.directions import SEEDS

ArrayPurpose: TypeAlias = Literal["base", "directions", "logits", "targets"]
"""What an array is for: images asked about, directions, answers, or distillation."""


@dataclass(frozen=True)
class ScalarSpec:
    """What a scalar field allows: its exact type, a closed range, a choice, or a pattern."""

    kind: type
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    pattern: str | None = None


@dataclass(frozen=True)
class ArraySpec:
    """What an array field allows, and what it is for.

    Parameters
    ----------
    dtype : str
        Of its values.
    dims : tuple of str
        The names of its dimensions.
    purpose : ArrayPurpose
        What it is for.
    largest : float, optional
        Largest magnitude of its values, which are finite in any case.
    """

    dtype: str
    dims: tuple[str, ...]
    purpose: ArrayPurpose
    largest: float | None = None


def _scalar(
    kind: type,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] | None = None,
    default: Any = MISSING,
) -> Any:
    """Declare a number or a string; by keyword if it has a default."""
    spec = ScalarSpec(kind, low, high, choices)
    return field(metadata={"wire": spec}, default=default, kw_only=default is not MISSING)


def _hex(digits: int, *, optional: bool = False, many: bool = False, default: Any = MISSING) -> Any:
    """Declare a string of so many hexadecimal digits, or none, or many times as many.

    It is given by keyword if it has a default.
    """
    pattern = f"([0-9a-f]{{{digits}}})" + ("*" if many else "?" * optional)
    spec = ScalarSpec(str, pattern=pattern)
    return field(metadata={"wire": spec}, default=default, kw_only=default is not MISSING)


def _array(
    purpose: ArrayPurpose, dims: str, dtype: str = "float32", *, largest: float | None = None
) -> Any:
    return field(metadata={"wire": ArraySpec(dtype, tuple(dims.split()), purpose, largest)})


LARGEST_LOGIT = 1e6
"""A classifier that has not diverged stays far below; sums of squares of larger ones overflow."""

_MAX_COUNT = 2**62
_MAX_LOSS = 1e30
"""Of any number of losses up to it the sum is finite, so that none can spoil a report."""

MOST_OWED = 100
"""Most rounds of training that a request may ask for beside its own."""

NO_EXPERIMENT = "0" * 32
"""The experiment of a request that stands alone."""


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
    """Base of replies.

    Parameters
    ----------
    began, state : str
        The client's names for the states of its model that it began with and that it has kept;
        empty for the initial one. They say nothing of the model.
    """

    began: str = _hex(16, optional=True, default="")
    state: str = _hex(16, optional=True, default="")


@dataclass(frozen=True)
class Request(WireMessage):
    """Base of requests.

    Parameters
    ----------
    experiment : str
        The experiment that it belongs to: the same for a run and for those that resume it.
    state : str
        The client's state that the server goes on from, as named in a reply; empty: its initial
        one. What the client did after that is lost to the server.
    durable : str
        The client's state in the oldest checkpoint that the server keeps: it will never ask for
        one from before that again. Empty: there is none.
    """

    experiment: str = _hex(32, default=NO_EXPERIMENT)
    state: str = _hex(16, optional=True, default="")
    durable: str = _hex(16, optional=True, default="")

    ACTION: ClassVar[str]
    """Flower's message type, ``category.action``: the endpoint."""


@dataclass(frozen=True)
class Refused(Reply):
    """The client's owner does not allow what was asked, or not now; any request may get it."""

    reason: str = _scalar(str)


@dataclass(frozen=True)
class HelloReply(Reply):
    """Who a client is (`fedzge_flwr.black_boxes.contract.ClientProfile`), and its version.

    Parameters
    ----------
    data : str
        Another if its images are others, in this experiment; empty: not known. Of a key that the
        client keeps to itself, so that nobody can try which images they are: 16 digits tell that
        key from others, and 32 are of the images.
    epsilon, delta : float
        Of its differential privacy; 0: none, or not told.
    differs : str
        Which of the settings that it learns by are not those of the request, a bit each; empty: not
        known.
    """

    partition: int = _scalar(int, low=0, high=_MAX_COUNT)
    num_partitions: int = _scalar(int, low=1, high=_MAX_COUNT)
    num_examples: int = _scalar(int, low=0, high=_MAX_COUNT)
    device: str = _scalar(str)
    gpu_share: float = _scalar(float, low=0.0)
    version: str = _scalar(str)
    data: str = _hex(48, optional=True, default="")
    differs: str = _hex(16, optional=True, default="")
    epsilon: float = _scalar(float, low=0.0, high=1e6, default=0.0)
    delta: float = _scalar(float, low=0.0, high=1.0, default=0.0)


@dataclass(frozen=True)
class HelloRequest(Request):
    """Ask a node who it is.

    Parameters
    ----------
    settings : str
        Some digits of each of the settings that clients learn by, as the server has them; empty:
        not told (`fedzge_flwr.config.agreement`).
    """

    ACTION = "query.hello"

    version: str = _scalar(str)
    settings: str = _hex(4, many=True, default="")


@dataclass(frozen=True)
class TrainReply(Reply):
    """Local training is done (see `fedzge_flwr.black_boxes.contract.FitReport`)."""

    num_examples: int = _scalar(int, low=0, high=_MAX_COUNT)
    loss: float = _scalar(float, low=0.0, high=_MAX_LOSS)


@dataclass(frozen=True)
class TrainRequest(Request):
    """Train on your own data, as your own settings say.

    Parameters
    ----------
    owed : int
        Rounds of training that the client was asked for since ``state`` and has not been heard of;
        made up for before this round's, unless it goes on from another state.
    """

    ACTION = "train.local"

    owed: int = _scalar(int, low=0, high=MOST_OWED, default=0)


@dataclass(frozen=True)
class LogitsReply(Reply):
    """The logits of each image asked about.

    Parameters
    ----------
    query : str
        The fingerprint of what was asked, as the client has understood it
        (`fedzge_flwr.query.question`).
    """

    query: str = _hex(64)
    logits: FloatArray = _array("logits", "B K", largest=LARGEST_LOGIT)


@dataclass(frozen=True)
class LogitsRequest(Request):
    """Ask for logits on these images; which are perturbed copies of which is not said."""

    ACTION = "query.logits"

    images: FloatArray = _array("base", "B C H W")


@dataclass(frozen=True)
class CompactLogitsRequest(Request):
    """Ask for logits on images and on copies of the first of them, which the client makes itself.

    See `fedzge_flwr.query.question.Question`.

    Parameters
    ----------
    base : ndarray of uint8
        The images, as levels of the shared pixel range.
    directions : ndarray of uint8
        The payload of `fedzge_flwr.query.directions.Directions`.
    seed : int
        Its seed.
    eps : float
        Step along a direction.
    differences : str
        Whether the copies are on one side ("forward") or on both ("central").
    to_distill : bool
        Whether the answers may be sent back to be distilled: then the client keeps the images.
    """

    ACTION = "query.logits"

    base: ByteArray = _array("base", "N C H W", "uint8")
    directions: ByteArray = _array("directions", "Q G P", "uint8")
    seed: int = _scalar(int, low=0, high=SEEDS - 1)
    eps: float = _scalar(float, low=1e-30)
    differences: str = _scalar(str, choices=get_args(Differences))
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
    """Distill the ensemble's logits on these images into your model."""

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
    query, logits
        As in `LogitsReply`.
    """

    num_examples: int = _scalar(int, low=0, high=_MAX_COUNT)
    train_loss: float = _scalar(float, low=0.0, high=_MAX_LOSS)
    distill_loss: float = _scalar(float, low=0.0, high=_MAX_LOSS)
    distill_problem: str = _scalar(str)
    query: str = _hex(64)
    logits: FloatArray = _array("logits", "B K", largest=LARGEST_LOGIT)


@dataclass(frozen=True)
class RoundRequest(CompactLogitsRequest):
    """Distill the targets of an earlier round, train locally, and answer this query, in that order.

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
    owed : int
        As in `TrainRequest`.
    """

    ACTION = "train.round"

    targets_round: int = _scalar(int, low=0, high=_MAX_COUNT)
    temperature: float = _scalar(float, low=1e-6)
    digest: str = _scalar(str)
    images: ByteArray = _array("targets", "S C H W", "uint8")
    targets: FloatArray = _array("targets", "T K")
    owed: int = _scalar(int, low=0, high=MOST_OWED, default=0)


@dataclass(frozen=True)
class EvaluateReply(Reply):
    """Outcome of an evaluation (see `fedzge_flwr.black_boxes.contract.ClientEvaluation`)."""

    num_examples: int = _scalar(int, low=0, high=_MAX_COUNT)
    loss: float = _scalar(float, low=0.0, high=_MAX_LOSS)
    accuracy: float = _scalar(float, low=0.0, high=1.0)
    logits: FloatArray = _array("logits", "M K", largest=LARGEST_LOGIT)


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
