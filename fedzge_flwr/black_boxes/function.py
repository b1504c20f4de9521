"""A black box that is a plain Python function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox, Output, logits_of_output
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.registry import one_of

if TYPE_CHECKING:
    from flwr.app import Context


class FunctionBlackBox(ClassifierBlackBox):
    """Answers with a function's logits; inference-only.

    Parameters
    ----------
    context : Context
        The node's.
    function : Callable[[ndarray], ndarray]
        Maps float32 images (N, C, H, W) in the shared pixel range [−1, 1] to ``output`` (N, K).
    image_shape, num_classes, num_examples, **options
        As for `ClassifierBlackBox`.
    output : {"logits", "probabilities"}
        What the function returns.

    Raises
    ------
    ConfigError
        If ``output`` is another word.
    DataError
        By `logits`, if what is said to be probabilities is not.
    """

    def __init__(
        self,
        context: Context,
        function: Callable[[FloatArray], FloatArray],
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_examples: int,
        *,
        output: Output = "logits",
        **options: Any,
    ) -> None:
        super().__init__(context, image_shape, num_classes, num_examples, **options)
        one_of(output, Output, "output")
        self._function, self._output = function, output

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Call the function."""
        found = np.asarray(self._function(images_NCHW))
        return logits_of_output(found, self._output, "what the function returns")
