"""What a classifier returns: logits, or an object that has them as ``logits``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedzge_flwr.common.errors import ConfigError, OutputError
from fedzge_flwr.common.text import error_line
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.tensors import device_of, state_arrays, unwrapped

_FEW = 2
_WANTED = "logits (N, K), or an object or a dict that has them as 'logits'"


def logits_of(found: object) -> Tensor:
    """Return the logits of what a model returned, in float32.

    Parameters
    ----------
    found : object
        Logits (N, K), or an object or mapping that has them as ``logits``, as the models of Hugging
        Face return it, and torchvision's in training mode that have heads besides.

    Raises
    ------
    OutputError
        If it is anything else.
    """
    logits = found
    if isinstance(found, Mapping):
        logits = found.get("logits")
    elif not isinstance(found, Tensor):
        logits = getattr(found, "logits", None)
    if not isinstance(logits, Tensor):
        raise OutputError(f"the model returns {_described(found)}: return {_WANTED}")
    if not logits.is_floating_point():
        raise OutputError(f"the model returns {logits.dtype}: return {_WANTED}, before any argmax")
    return logits.float()


def check_model(
    model: nn.Module, image_shape: tuple[int, int, int], num_classes: int, who: str = "the model"
) -> None:
    """Check, in evaluation and in training mode, that a model is a classifier that can be trained.

    Parameters
    ----------
    model : nn.Module
        It is changed, as training mode changes running statistics: give a copy.
    image_shape, num_classes
        (C, H, W), and the number of logits K.
    who : str
        What the error calls it.

    Raises
    ------
    OutputError
        If it returns something else than finite logits (N, K), they have no gradient in training
        mode, or it has no parameters to train.
    ConfigError
        If it takes no such images, float32 (N, C, H, W), or its state holds no arrays.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise OutputError(
            f"{who} has no parameters to train: give a module that has some (what only answers is "
            "a FunctionBlackBox)"
        )
    try:
        state_arrays(model)
    except Exception as error:
        raise ConfigError(
            f"{who} has a state that cannot be kept as arrays ({error_line(error)}): let it be of "
            "tensors alone, dense and of types that NumPy has"
        ) from error
    x_NCHW = some_images(_FEW, image_shape, device_of(model))
    for training in (False, True):
        _check_mode(model, x_NCHW, num_classes, who, training=training)


def _check_mode(
    model: nn.Module, x_NCHW: Tensor, num_classes: int, who: str, *, training: bool
) -> None:
    mode = "training" if training else "evaluation"
    model.train(training)
    try:
        with torch.set_grad_enabled(training):
            found = model(x_NCHW)
    except Exception as error:
        raise ConfigError(
            f"{who} takes no float32 images of shape {tuple(x_NCHW.shape)} in {mode} mode "
            f"({error_line(error)}){_of_other_precision(model)}"
        ) from error
    where = f" for {len(x_NCHW)} images in {mode} mode"
    try:
        logits_NK = logits_of(found)
    except OutputError as error:
        problem = str(error).removeprefix("the model")
        raise OutputError(who + problem.replace(":", f"{where}:", 1)) from None
    wanted = (len(x_NCHW), num_classes)
    if tuple(logits_NK.shape) != wanted:
        raise OutputError(f"{who} returns {tuple(logits_NK.shape)}{where}: return logits {wanted}")
    if not torch.isfinite(logits_NK).all():
        raise OutputError(f"{who} returns logits that are not finite{where}: mend its first values")
    if training and not logits_NK.requires_grad:
        raise OutputError(
            f"{who} returns logits without a gradient in training mode: it cannot be trained; "
            "detach nothing, and leave out torch.no_grad()"
        )


@contextmanager
def check_aside(model: nn.Module) -> Iterator[nn.Module]:
    """Give a model to `check_model` in place of another, which stays as it is.

    It is the one within a wrapper that compiles it or spreads it, and a copy, if it can be copied;
    else it is given back its state.
    """
    inner, training = unwrapped(model), model.training
    with torch.random.fork_rng(devices=[]):
        try:
            checked = copy.deepcopy(inner)
        except Exception:  # noqa: BLE001 - of whatever a model holds that cannot be copied
            checked = inner
        state = {name: tensor.clone() for name, tensor in inner.state_dict().items()}
        try:
            yield checked
        finally:
            inner.load_state_dict(state)
            model.train(training)


def some_images(number: int, image_shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return images of noise in the pixel range, always the same."""
    stream = torch.Generator().manual_seed(0)
    drawn = torch.rand(number, *image_shape, generator=stream).to(device)
    return PIXEL_RANGE.from_unit(2 * drawn - 1)


def _described(found: object) -> str:
    if isinstance(found, Mapping):
        return f"a {type(found).__name__} without 'logits'"
    return f"a {type(found).__name__}"


def _of_other_precision(model: nn.Module) -> str:
    types = {parameter.dtype for parameter in model.parameters()} - {torch.float32}
    if not types:
        return ""
    return f"; its parameters are {', '.join(sorted(map(str, types)))}: give model.float()"
