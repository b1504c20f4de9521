"""What a client does for each request: act on the black box, within what its owner allows.

An act knows the contract (`fedzge_flwr.black_boxes.contract`), and not what model is behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np

from fedzge_flwr.black_boxes.contract import BlackBox, EvaluationSplit, FitReport, State
from fedzge_flwr.client.guard import Guard
from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.common.errors import DataError, DivergenceError, ProtocolError
from fedzge_flwr.common.text import printable
from fedzge_flwr.common.version import __version__
from fedzge_flwr.query.copies import Differences, num_copies, num_queries
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question, image_digest
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.wire.codec import MAX_STRING
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
    RoundReply,
    RoundRequest,
    TrainReply,
    TrainRequest,
)


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
    """Answer a logit query on images and on copies of them, made here.

    For a server that asks more than once a round; FedZGE's rounds ask by `take_part`.
    """
    asked = _asked(visit.box, request)
    visit.guard.admit(asked.images_BCHW)
    logits_BK = _logits(visit, asked.images_BCHW)
    if request.to_distill:
        visit.asked = {asked.digest: request.base}
    return LogitsReply(round=request.round, query=asked.fingerprint, logits=logits_BK)


def distill(visit: Visit, request: DistillRequest) -> DistillReply:
    """Distill the ensemble's logits."""
    targets = Targets(request.round, "", request.images, request.logits, request.temperature)
    _check_rows(targets, "logits")
    done = _distill(targets, visit)
    return DistillReply(round=request.round, loss=done.loss, problem=done.problem)


def distill_compact(visit: Visit, request: CompactDistillRequest) -> DistillReply | ImagesNeeded:
    """Distill the ensemble's logits on images last asked about, or sent as levels."""
    targets = _with_images(
        Targets(request.round, request.digest, request.images, request.logits, request.temperature),
        visit,
        "logits",
    )
    if targets is None:
        return ImagesNeeded(round=request.round)
    done = _distill_once(targets, visit)
    return DistillReply(round=request.round, loss=done.loss, problem=done.problem)


def take_part(visit: Visit, request: RoundRequest) -> RoundReply | ImagesNeeded:
    """Distill earlier targets, train, and answer: a round in one exchange."""
    asked = _asked(visit.box, request)
    targets = _with_images(
        Targets(
            request.targets_round,
            request.digest,
            request.images,
            request.targets,
            request.temperature,
        ),
        visit,
        "targets",
    )
    if targets is None:
        return ImagesNeeded(round=request.round)
    # Before the work, and after what would have the same question asked again.
    visit.guard.admit(asked.images_BCHW)
    done = _distill_once(targets, visit)
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
    # The codec has checked the choice.
    differences = cast(Differences, request.differences)
    copies = num_copies(num_directions, differences)
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
    question = Question(request.base, directions, request.eps, differences)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            images_BCHW = question.images_BCHW
    except ValueError as error:
        raise ProtocolError("server", "directions", str(error)) from None
    if not np.isfinite(images_BCHW).all():
        raise ProtocolError("server", "eps", f"{request.eps:g} makes copies that are not finite")
    return _Asked(images_BCHW, question.digest, question.fingerprint)


class _Distilled(NamedTuple):
    """Loss of a distillation, and what went wrong with it, if anything."""

    loss: float = 0.0
    problem: str = ""


def _with_images(targets: Targets, visit: Visit, field: str) -> Targets | None:
    """Return targets with the images that they name; None if these are not here.

    Targets that have been distilled need none: a server that never got the reply to an exchange
    sends its targets again. Round 0 has none. ``field`` holds the targets in the request.
    """
    if targets.round <= visit.distilled:
        return targets
    if not len(targets.images):
        kept = visit.asked.get(targets.digest)
        if kept is None:
            return None
        targets = replace(targets, images=kept)
    _check_rows(targets, field)
    return targets


def _check_rows(targets: Targets, field: str) -> None:
    rows, num_images = len(targets.logits_NK), len(targets.images)
    if rows != num_images:
        raise ProtocolError("server", field, f"{rows} rows, {num_images} images")


def _distill_once(targets: Targets, visit: Visit) -> _Distilled:
    """Distill targets unless they have been."""
    if targets.round <= visit.distilled:
        return _Distilled()
    done = _distill(targets, visit)
    visit.distilled = targets.round
    visit.asked = {}
    return done


def _distill(targets: Targets, visit: Visit) -> _Distilled:
    """Distill; if it goes wrong, the model is as it was, and the round goes on without it."""
    box = visit.box
    visit.changed = True
    # Copies: a black box may hand out the arrays that it then changes.
    before = {name: np.array(value) for name, value in box.state().items()}
    try:
        loss = float(
            box.distill(targets.round, targets.images_NCHW, targets.logits_NK, targets.temperature)
        )
        check_finite(box.state())
        if not math.isfinite(loss):
            raise DivergenceError(f"its loss is {loss}; lower 'client-distill-lr'")
    except Exception as error:  # noqa: BLE001 - of whatever library the model is
        box.load_state(before)
        lines = str(error).splitlines() or [type(error).__name__]
        told = printable(lines[0], MAX_STRING - 50)
        return _Distilled(problem=f"it went wrong and the model is as before: {told}")
    # In float32 a divergence may come out a little below 0.
    return _Distilled(max(loss, 0.0))


def check_finite(state: State) -> None:
    """Check that a model has not diverged.

    Raises
    ------
    DivergenceError
        If a number of its state is not finite.
    """
    for name, value in state.items():
        if np.issubdtype(value.dtype, np.inexact) and not np.isfinite(value).all():
            raise DivergenceError(
                f"the model diverged ('{name}' is not finite) and is kept as it was before; lower "
                "'local-lr' or 'client-distill-lr'"
            )
