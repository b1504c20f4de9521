"""A model within a fixed step, whose parameters keep their names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Around(nn.Module):
    """A model, and what is done to its images or to what it returns.

    A state dict is the model's own: with its names, and nothing else.

    Parameters
    ----------
    net : nn.Module
        The model. It stays as it is, and ``net`` names it.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        # In the mode in which the model is, so that nobody who sets it back changes the model.
        self.training = net.training
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]

    def forward(self, images_NCHW: Tensor) -> Any:
        """Map images (N, C, H, W) in [−1, 1] to what the model returns of them."""
        return self.outputs(self.net(self.inputs(images_NCHW)))

    def inputs(self, images_NCHW: Tensor) -> Tensor:
        """Return what the model within is given for images."""
        return images_NCHW

    def outputs(self, found: Any) -> Any:
        """Return what stands for what the model within returned."""
        return found

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's own state, with its own names."""
        return self.net.state_dict(*args, **kwargs)


def model_within(model: nn.Module) -> nn.Module:
    """Return the model that a fixed step is around, within all such steps."""
    while isinstance(model, Around):
        model = model.net
    return model


def inputs_within(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    """Return what `model_within` is given if the whole is given these images."""
    while isinstance(model, Around):
        images_NCHW, model = model.inputs(images_NCHW), model.net
    return images_NCHW


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *others: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}net.{name.removeprefix(prefix)}"] = state.pop(name)


def _without_prefix(module: nn.Module, keys: Any) -> None:
    for names in (keys.missing_keys, keys.unexpected_keys):
        names[:] = [name.removeprefix("net.") for name in names]
