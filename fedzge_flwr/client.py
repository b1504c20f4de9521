"""The endpoints of a client: decode, load the private model, act, keep it, answer.

`register_endpoints` puts them on any ``ClientApp``, given a factory of black boxes. The model lives
in ``context.state`` between messages and leaves it in no reply; a handler that finds no model there
starts from the black box's initial one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from fedzge_flwr import __version__
from fedzge_flwr.blackbox import BlackBox, EvaluationSplit
from fedzge_flwr.errors import DataError, DivergenceError
from fedzge_flwr.protocol import (
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
    decode,
    encode,
)

BlackBoxFactory: TypeAlias = Callable[[Context], BlackBox]

R = TypeVar("R", bound=Request)

_STATE = "fedzge-private-model"


def hello(box: BlackBox, request: HelloRequest) -> HelloReply:
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


def train(box: BlackBox, request: TrainRequest) -> TrainReply:
    """Train on the client's own data."""
    report = box.fit(request.round)
    return TrainReply(round=request.round, num_examples=report.num_examples, loss=report.loss)


def answer(box: BlackBox, request: LogitsRequest) -> LogitsReply:
    """Answer a logit query."""
    return LogitsReply(round=request.round, logits=box.logits(request.images))


def distill(box: BlackBox, request: DistillRequest) -> DistillReply:
    """Distil the ensemble's logits."""
    loss = box.distill(request.round, request.images, request.logits, request.temperature)
    return DistillReply(round=request.round, loss=loss)


def evaluate(box: BlackBox, request: EvaluateRequest) -> EvaluateReply:
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
    _register(app, HelloRequest, make_black_box, hello, changes_model=False)
    _register(app, TrainRequest, make_black_box, train, changes_model=True)
    _register(app, LogitsRequest, make_black_box, answer, changes_model=False)
    _register(app, DistillRequest, make_black_box, distill, changes_model=True)
    _register(app, EvaluateRequest, make_black_box, evaluate, changes_model=False)


def _register(
    app: ClientApp,
    request_type: type[R],
    make_black_box: BlackBoxFactory,
    act: Callable[[BlackBox, R], Reply],
    *,
    changes_model: bool,
) -> None:
    """Register the handler of one type of request under the action that it is sent to."""

    def handle(message: Message, context: Context) -> Message:
        box = make_black_box(context)
        channels, height, width = box.image_shape
        request = decode(
            request_type,
            message.content,
            sender="server",
            dims={"C": channels, "H": height, "W": width, "K": box.num_classes},
            limits={"B": box.max_query_images, "N": box.max_query_images},
        )
        _load_private_state(box, context)
        reply = act(box, request)
        if changes_model:
            _keep_private_state(box, context)
        return Message(encode(reply), reply_to=message)

    category, action = request_type.ACTION.split(".")
    register = {"train": app.train, "query": app.query, "evaluate": app.evaluate}[category]
    register(action)(handle)


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
