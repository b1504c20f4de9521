"""The central model as ONNX: ``python -m fedzge_flwr.learning.export RUN FILE.onnx``.

Its logits are multiplied by the run's ``answer-temperature`` if its ensemble softens answers by
that: so it is as sure as the ensemble. It needs the extra: ``pip install 'fedzge-flwr[onnx]'``.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn

from fedzge_flwr.common.errors import ConfigError, FedZGEError, RunFolderError
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.common.randomness import Purpose, seeded_default
from fedzge_flwr.common.reading import parse_json, read_within
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.learning.fixed_steps import Rescaled
from fedzge_flwr.learning.models.catalogue import rebuild_model
from fedzge_flwr.learning.outputs import logits_of
from fedzge_flwr.learning.tensors import device_of

_MOST_CONFIG_BYTES = 16_000_000
_MOST_MODEL_BYTES = 8_000_000_000


def export_onnx(model: nn.Module, path: str | Path, image_shape: tuple[int, int, int]) -> None:
    """Write a classifier as an ONNX file, for any number of images.

    Parameters
    ----------
    model : nn.Module
        Maps images (N, C, H, W) to logits (N, K); written as in evaluation mode.
    path : str or Path
        The file to make or replace. Its input is called ``images``, its output ``logits``.
    image_shape : tuple of int
        (C, H, W).

    Raises
    ------
    ConfigError
        If the packages of the extra are missing, or there is no such folder.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"no {' and no '.join(missing)} here: pip install 'fedzge-flwr[onnx]'")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no such folder; make it, or name another file")
    was_training = model.training
    # Two images: an exporter takes a size of one for a constant.
    example = torch.zeros(2, *image_shape, device=device_of(model))
    batch = torch.export.Dim("batch")
    try:
        with atomic_path(Path(path)) as temporary, warnings.catch_warnings():
            # Of the exporter about itself.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _OfLogits(model).eval(),
                (example,),
                str(temporary),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: batch},),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        model.train(was_training)


class _OfLogits(nn.Module):
    """A model that returns logits, whatever it has them in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        return logits_of(self.model(images_NCHW))


class Central(NamedTuple):
    """A run's central model.

    Parameters
    ----------
    model : nn.Module
        As it was trained: on answers that may be softened.
    image_shape : tuple of int
        (C, H, W).
    softened : float
        By what: `Rescaled` by it, the model is as sure as the ensemble was.
    """

    model: nn.Module
    image_shape: tuple[int, int, int]
    softened: float


def load_central(run: Path) -> Central:
    """Return the central model of a run folder.

    Raises
    ------
    RunFolderError
        If it is not the folder of a finished run, or its central model is not the one that its
        settings name: a strategy may be given any.
    """
    try:
        content = parse_json(read_within(run, "config.json", _MOST_CONFIG_BYTES))
        settings = from_run_config(content["settings"])
        state = load(read_within(run, "central.safetensors", _MOST_MODEL_BYTES))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise RunFolderError(f"{run} is not the folder of a finished run ({error})") from error
    spec = settings.data.spec
    name = settings.distillation.central_model
    try:
        with seeded_default(settings.run.seed, Purpose.INIT_CENTRAL):
            model = rebuild_model(name, spec.image_shape, spec.num_classes, state)
    except ValueError as error:
        raise RunFolderError(
            f"{run}: its central model is not the {name!r} of its settings; load "
            "central.safetensors into your own model and call fedzge_flwr.export_onnx"
        ) from error
    return Central(model, spec.image_shape, settings.queries.softening)


def main(given: list[str] | None = None) -> None:
    """Export as the command line says."""
    parser = argparse.ArgumentParser(description="Write a run's central model as ONNX.")
    parser.add_argument("run", type=Path, help="a run folder, e.g. runs/NAME")
    parser.add_argument("file", type=Path, help="the .onnx file to write")
    arguments = parser.parse_args(given)
    try:
        central = load_central(arguments.run)
        export_onnx(Rescaled(central.model, central.softened), arguments.file, central.image_shape)
    except (FedZGEError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
