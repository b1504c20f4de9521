"""The endpoints of a client: decode, load the private model, act, keep it, answer.

`register_endpoints` puts them on any ``ClientApp``, given a factory of black boxes. The model stays
here between messages (`fedzge_flwr.client.store`) and leaves in no reply; a handler that finds none
starts from the black box's initial one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedzge_flwr.black_boxes.contract import BlackBox, EvaluationSplit, FitReport, State
from fedzge_flwr.client.guard import Guard
from fedzge_flwr.client.store import StateStore, open_store
from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.common.errors import (
    BlackBoxError,
    DataError,
    DivergenceError,
    FedZGEError,
    ProtocolError,
    RefusedError,
)
from fedzge_flwr.common.text import printable
from fedzge_flwr.common.version import __version__
from fedzge_flwr.config.owner import owner_settings
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question, from_levels, image_digest, num_copies, num_queries
from fedzge_flwr.wire.codec import MAX_STRING, decode, encode
from fedzge_flwr.wire.messages import (
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
    Refused,
    Reply,
    Request,
    RoundReply,
    RoundRequest,
    TrainReply,
    TrainRequest,
)

BlackBoxFactory: TypeAlias = Callable[[Context], BlackBox]


@dataclass
class Visit:
    """What an endpoint works with while it answers one message.

    Parameters
    ----------
    box : BlackBox
        The model.
    guard : Guard
        What the owner allows.
    asked : dict[str, ndarray of uint8]
        The images last asked about, as levels, by digest; only if they may be distilled.
    distilled : int
        The newest round whose targets the model has distilled; 0: none.
    trained : int
        In how many rounds the model has been trained on the client's own data.
    in_step : bool
        Whether the model is in the state that the server goes on from.
    changed : bool
        Whether the model has been trained or has distilled in this message.
    """

    box: BlackBox
    guard: Guard
    asked: dict[str, ByteArray]
    distilled: int
    trained: int
    in_step: bool
    changed: bool = False


def hello(visit: Visit, request: HelloRequest) -> HelloReply:
    """Say who this client is."""
    profile = visit.box.profile()
    return HelloReply(
        round=request.round,
        partition=profile.partition,
        num_partitions=profile.num_partitions,
        num_examples=int(profile.num_examples),
        device=profile.device,
        gpu_share=profile.gpu_share,
        version=__version__,
    )


def train(visit: Visit, request: TrainRequest) -> TrainReply:
    """Train on the client's own data."""
    report = _fit(visit, request)
    return TrainReply(
        round=request.round, num_examples=int(report.num_examples), loss=float(report.loss)
    )


def answer(visit: Visit, request: LogitsRequest) -> LogitsReply:
    """Answer a logit query."""
    visit.guard.admit(request.images)
    query = image_digest(request.images)
    return LogitsReply(round=request.round, query=query, logits=_logits(visit, request.images))


def answer_compact(visit: Visit, request: CompactLogitsRequest) -> LogitsReply:
    """Answer a logit query on images and on copies of them, made here."""
    asked = _asked(visit.box, request)
    visit.guard.admit(asked.images_BCHW)
    logits_BK = _logits(visit, asked.images_BCHW)
    if request.to_distill:
        visit.asked = {asked.digest: request.base}
    return LogitsReply(round=request.round, query=asked.fingerprint, logits=logits_BK)


def distill(visit: Visit, request: DistillRequest) -> DistillReply:
    """Distil the ensemble's logits."""
    _check_rows(request.images, request.logits, "logits")
    done = _distill(visit, request.round, request.images, request.logits, request.temperature)
    return DistillReply(round=request.round, loss=done.loss, problem=done.problem)


def distill_compact(visit: Visit, request: CompactDistillRequest) -> DistillReply | ImagesNeeded:
    """Distil the ensemble's logits on images last asked about, or sent as bytes."""
    targets = _Targets(
        request.round, request.digest, request.images, request.logits, request.temperature
    )
    images = _images_of(targets, visit)
    if images is None:
        return ImagesNeeded(round=request.round)
    done = _distill_once(targets, images, visit)
    return DistillReply(round=request.round, loss=done.loss, problem=done.problem)


def take_part(visit: Visit, request: RoundRequest) -> RoundReply | ImagesNeeded:
    """Distil earlier targets, train, and answer: a round in one exchange."""
    asked = _asked(visit.box, request)
    targets = _Targets(
        request.targets_round, request.digest, request.images, request.targets, request.temperature
    )
    images = _images_of(targets, visit, "targets")
    if images is None:
        return ImagesNeeded(round=request.round)
    # Before the work, and after what would have the same question asked again.
    visit.guard.admit(asked.images_BCHW)
    done = _distill_once(targets, images, visit)
    report = _fit(visit, request)
    logits_BK = _logits(visit, asked.images_BCHW)
    if request.to_distill:
        visit.asked = {asked.digest: request.base}
    return RoundReply(
        round=request.round,
        num_examples=int(report.num_examples),
        train_loss=float(report.loss),
        distill_loss=done.loss,
        distill_problem=done.problem,
        query=asked.fingerprint,
        logits=logits_BK,
    )


