"""A black box that is a plain Python function."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox
from fedzge_flwr.common.arrays import FloatArray

if TYPE_CHECKING:
    from flwr.app import Context


class FunctionBlackBox(ClassifierBlackBox):
    """Answers with a function's logits; inference-only.

    Parameters
    ----------
    context : Context
        The node's.
    function : Callable[[ndarray], ndarray]
        Maps float32 images (N, C, H, W) in the shared pixel range [−1, 1] to logits (N, K).
    image_shape, num_classes, num_examples, **options
        As for `ClassifierBlackBox`.
    """

    def __init__(
        self,
        context: Context,
        function: Callable[[FloatArray], FloatArray],
        image_shape: tuple[int, int, int],
        num_classes: int,
        num_examples: int,
        **options: Any,
    ) -> None:
        super().__init__(context, image_shape, num_classes, num_examples, **options)
        self._function = function

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        """Call the function."""
        return np.asarray(self._function(images_NCHW), dtype=np.float32)
