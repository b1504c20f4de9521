"""Distilling what a server sends, unless it goes wrong or costs the client too much."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fedzge_flwr.client.failures import note, told
from fedzge_flwr.client.own_accuracy import NOT_MEASURED, own_accuracy, too_costly
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


def distill_targets(targets: Targets, visit: Visit) -> Distilled:
    """Distill; if it goes wrong or costs too much, the model is as it was, and the round goes on.

    What it cost is told to nobody but the node's own log.
    """
    if not visit.guard.allows_distillation:
        return Distilled(problem="the client's owner does not allow it ('allow-distillation')")
    box, most = visit.box, visit.guard.max_accuracy_loss
    visit.change()
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
    except (Exception, SystemExit) as error:  # noqa: BLE001 - of whatever library the model is
        box.load_state(before)
        who = type(box).__name__
        note(error, who, f"round {targets.round}: distillation")
        line = f"it went wrong and the model is as before: {told(error, who)}"
        return Distilled(problem=line[:MAX_STRING])
    best = max(visit.progress.best, had.share)
    visit.note(best=best)
    if too_costly(best, had, has, most):
        box.load_state(before)
        LOGGER.warning(
            "round %d: distillation was undone: of %d own images it had %.0f right where the best "
            "is %.0f ('max-accuracy-loss')",
            targets.round,
            has.images,
            has.right,
            best * has.images,
        )
        return Distilled(problem=_TOO_COSTLY)
    # In float32 a divergence may come out a little below 0.
    return Distilled(max(loss, 0.0))
