"""What a client does for each request: act on the black box, within what its owner allows.

An act knows the contract (`fedzge_flwr.black_boxes.contract`), and not what model is behind it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import numpy as np

from fedzge_flwr.black_boxes.contract import (
    BlackBox,
    EvaluationSplit,
    FitReport,
    LearnsBySettings,
)
from fedzge_flwr.client.account import Work
from fedzge_flwr.client.distilling import check_rows, distill_once, distill_targets, with_images
from fedzge_flwr.client.noise import image_keys
from fedzge_flwr.client.visit import Visit
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import AnswerError, ProtocolError
from fedzge_flwr.common.version import __version__
from fedzge_flwr.config.agreement import differing_bits
from fedzge_flwr.query.copies import Differences, num_copies, num_queries
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question, image_digest
from fedzge_flwr.query.targets import Targets
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


def hello(visit: Visit, request: HelloRequest) -> HelloReply:
    """Say who this client is."""
    profile, box = visit.box.profile(), visit.box
    return HelloReply(
        round=request.round,
        partition=profile.partition,
        num_partitions=profile.num_partitions,
        num_examples=int(profile.num_examples),
        device=profile.device,
        gpu_share=profile.gpu_share,
        version=__version__,
        data=visit.guard.sealed(profile.data, f"{request.experiment}/{profile.partition}"),
        differs=differing_bits(request.settings, box.learns_by())
        if isinstance(box, LearnsBySettings)
        else "",
        epsilon=float(profile.epsilon),
        delta=float(profile.delta),
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
    asked = _asked(visit, request)
    visit.guard.admit(asked.images_BCHW)
    logits_BK = _logits(visit, asked.images_BCHW)
    if request.to_distill:
        visit.asked = {asked.digest: request.base}
    return LogitsReply(round=request.round, query=asked.fingerprint, logits=logits_BK)


def distill(visit: Visit, request: DistillRequest) -> DistillReply:
    """Distill the ensemble's logits."""
    targets = Targets(request.round, "", request.images, request.logits, request.temperature)
    check_rows(targets, "logits")
    done = distill_targets(targets, visit)
    return DistillReply(round=request.round, loss=done.loss, problem=done.problem)


def distill_compact(visit: Visit, request: CompactDistillRequest) -> DistillReply | ImagesNeeded:
    """Distill the ensemble's logits on images last asked about, or sent as levels."""
    targets = with_images(
        Targets(request.round, request.digest, request.images, request.logits, request.temperature),
        visit,
        "logits",
    )
    if targets is None:
        return ImagesNeeded(round=request.round)
    done = distill_once(targets, visit)
    return DistillReply(round=request.round, loss=done.loss, problem=done.problem)


def take_part(visit: Visit, request: RoundRequest) -> RoundReply | ImagesNeeded:
    """Distill earlier targets, train, and answer: a round in one exchange."""
    asked = _asked(visit, request)
    targets = with_images(
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
    done = distill_once(targets, visit)
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
    split = cast(EvaluationSplit, request.split)
    visit.guard.allow_evaluation(split)
    num_logits = request.num_logits if split == "test" else 0
    visit.guard.weigh_evaluation(num_logits)
    outcome = visit.box.evaluate(split)
    if num_logits and len(outcome.logits_NK) == 0:
        raise AnswerError(
            f"{type(visit.box).__name__} has no common test set: give it one (`evaluation`, or "
            "files in 'data-dir'), or set 'client-evaluation' to 'held-out' or 'off'"
        )
    if num_logits and len(outcome.logits_NK) != num_logits:
        raise AnswerError(
            f"the test set has {len(outcome.logits_NK)} images here and {num_logits} at the "
            "server; give both the same 'num-test-images' and files"
        )
    logits_NK = _checked(visit.box, "evaluate", outcome.logits_NK[:num_logits], num_logits)
    visit.guard.count_evaluation(max(int(outcome.num_examples), num_logits))

    def keys() -> list[bytes]:
        if outcome.images_NCHW is None:
            return [b"row %d" % row for row in range(num_logits)]
        return image_keys(outcome.images_NCHW[:num_logits])

    return EvaluateReply(
        round=request.round,
        num_examples=int(outcome.num_examples),
        loss=float(outcome.loss),
        accuracy=float(outcome.accuracy),
        logits=visit.guard.perturbed(logits_NK, keys, visit.digest),
    )


def _fit(visit: Visit, request: TrainRequest | RoundRequest) -> FitReport:
    """Train for this round, and before it for those that are owed, unless that is over.

    A model in another state than the server knows has trained since, in an exchange whose reply
    was lost.
    """
    owed = request.owed if visit.in_step else 0
    wanted = request.round - max(request.round - owed, 1) + 1
    if visit.box.local_rounds > 0:
        wanted = min(wanted, max(visit.box.local_rounds - visit.progress.trained, 0))
    # Counted, and on disk, before the work: going back behind it does not undo that.
    counted = visit.store.work() if visit.guard.limits_training else nullcontext(Work())
    with counted as work:
        allowed = visit.guard.trainings(work, wanted)
    report = FitReport(num_examples=0, loss=0.0)
    first = max(request.round - owed, 1)
    for round_ in range(first + wanted - allowed, first + wanted):
        visit.change()
        report = visit.box.fit(round_)
        visit.note(trained=visit.progress.trained + 1)
    return report


def _logits(visit: Visit, images_BCHW: FloatArray) -> FloatArray:
    found_BK = _checked(visit.box, "logits", visit.box.logits(images_BCHW), len(images_BCHW))
    return visit.guard.perturbed(found_BK, lambda: image_keys(images_BCHW), visit.digest)


def _checked(box: BlackBox, method: str, logits_NK: Any, num_images: int) -> FloatArray:
    """Return a black box's logits as float32, of whatever type they were."""
    found_NK: FloatArray = np.asarray(logits_NK, dtype=np.float32)
    wanted = (num_images, box.num_classes)
    if found_NK.shape != wanted:
        raise AnswerError(
            f"{type(box).__name__}.{method} returned logits of shape {found_NK.shape} for "
            f"{num_images} images and {box.num_classes} classes: return {wanted}"
        )
    return found_NK


class _Asked(NamedTuple):
    """All images of a question, its fingerprint, and what its base images are referred to by."""

    images_BCHW: FloatArray
    digest: str
    fingerprint: str


def _asked(visit: Visit, request: CompactLogitsRequest) -> _Asked:
    """Return what is asked; refuse it before a copy is made, since few bytes may ask for many."""
    box = visit.box
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
    visit.guard.weigh(num_images)
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
