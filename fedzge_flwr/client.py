"""The endpoints of a client: decode, load the private model, act, keep it, answer.

`register_endpoints` puts them on any ``ClientApp``, given a factory of black boxes. The model lives
in ``context.state`` between messages and leaves it in no reply; a handler that finds no model there
starts from the black box's initial one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedzge_flwr import __version__
from fedzge_flwr.arrays import ByteArray, FloatArray
from fedzge_flwr.blackbox import BlackBox, EvaluationSplit, State
from fedzge_flwr.directions import Directions
from fedzge_flwr.errors import DataError, DivergenceError, ProtocolError
from fedzge_flwr.protocol import (
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
    decode,
    encode,
    from_array,
    to_array,
)
from fedzge_flwr.question import Question, from_levels, num_copies, num_queries

BlackBoxFactory: TypeAlias = Callable[[Context], BlackBox]

_STATE = "fedzge-private-model"
_ASKED = "fedzge-asked"
_PROGRESS = "fedzge-progress"


@dataclass
class Notes:
    """What a client remembers beside its model.

    Parameters
    ----------
    asked : dict[str, ndarray of uint8]
        The images last asked about, as levels, by digest; only if they may be distilled.
    distilled : int
        The newest round whose targets have been distilled; 0: none.
    """

    asked: dict[str, ByteArray]
    distilled: int


def hello(box: BlackBox, request: HelloRequest, notes: Notes) -> HelloReply:
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


def train(box: BlackBox, request: TrainRequest, notes: Notes) -> TrainReply:
    """Train on the client's own data."""
    report = box.fit(request.round)
    return TrainReply(round=request.round, num_examples=report.num_examples, loss=report.loss)


def answer(box: BlackBox, request: LogitsRequest, notes: Notes) -> LogitsReply:
    """Answer a logit query."""
    return LogitsReply(round=request.round, logits=box.logits(request.images))


def answer_compact(box: BlackBox, request: CompactLogitsRequest, notes: Notes) -> LogitsReply:
    """Answer a logit query on images and on copies of them, made here."""
    asked = _asked(box, request)
    logits_BK = box.logits(asked.images_BCHW)
    if request.to_distill:
        notes.asked = {asked.digest: request.base}
    return LogitsReply(round=request.round, logits=logits_BK)


def distill(box: BlackBox, request: DistillRequest, notes: Notes) -> DistillReply:
    """Distil the ensemble's logits."""
    done = _distill(box, request.round, request.images, request.logits, request.temperature)
    return DistillReply(request.round, *done)


def distill_compact(
    box: BlackBox, request: CompactDistillRequest, notes: Notes
) -> DistillReply | ImagesNeeded:
    """Distil the ensemble's logits on images last asked about, or sent as bytes."""
    targets = _Targets(
        request.round, request.digest, request.images, request.logits, request.temperature
    )
    done = _distill_once(box, targets, notes)
    if done is None:
        return ImagesNeeded(round=request.round)
    return DistillReply(request.round, *done)


def take_part(box: BlackBox, request: RoundRequest, notes: Notes) -> RoundReply | ImagesNeeded:
    """Distil earlier targets, train, and answer: a round in one exchange."""
    asked = _asked(box, request)
    targets = _Targets(
        request.targets_round, request.digest, request.images, request.targets, request.temperature
    )
    done = _distill_once(box, targets, notes)
    if done is None:
        return ImagesNeeded(round=request.round)
    report = box.fit(request.round)
    logits_BK = box.logits(asked.images_BCHW)
    if request.to_distill:
        notes.asked = {asked.digest: request.base}
    return RoundReply(
        round=request.round,
        num_examples=report.num_examples,
        train_loss=report.loss,
        distill_loss=done.loss,
        distill_problem=done.problem,
        logits=logits_BK,
    )


def evaluate(box: BlackBox, request: EvaluateRequest, notes: Notes) -> EvaluateReply:
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


class _Asked(NamedTuple):
    """All images of a question, and what its base images are referred to by."""

    images_BCHW: FloatArray
    digest: str


def _asked(box: BlackBox, request: CompactLogitsRequest) -> _Asked:
    """Return what is asked; refuse it before a copy is made, since few bytes may ask for many."""
    num_directions, num_perturbed, _ = request.directions.shape
    copies = num_copies(num_directions, two_sided=request.two_sided)
    num_images = num_queries(len(request.base), num_perturbed, copies)
    if num_perturbed > len(request.base):
        raise ProtocolError(
            "server", "directions", f"for {num_perturbed} of {len(request.base)} images"
        )
    if num_images > box.max_query_images:
        raise ProtocolError(
            "server", "base", f"{num_images} images with copies; at most {box.max_query_images}"
        )
    directions = Directions(request.directions, box.image_shape, request.seed)
    question = Question(from_levels(request.base), directions, request.eps, request.two_sided)
    try:
        return _Asked(question.images_BCHW, question.digest)
    except ValueError as error:
        raise ProtocolError("server", "directions", str(error)) from None


class _Targets(NamedTuple):
    """The ensemble's logits on a round's images, named and, if they were sent, as levels."""

    round: int
    digest: str
    images: ByteArray
    logits_NK: FloatArray
    temperature: float


