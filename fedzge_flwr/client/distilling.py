"""Distilling what a server sends, unless it goes wrong or costs the client too much."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedzge_flwr.black_boxes.contract import BlackBox
from fedzge_flwr.client.failures import note, told
from fedzge_flwr.client.own_accuracy import (
    NOT_MEASURED,
    OwnAccuracy,
    own_accuracy,
    too_costly,
)
from fedzge_flwr.client.visit import Visit, check_finite
from fedzge_flwr.common.errors import DivergenceError, ProtocolError
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.wire.codec import MAX_STRING

LOGGER = logging.getLogger("flwr.fedzge")

_TOO_COSTLY = (
    "it cost more accuracy on own images than the client's owner allows ('max-accuracy-loss'), and "
    "the model is as before"
)


class Distilled(NamedTuple):
    """Loss of a distillation, and what went wrong with it, if anything."""

    loss: float = 0.0
    problem: str = ""


def with_images(targets: Targets, visit: Visit, field: str) -> Targets | None:
    """Return targets with the images that they name; None if these are not here.

    Targets that have been distilled need none: a server that never got the reply to an exchange
    sends its targets again. Nor do those that the owner does not allow. Round 0 has none. ``field``
    holds the targets in the request.
    """
    if targets.round <= visit.progress.distilled or not visit.guard.allows_distillation:
        return targets
    if not len(targets.images):
        kept = visit.asked.get(targets.digest)
        if kept is None:
            return None
        targets = replace(targets, images=kept)
    check_rows(targets, field)
    return targets


def check_rows(targets: Targets, field: str) -> None:
    """Check that there is a row of logits for each image.

    Raises
    ------
    ProtocolError
        If not.
    """
    rows, num_images = len(targets.logits_NK), len(targets.images)
    if rows != num_images:
        raise ProtocolError("server", field, f"{rows} rows, {num_images} images")


def distill_once(targets: Targets, visit: Visit) -> Distilled:
    """Distill targets unless they have been."""
    if targets.round <= visit.progress.distilled:
        return Distilled()
    done = distill_targets(targets, visit)
    visit.note(distilled=targets.round)
    visit.asked = {}
    return done


class Outcome(NamedTuple):
    """What a distillation that went well has come to.

    Parameters
    ----------
    loss : float
        Its loss, at least 0.
    best : float
        The best share of own images that the model has had right before a distillation.
    has : OwnAccuracy
        What it has right after it.
    undone : bool
        Whether the model is as before, since it cost more than its owner allows.
    """

    loss: float
    best: float
    has: OwnAccuracy
    undone: bool


def distill_within(box: BlackBox, targets: Targets, best: float, most: float) -> Outcome:
    """Distill, and undo what costs more than ``most`` of what own images had right at ``best``.

    Own images are not looked at where ``most`` is 1.

    Raises
    ------
    Exception
        What the black box raises. The model is as it was before then.
    DivergenceError
        If its state or loss is not finite.
    """
    # Copies: a black box may hand out the arrays that it then changes.
    before = {name: np.array(value) for name, value in box.state().items()}
    try:
        had = own_accuracy(box) if most < 1 else NOT_MEASURED
        loss = float(
            box.distill(targets.round, targets.images_NCHW, targets.logits_NK, targets.temperature)
        )
        check_finite(box.state())
        if not math.isfinite(loss):
            raise DivergenceError(f"its loss is {loss}; lower 'client-distill-lr'")
        has = own_accuracy(box) if most < 1 else NOT_MEASURED
    except (Exception, SystemExit):
        box.load_state(before)
        raise
    best = max(best, had.share)
    undone = too_costly(best, had, has, most)
    if undone:
        box.load_state(before)
    # In float32 a divergence may come out a little below 0.
    return Outcome(max(loss, 0.0), best, has, undone)


def distill_targets(targets: Targets, visit: Visit) -> Distilled:
    """Distill; if it goes wrong or costs too much, the model is as it was, and the round goes on.

    What it cost is told to nobody but the node's own log.
    """
    if not visit.guard.allows_distillation:
        return Distilled(problem="the client's owner does not allow it ('allow-distillation')")
    box = visit.box
    visit.change()
    try:
        done = distill_within(box, targets, visit.progress.best, visit.guard.max_accuracy_loss)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - of whatever library the model is
        who = type(box).__name__
        note(error, who, f"round {targets.round}: distillation")
        line = f"it went wrong and the model is as before: {told(error, who)}"
        return Distilled(problem=line[:MAX_STRING])
    visit.note(best=done.best)
    if done.undone:
        LOGGER.warning(
            "round %d: distillation was undone: of %d own images it had %.0f right where the best "
            "is %.0f ('max-accuracy-loss')",
            targets.round,
            done.has.images,
            done.has.right,
            done.best * done.has.images,
        )
        return Distilled(problem=_TOO_COSTLY)
    return Distilled(done.loss)
