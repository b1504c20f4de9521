"""The endpoints of a client: decode, load the private model, act, keep it, answer.

`register_endpoints` puts them on any ``ClientApp``, given a factory of black boxes. The model lives
in ``context.state`` between messages and leaves it in no reply; a handler that finds no model there
starts from the black box's initial one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedzge_flwr import __version__
from fedzge_flwr.blackbox import BlackBox, EvaluationSplit
from fedzge_flwr.errors import DataError, DivergenceError, ProtocolError
from fedzge_flwr.protocol import (
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
    decode_any,
    encode,
)
from fedzge_flwr.question import Question, from_levels, num_copies, num_queries

BlackBoxFactory: TypeAlias = Callable[[Context], BlackBox]

_STATE = "fedzge-private-model"
_ASKED = "fedzge-asked"


def hello(box: BlackBox, request: HelloRequest, context: Context) -> HelloReply:
    """Say who this client is."""
    profile = box.profile()
    return HelloReply(
        round=request.round,
        partition=profile.partition,
        num_partitions=profile.num_partitions,
        num_examples=profile.num_examples,
        device=profile.device,
        gpu_share=profile.gpu_share,
        version=__version__,
    )


def train(box: BlackBox, request: TrainRequest, context: Context) -> TrainReply:
    """Train on the client's own data."""
    report = box.fit(request.round)
    return TrainReply(round=request.round, num_examples=report.num_examples, loss=report.loss)


def answer(box: BlackBox, request: LogitsRequest, context: Context) -> LogitsReply:
    """Answer a logit query."""
    return LogitsReply(round=request.round, logits=box.logits(request.images))


def answer_compact(box: BlackBox, request: CompactLogitsRequest, context: Context) -> LogitsReply:
    """Answer a logit query on images and on copies of them, made here."""
    num_directions, num_perturbed, _ = request.directions.shape
    copies = num_copies(num_directions, two_sided=request.two_sided)
    num_images = num_queries(len(request.base), num_perturbed, copies)
    if num_perturbed > len(request.base):
        raise ProtocolError(
            "server", "directions", f"for {num_perturbed} of {len(request.base)} images"
        )
    # Before a copy is made: a few bytes may ask for many.
    if num_images > box.max_query_images:
        raise ProtocolError(
            "server", "base", f"{num_images} images with copies; at most {box.max_query_images}"
        )
    try:
        directions = Question.directions_from_bytes(request.directions, box.image_shape)
    except ValueError as error:
        raise ProtocolError("server", "directions", str(error)) from None
    question = Question(from_levels(request.base), directions, request.eps, request.two_sided)
    if request.to_distill:
        context.state[_ASKED] = ArrayRecord({question.digest: Array(request.base)})
    return LogitsReply(round=request.round, logits=box.logits(question.images_BCHW))


def distill(box: BlackBox, request: DistillRequest, context: Context) -> DistillReply:
    """Distil the ensemble's logits."""
    loss = box.distill(request.round, request.images, request.logits, request.temperature)
    return DistillReply(round=request.round, outcome="done", loss=loss)


def distill_compact(
    box: BlackBox, request: CompactDistillRequest, context: Context
) -> DistillReply:
    """Distil the ensemble's logits on images that came as bytes."""
    images_NCHW = from_levels(request.images)
    loss = box.distill(request.round, images_NCHW, request.logits, request.temperature)
    return DistillReply(round=request.round, outcome="done", loss=loss)


def distill_asked(box: BlackBox, request: DistillAskedRequest, context: Context) -> DistillReply:
    """Distil the ensemble's logits on the images last asked about, if they are the ones meant."""
    asked = context.state.array_records.get(_ASKED)
    kept = None if asked is None else asked.get(request.digest)
    if kept is None:
        return DistillReply(round=request.round, outcome="images-needed", loss=0.0)
    images_NCHW = from_levels(kept.numpy())
    if len(images_NCHW) != len(request.logits):
        raise ProtocolError(
            "server", "logits", f"{len(request.logits)} rows for {len(images_NCHW)} images"
        )
    loss = box.distill(request.round, images_NCHW, request.logits, request.temperature)
    return DistillReply(round=request.round, outcome="done", loss=loss)


