"""What may be wrong with parts from outside the package, said by name and before it spreads.

Generator, central model and estimator are whoever's the strategy was given; unchecked, a wrong one
fails much later, as somebody else's fault.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedzge_flwr.common.errors import ConfigError, DivergenceError
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.outputs import check_aside, check_model, logits_of, some_images
from fedzge_flwr.learning.tensors import device_of, load_plain, to_numpy
from fedzge_flwr.query.copies import copies_asked
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.doubts import is_distribution
from fedzge_flwr.server.state import ServerState
from fedzge_flwr.zeroth_order.base import Estimate

LOGGER = logging.getLogger("flwr.fedzge")

_FEW = 4
_MOST_BYTES = 64_000_000
"""Of a round's images to a client: seconds on a usual line, and no burden to a SuperLink."""
_SLACK = 1e-3
"""What rounding may put a generated image beyond the pixel range."""


def notice_of_size(settings: Settings) -> str:
    """Return what to know of a round's images that are many bytes, with the fix; empty: nothing.

    A pixel of a channel is a byte on the wire, and four while a client answers.
    """
    pixels = math.prod(settings.data.spec.image_shape)
    number = settings.images.synthetic_batch_size
    if number * pixels <= _MOST_BYTES:
        return ""
    fewer = max(_MOST_BYTES // pixels, 2)
    return (
        f"each client gets {number * pixels / 1e6:,.0f} MB of images a round: 'synthetic-batch-"
        f"size' = {number} of {'×'.join(map(str, settings.data.spec.image_shape))}; "
        f"{fewer} are {fewer * pixels / 1e6:,.0f} MB, and take {number / fewer:.0f} times as many "
        "rounds for as many queries"
    )


def load_central(server: ServerState, state: Mapping[str, Tensor]) -> None:
    """Load the central model's initial state, and check that the model does what it should.

    Raises
    ------
    ConfigError
        If the state is of another model, or this is no classifier of images (N, C, H, W), in
        evaluation and in training mode.
    """
    spec, central = server.settings.data.spec, server.central
    try:
        load_plain(central, state)
    except RuntimeError as error:
        raise ConfigError(
            "initial_arrays are not a state of this central model: give those of its state_dict()"
        ) from error
    with check_aside(central) as model:
        check_model(model, spec.image_shape, spec.num_classes, "the central model")
        model.eval()
        x_NCHW = some_images(_FEW, spec.image_shape, device_of(model))
        with torch.no_grad():
            found_NK = to_numpy(logits_of(model(x_NCHW)))
    if is_distribution(found_NK):
        LOGGER.warning(
            "the central model returns probabilities, and is taught as if they were logits: leave "
            "out its softmax"
        )


def check_central(server: ServerState, round_: int) -> None:
    """Check that the central model has not diverged.

    Raises
    ------
    DivergenceError
        If it has.
    """
    if not all(torch.isfinite(tensor).all() for tensor in server.central.state_dict().values()):
        raise DivergenceError(
            f"round {round_}: the central model diverged (its parameters are not finite); "
            "lower 'central-lr'"
        )


def check_generated(server: ServerState, x_NCHW: object, num_images: int) -> None:
    """Check that the generator made images.

    Raises
    ------
    ConfigError
        If it returned anything but images with a graph behind them, in the pixel range.
    DivergenceError
        If they are not finite.
    """
    wanted = (num_images, *server.settings.data.spec.image_shape)
    if not isinstance(x_NCHW, Tensor) or _shape(x_NCHW) != wanted:
        raise ConfigError(
            f"the generator returned {_shape(x_NCHW)} for {num_images} images: return {wanted}"
        )
    if not x_NCHW.requires_grad:
        raise ConfigError("the generator's images have no graph behind them: it cannot be trained")
    low, high = (float(value) for value in x_NCHW.detach().aminmax())
    if not math.isfinite(low + high):
        raise DivergenceError("the generator's images are not finite; lower 'generator-lr'")
    if low < PIXEL_RANGE.low - _SLACK or high > PIXEL_RANGE.high + _SLACK:
        raise ConfigError(
            f"the generator's images go from {low:g} to {high:g}: end it in a tanh, for the pixel "
            f"range [{PIXEL_RANGE.low:g}, {PIXEL_RANGE.high:g}]"
        )


def check_question(server: ServerState, question: Question, x_NCHW: Tensor) -> None:
    """Check that the estimator asks what clients expect.

    Raises
    ------
    ConfigError
        If it asks nothing, about other images, or about another number of copies of each.
    """
    queries = server.settings.queries
    if not isinstance(question, Question) or not isinstance(question.base, np.ndarray):
        raise ConfigError(
            f"estimator '{queries.estimator}' must return a Question whose images are a NumPy "
            "array: x.cpu().numpy()"
        )
    if not np.array_equal(question.base_NCHW, x_NCHW.cpu().numpy()):
        raise ConfigError(
            f"estimator '{queries.estimator}' must ask about the very images that it is given"
        )
    expected = copies_asked(queries.estimator, queries.q, queries.differences)
    if question.copies != expected:
        raise ConfigError(
            f"estimator '{queries.estimator}' asks about {question.copies} copies of an image, and "
            f"clients expect {expected}: say so in COPIES['{queries.estimator}'], on both sides"
        )


def check_estimate(server: ServerState, estimate: Estimate, x_NCHW: Tensor, round_: int) -> None:
    """Check that the estimate is a gradient of the images.

    Raises
    ------
    ConfigError
        If it has another shape.
    DivergenceError
        If it is not finite.
    """
    settings, gradient_NCHW = server.settings, estimate.gradient_NCHW
    if gradient_NCHW.shape != x_NCHW.shape:
        raise ConfigError(
            f"estimator '{settings.queries.estimator}' returned a gradient of shape "
            f"{_shape(gradient_NCHW)} for images of shape {_shape(x_NCHW)}"
        )
    if not torch.isfinite(gradient_NCHW).all():
        raise DivergenceError(
            f"round {round_}: the generator's gradient is not finite, as estimator "
            f"'{settings.queries.estimator}' has it of objective '{settings.images.objective}'; "
            "lower 'generator-lr'"
        )


def _shape(value: object) -> tuple[int, ...] | str:
    """Return a tensor's shape, or what it is instead of one."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