def evaluate(visit: Visit, request: EvaluateRequest) -> EvaluateReply:
    """Evaluate the model."""
    # The codec has checked the choice.
    outcome = visit.box.evaluate(cast(EvaluationSplit, request.split))
    num_logits = request.num_logits if request.split == "test" else 0
    if num_logits and len(outcome.logits_NK) == 0:
        raise DataError(
            f"{type(visit.box).__name__} has no common test set: give it one (`evaluation`, or "
            "files in 'data-dir'), or set 'client-evaluation' to 'held-out' or 'off'"
        )
    if num_logits and len(outcome.logits_NK) != num_logits:
        raise DataError(
            f"the test set has {len(outcome.logits_NK)} images here and {num_logits} at the "
            "server; give both the same 'num-test-images' and files"
        )
    logits_NK = _checked(visit.box, "evaluate", outcome.logits_NK[:num_logits], num_logits)
    return EvaluateReply(
        round=request.round,
        num_examples=int(outcome.num_examples),
        loss=float(outcome.loss),
        accuracy=float(outcome.accuracy),
        logits=visit.guard.perturbed(logits_NK),
    )


def _fit(visit: Visit, request: TrainRequest | RoundRequest) -> FitReport:
    """Train for this round, and before it for those that are owed, unless that is over.

    A model in another state than the server knows has trained since, in an exchange whose reply
    was lost.
    """
    owed = request.owed if visit.in_step else 0
    report = FitReport(num_examples=0, loss=0.0)
    for round_ in range(max(request.round - owed, 1), request.round + 1):
        if 0 < visit.box.local_rounds <= visit.trained:
            break
        report = visit.box.fit(round_)
        visit.trained += 1
        visit.changed = True
    return report


def _logits(visit: Visit, images_BCHW: FloatArray) -> FloatArray:
    found_BK = visit.box.logits(images_BCHW)
    return visit.guard.perturbed(_checked(visit.box, "logits", found_BK, len(images_BCHW)))


def _checked(box: BlackBox, method: str, logits_NK: Any, num_images: int) -> FloatArray:
    """Return a black box's logits as float32, of whatever type they were."""
    found_NK: FloatArray = np.asarray(logits_NK, dtype=np.float32)
    wanted = (num_images, box.num_classes)
    if found_NK.shape != wanted:
        raise DataError(
            f"{type(box).__name__}.{method} returned logits of shape {found_NK.shape} for "
            f"{num_images} images and {box.num_classes} classes: return {wanted}"
        )
    return found_NK


class _Asked(NamedTuple):
    """All images of a question, its fingerprint, and what its base images are referred to by."""

    images_BCHW: FloatArray
    digest: str
    fingerprint: str


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
            "server",
            "base",
            f"{num_images} images with copies; at most {box.max_query_images} here (the black "
            "box's max_query_images)",
        )
    directions = Directions(request.directions, box.image_shape, request.seed)
    question = Question(from_levels(request.base), directions, request.eps, request.two_sided)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            images_BCHW = question.images_BCHW
    except ValueError as error:
        raise ProtocolError("server", "directions", str(error)) from None
    if not np.isfinite(images_BCHW).all():
        raise ProtocolError("server", "eps", f"{request.eps:g} makes copies that are not finite")
    return _Asked(images_BCHW, question.digest, question.fingerprint)


class _Targets(NamedTuple):
    """The ensemble's logits on a round's images, named and, if they were sent, as levels."""

    round: int
    digest: str
    images: ByteArray
    logits_NK: FloatArray
    temperature: float


def _check_rows(images: Sized, logits_NK: FloatArray, field: str) -> None:
    if len(images) != len(logits_NK):
        raise ProtocolError("server", field, f"{len(logits_NK)} rows, {len(images)} images")


class _Distilled(NamedTuple):
    """Loss of a distillation, and what went wrong with it, if anything."""

    loss: float = 0.0
    problem: str = ""


def _images_of(targets: _Targets, visit: Visit, field: str = "logits") -> ByteArray | None:
    """Return the images of targets that are still to be distilled; None if they are not here.

    A server that never got the reply to an exchange sends its targets again. Round 0 has none.
    ``field`` holds the targets in the request.
    """
    if targets.round <= visit.distilled:
        return targets.images
    images = targets.images if len(targets.images) else visit.asked.get(targets.digest)
    if images is not None:
        _check_rows(images, targets.logits_NK, field)
    return images


