"""A model in ONNX format that only answers: ``pip install 'fedzge-flwr[onnx]'``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedzge_flwr.arrays import FloatArray
from fedzge_flwr.black_boxes.base import ClassifierBlackBox
from fedzge_flwr.errors import ConfigError, DataError

if TYPE_CHECKING:
    from flwr.app import Context


class OnnxBlackBox(ClassifierBlackBox):
    """Answers with a model's first output, through ONNX Runtime on the CPU; inference-only.

    Parameters
    ----------
    context : Context
        The node's.
    path : str or Path
        The ``.onnx`` file: one input, float32 (N, C, H, W) with any N; its first output is (N, K).
    image_shape, num_classes, num_examples, **options
        As for `ClassifierBlackBox`.
    prepare : Callable[[ndarray], ndarray], optional
        From images in the shared pixel range [−1, 1] to the model's own input, e.g.
        ``lambda x: (x + 1) / 2``.
    batch_size : int
        Images a call.

    Raises
    ------
    ConfigError
        If ONNX Runtime is not installed.
    DataError
        If the file is no such model.
    """

    def __init__(
        self,
        context: Context,
        path: str | Path,
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_examples: int,
        *,
        prepare: Callable[[FloatArray], FloatArray] | None = None,
        batch_size: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(context, image_shape, num_classes, num_examples, **options)
        self._session = _session(str(Path(path).expanduser().absolute()))
        self._prepare = prepare
        self._batch_size = batch_size

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Run the model, ``batch_size`` images at a time."""
        (given, *others) = self._session.get_inputs()
        if others:
            raise DataError(f"the ONNX model has {1 + len(others)} inputs; give one with one input")
        inputs = images_NCHW if self._prepare is None else self._prepare(images_NCHW)
        batches = [
            self._session.run(None, {given.name: inputs[start : start + self._batch_size]})[0]
            for start in range(0, max(len(inputs), 1), self._batch_size)
        ]
        logits_NK: FloatArray = np.concatenate(batches).astype(np.float32)
        if logits_NK.shape != (len(images_NCHW), self.num_classes):
            raise DataError(
                f"the ONNX model's first output has shape {logits_NK.shape} for "
                f"{len(images_NCHW)} images and {self.num_classes} classes"
            )
        return logits_NK


# A black box is made for every message, and reading a model takes a while.
@lru_cache(maxsize=4)
def _session(path: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            "OnnxBlackBox needs ONNX Runtime: pip install 'fedzge-flwr[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    # Clients share a machine: one thread each, as elsewhere.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: not an ONNX model that can be read ({line})") from error
