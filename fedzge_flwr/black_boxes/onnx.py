"""A model in ONNX format that only answers: ``pip install 'fedzge-flwr[onnx]'``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox, Output, logits_of_output
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import ConfigError, DataError
from fedzge_flwr.common.reading import place
from fedzge_flwr.common.registry import one_of

if TYPE_CHECKING:
    from flwr.app import Context

_DTYPES: dict[str, type[np.floating[Any]]] = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
}


class OnnxBlackBox(ClassifierBlackBox):
    """Answers with a model's output, through ONNX Runtime on the CPU; inference-only.

    Parameters
    ----------
    context : Context
        The node's.
    path : str or Path
        The ``.onnx`` file: one input, (N, C, H, W) of any floating-point type, where N may be any
        or, as exporters write it unless they are told otherwise, one size; an output (N, K).
    image_shape, num_classes, num_examples, **options
        As for `ClassifierBlackBox`.
    prepare : Callable[[ndarray], ndarray], optional
        From images in the shared pixel range [−1, 1] to the model's own input, e.g.
        ``lambda x: (x + 1) / 2``.
    output : {"logits", "probabilities"}
        What the output is. Of a model that ends in a softmax give "probabilities": taken for
        logits, they would say that all classes are nearly alike.
    output_name : str, optional
        Which output; by default the first. Some converters put labels there.
    batch_size : int
        Images a call, for a model that takes any number.

    Raises
    ------
    ConfigError
        If ONNX Runtime is not installed, ``output`` is another word, or there is no such output.
    DataError
        If the file is no such model; by `logits` if images, classes or ``output`` do not suit it.
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
        output: Output = "logits",
        output_name: str | None = None,
        batch_size: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(context, image_shape, num_classes, num_examples, **options)
        self._session = _session(str(place(path)))
        one_of(output, Output, "output")
        names = [found.name for found in self._session.get_outputs()]
        if output_name is not None and output_name not in names:
            raise ConfigError(
                f"output_name = {output_name!r}: the ONNX model's outputs are {', '.join(names)}"
            )
        self._output_name = output_name or names[0]
        self._outputs = names
        self._prepare = prepare
        self._output = output
        self._batch_size = batch_size

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Run the model, as many images at a time as it takes."""
        (given, *others) = self._session.get_inputs()
        if others:
            raise DataError(f"the ONNX model has {1 + len(others)} inputs; give one with one input")
        inputs = images_NCHW if self._prepare is None else self._prepare(images_NCHW)
        inputs = inputs.astype(_DTYPES.get(given.type, inputs.dtype), copy=False)
        fixed = given.shape[0] if given.shape and isinstance(given.shape[0], int) else None
        size = fixed or self._batch_size
        if fixed:
            # Filled up with zeros, whose answers are left out.
            missing = max(-len(inputs) % fixed, 0 if len(inputs) else fixed)
            inputs = np.pad(inputs, [(0, missing)] + [(0, 0)] * (inputs.ndim - 1))
        batches = [
            self._run(given, inputs[start : start + size])
            for start in range(0, max(len(inputs), 1), size)
        ]
        logits_NK: FloatArray = np.concatenate(batches).astype(np.float32)
        if fixed:
            logits_NK = logits_NK[: len(images_NCHW)]
        if logits_NK.shape != (len(images_NCHW), self.num_classes):
            raise DataError(
                f"the ONNX model's output '{self._output_name}' has shape {logits_NK.shape} for "
                f"{len(images_NCHW)} images and {self.num_classes} classes; its outputs are "
                f"{', '.join(self._outputs)}: `output_name` chooses"
            )
        return logits_of_output(
            logits_NK, self._output, f"the ONNX model's output '{self._output_name}'"
        )

    def _run(self, given: Any, inputs: npt.NDArray[Any]) -> npt.NDArray[Any]:
        try:
            (found,) = self._session.run([self._output_name], {given.name: inputs})
        except Exception as error:  # its exceptions have no common base
            raise DataError(
                f"the ONNX model's input '{given.name}' is {given.type} of shape {given.shape}, "
                f"but images are {inputs.dtype} of shape {inputs.shape}: give `prepare`, a "
                "function from images (N, C, H, W) in [−1, 1] to what the model takes"
            ) from error
        if not isinstance(found, np.ndarray):
            raise DataError(
                f"the ONNX model's output '{self._output_name}' is a sequence of maps: export it "
                "with zipmap=False, or choose another by `output_name` "
                f"({', '.join(self._outputs)})"
            )
        return found


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
    except Exception as error:  # noqa: BLE001 - its exceptions have no common base
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{path}: not an ONNX model that can be read ({line})") from None