def _distill_once(targets: _Targets, images: ByteArray, visit: Visit) -> _Distilled:
    """Distil targets unless they have been."""
    if targets.round <= visit.distilled:
        return _Distilled()
    images_NCHW = from_levels(images)
    done = _distill(visit, targets.round, images_NCHW, targets.logits_NK, targets.temperature)
    visit.distilled = targets.round
    visit.asked = {}
    return done


def _distill(
    visit: Visit,
    round_: int,
    images_NCHW: FloatArray,
    logits_NK: FloatArray,
    temperature: float,
) -> _Distilled:
    """Distil; if it goes wrong, the model is as it was, and the round goes on without it."""
    box = visit.box
    visit.changed = True
    # Copies: a black box may hand out the arrays that it then changes.
    before = {name: np.array(value) for name, value in box.state().items()}
    try:
        loss = float(box.distill(round_, images_NCHW, logits_NK, temperature))
        _check_finite(box.state())
        if not math.isfinite(loss):
            raise DivergenceError(f"its loss is {loss}; lower 'client-distill-lr'")
    except Exception as error:  # noqa: BLE001 - of whatever library the model is
        box.load_state(before)
        lines = str(error).splitlines() or [type(error).__name__]
        told = printable(lines[0], MAX_STRING - 50)
        return _Distilled(problem=f"it went wrong and the model is as before: {told}")
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
    """A type of request, and what answers it."""

    request_type: type[Request]
    act: Callable[[Visit, Any], Reply]


_ENDPOINTS = (
    _Endpoint(HelloRequest, hello),
    _Endpoint(TrainRequest, train),
    _Endpoint(LogitsRequest, answer),
    _Endpoint(CompactLogitsRequest, answer_compact),
    _Endpoint(DistillRequest, distill),
    _Endpoint(CompactDistillRequest, distill_compact),
    _Endpoint(RoundRequest, take_part),
    _Endpoint(EvaluateRequest, evaluate),
)


def _handler(
    choices: Sequence[_Endpoint], make_black_box: BlackBoxFactory
) -> Callable[[Message, Context], Message]:
    """Return the handler of an action that takes requests of some types."""

    def handle(message: Message, context: Context) -> Message:
        with _named("the factory of black boxes"):
            box = make_black_box(context)
        try:
            with _named(type(box).__name__):
                request = _decoded(box, choices, message)
                endpoint = next(one for one in choices if one.request_type is type(request))
                reply: Reply
                try:
                    reply = _visit(box, endpoint, request, context)
                except RefusedError as error:
                    reply = Refused(round=request.round, reason=str(error)[:MAX_STRING])
        finally:
            box.close()
        return Message(encode(reply), reply_to=message)

    return handle


@contextmanager
def _named(who: str) -> Iterator[None]:
    """Have errors of the owner's own code say where they come from: the server sees the text alone.

    What a ``KeyError`` says of itself is the key.
    """
    try:
        yield
    except FedZGEError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        told = printable(f"{type(error).__name__}: {lines[0]}".removesuffix(": "), MAX_STRING - 50)
        raise BlackBoxError(f"{who} failed: {told}") from error


def _decoded(box: BlackBox, choices: Sequence[_Endpoint], message: Message) -> Request:
    channels, height, width = box.image_shape
    most = box.max_query_images
    return decode(
        [choice.request_type for choice in choices],
        message.content,
        sender="server",
        dims={"C": channels, "H": height, "W": width, "K": box.num_classes},
        limits={**dict.fromkeys("BNGQST", most), "P": 4 * channels * height * width},
    )


def _visit(box: BlackBox, endpoint: _Endpoint, request: Request, context: Context) -> Reply:
    """Go on from the state that the server knows, answer, and keep what has become of it."""
    owner = owner_settings(context.node_config)
    client = context.node_config.get("partition-id", "")
    store = open_store(context.state, owner.state_dir, client, request.experiment)
    before = store.load(request.state)
    if before.model is not None:
        box.load_state(before.model)
    asked = store.load_asked()
    in_step = before.name == request.state
    visit = Visit(
        box, Guard(owner, store), asked, before.distilled, before.trained, in_step=in_step
    )
    reply = endpoint.act(visit, request)
    state = before.name
    if visit.changed:
        state = _keep(store, visit)
    if visit.asked is not asked:
        store.keep_asked(visit.asked)
    store.forget_before(request.durable)
    return replace(reply, began=before.name, state=state)


def _keep(store: StateStore, visit: Visit) -> str:
    """Keep the model; one that has diverged is thrown away for the one before."""
    state = visit.box.state()
    _check_finite(state)
    return store.keep(state, distilled=visit.distilled, trained=visit.trained)


def _check_finite(state: State) -> None:
    for name, value in state.items():
        if np.issubdtype(value.dtype, np.inexact) and not np.isfinite(value).all():
            raise DivergenceError(
                f"the model diverged ('{name}' is not finite) and is kept as it was before; lower "
                "'local-lr' or 'client-distill-lr'"
            )