def evaluate(box: BlackBox, request: EvaluateRequest, context: Context) -> EvaluateReply:
    """Evaluate the model."""
    # The codec has checked the choice.
    outcome = box.evaluate(cast(EvaluationSplit, request.split))
    num_logits = request.num_logits if request.split == "test" else 0
    if num_logits and len(outcome.logits_NK) != num_logits:
        raise DataError(
            f"the test set has {len(outcome.logits_NK)} images here and {num_logits} at the "
            "server; give both the same 'num-test-images' and files"
        )
    return EvaluateReply(
        round=request.round,
        num_examples=outcome.num_examples,
        loss=outcome.loss,
        accuracy=outcome.accuracy,
        logits=outcome.logits_NK[:num_logits],
    )


def register_endpoints(app: ClientApp, make_black_box: BlackBoxFactory) -> None:
    """Put FedZGE's endpoints on a ClientApp.

    Parameters
    ----------
    app : ClientApp
        Gets the actions ``query.hello``, ``train.local``, ``query.logits``, ``train.distill`` and
        ``evaluate.local``; other actions of it are left alone.
    make_black_box : Callable[[Context], BlackBox]
        Makes the black box of the node that the context belongs to. Called once for each message.
    """
    endpoints: dict[str, list[_Endpoint]] = {}
    for endpoint in _ENDPOINTS:
        endpoints.setdefault(endpoint.request_type.ACTION, []).append(endpoint)
    for action, choices in endpoints.items():
        category, name = action.split(".")
        register = {"train": app.train, "query": app.query, "evaluate": app.evaluate}[category]
        register(name)(_handler(choices, make_black_box))


@dataclass(frozen=True)
class _Endpoint:
    """A type of request, what answers it, and whether that changes the model."""

    request_type: type[Request]
    act: Callable[[BlackBox, Any, Context], Reply]
    changes_model: bool = False


_ENDPOINTS = (
    _Endpoint(HelloRequest, hello),
    _Endpoint(TrainRequest, train, changes_model=True),
    _Endpoint(LogitsRequest, answer),
    _Endpoint(CompactLogitsRequest, answer_compact),
    _Endpoint(DistillRequest, distill, changes_model=True),
    _Endpoint(CompactDistillRequest, distill_compact, changes_model=True),
    _Endpoint(DistillAskedRequest, distill_asked, changes_model=True),
    _Endpoint(EvaluateRequest, evaluate),
)


def _handler(
    choices: Sequence[_Endpoint], make_black_box: BlackBoxFactory
) -> Callable[[Message, Context], Message]:
    """Return the handler of an action that takes requests of some types."""

    def handle(message: Message, context: Context) -> Message:
        box = make_black_box(context)
        channels, height, width = box.image_shape
        most = box.max_query_images
        request = decode_any(
            [choice.request_type for choice in choices],
            message.content,
            sender="server",
            dims={"C": channels, "H": height, "W": width, "K": box.num_classes},
            limits={**dict.fromkeys("BNGQ", most), "P": 4 * channels * height * width},
        )
        endpoint = next(choice for choice in choices if choice.request_type is type(request))
        _load_private_state(box, context)
        reply = endpoint.act(box, request, context)
        if endpoint.changes_model:
            _keep_private_state(box, context)
        return Message(encode(reply), reply_to=message)

    return handle


def _load_private_state(box: BlackBox, context: Context) -> None:
    record = context.state.array_records.get(_STATE)
    if record is not None:
        box.load_state({name: array.numpy() for name, array in record.items()})


def _keep_private_state(box: BlackBox, context: Context) -> None:
    """Keep the model; one that has diverged is thrown away for the one before."""
    record = ArrayRecord()
    for name, value in box.state().items():
        if np.issubdtype(value.dtype, np.inexact) and not np.isfinite(value).all():
            raise DivergenceError(
                f"the model diverged ('{name}' is not finite) and is kept as it was before; lower "
                "'local-lr' or 'client-distill-lr'"
            )
        record[name] = Array(value)
    context.state[_STATE] = record