class _Distilled(NamedTuple):
    """Loss of a distillation, and what went wrong with it, if anything."""

    loss: float = 0.0
    problem: str = ""


def _distill_once(box: BlackBox, targets: _Targets, notes: Notes) -> _Distilled | None:
    """Distil targets unless they have been; return None if their images are not here.

    A server that never got the reply to an exchange sends its targets again. Round 0 has none.
    """
    if targets.round <= notes.distilled:
        return _Distilled()
    images = targets.images if len(targets.images) else notes.asked.get(targets.digest)
    if images is None:
        return None
    images_NCHW = from_levels(images)
    done = _distill(box, targets.round, images_NCHW, targets.logits_NK, targets.temperature)
    notes.distilled = targets.round
    notes.asked = {}
    return done


def _distill(
    box: BlackBox,
    round_: int,
    images_NCHW: FloatArray,
    logits_NK: FloatArray,
    temperature: float,
) -> _Distilled:
    """Distil; if it goes wrong, the model is as it was, and the round goes on without it."""
    if len(images_NCHW) != len(logits_NK):
        raise ProtocolError("server", "logits", f"{len(logits_NK)} rows, {len(images_NCHW)} images")
    # Copies: a black box may hand out the arrays that it then changes.
    before = {name: np.array(value) for name, value in box.state().items()}
    try:
        loss = box.distill(round_, images_NCHW, logits_NK, temperature)
        _check_finite(box.state())
        if not math.isfinite(loss):
            raise DivergenceError(f"its loss is {loss}; lower 'client-distill-lr'")
    except Exception as error:  # noqa: BLE001 - of whatever library the model is
        box.load_state(before)
        lines = str(error).splitlines() or [type(error).__name__]
        return _Distilled(problem=f"it went wrong and the model is as before: {lines[0]}"[:200])
    # In float32 a divergence may come out a little below 0.
    return _Distilled(max(loss, 0.0))


def register_endpoints(app: ClientApp, make_black_box: BlackBoxFactory) -> None:
    """Put FedZGE's endpoints on a ClientApp.

    Parameters
    ----------
    app : ClientApp
        Gets the actions ``query.hello``, ``train.local``, ``query.logits``, ``train.distill``,
        ``train.round`` and ``evaluate.local``; other actions of it are left alone.
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
    act: Callable[[BlackBox, Any, Notes], Reply]
    changes_model: bool = False


_ENDPOINTS = (
    _Endpoint(HelloRequest, hello),
    _Endpoint(TrainRequest, train, changes_model=True),
    _Endpoint(LogitsRequest, answer),
    _Endpoint(CompactLogitsRequest, answer_compact),
    _Endpoint(DistillRequest, distill, changes_model=True),
    _Endpoint(CompactDistillRequest, distill_compact, changes_model=True),
    _Endpoint(RoundRequest, take_part, changes_model=True),
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
        request = decode(
            [choice.request_type for choice in choices],
            message.content,
            sender="server",
            dims={"C": channels, "H": height, "W": width, "K": box.num_classes},
            limits={**dict.fromkeys("BNGQST", most), "P": 4 * channels * height * width},
        )
        endpoint = next(choice for choice in choices if choice.request_type is type(request))
        try:
            _load_private_state(box, context)
            before = _load_notes(context)
            notes = replace(before)
            reply = endpoint.act(box, request, notes)
            if endpoint.changes_model:
                _keep_private_state(box, context)
            _keep_notes(notes, before, context)
        finally:
            box.close()
        return Message(encode(reply), reply_to=message)

    return handle


def _load_notes(context: Context) -> Notes:
    asked = context.state.array_records.get(_ASKED)
    progress = context.state.config_records.get(_PROGRESS)
    return Notes(
        {}
        if asked is None
        else {digest: cast(ByteArray, from_array(array)) for digest, array in asked.items()},
        0 if progress is None else int(cast(int, progress["distilled"])),
    )


def _keep_notes(notes: Notes, before: Notes, context: Context) -> None:
    """Keep what has changed of the notes, after the model that they are about."""
    if notes.asked is not before.asked:
        context.state.pop(_ASKED, None)
        if notes.asked:
            arrays = {digest: to_array(images) for digest, images in notes.asked.items()}
            context.state[_ASKED] = ArrayRecord(arrays)
    if notes.distilled != before.distilled:
        context.state[_PROGRESS] = ConfigRecord({"distilled": notes.distilled})


def _load_private_state(box: BlackBox, context: Context) -> None:
    record = context.state.array_records.get(_STATE)
    if record is not None:
        box.load_state({name: from_array(array) for name, array in record.items()})


def _keep_private_state(box: BlackBox, context: Context) -> None:
    """Keep the model; one that has diverged is thrown away for the one before."""
    state = box.state()
    _check_finite(state)
    context.state[_STATE] = ArrayRecord({key: to_array(value) for key, value in state.items()})


def _check_finite(state: State) -> None:
    for name, value in state.items():
        if np.issubdtype(value.dtype, np.inexact) and not np.isfinite(value).all():
            raise DivergenceError(
                f"the model diverged ('{name}' is not finite) and is kept as it was before; lower "
                "'local-lr' or 'client-distill-lr'"
            )
