"""What clients distill: the ensemble's logits on images that were asked about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedzge_flwr.common.arrays import ByteArray, FloatArray
from fedzge_flwr.images.pixels import pixel_values
from fedzge_flwr.query.question import Question


@dataclass(frozen=True)
class Targets:
    """The ensemble's logits on a round's base images.

    Parameters
    ----------
    round : int
        The round that they are of, from 1; 0: there are none.
    digest : str
        Names the images (`fedzge_flwr.query.question.image_digest`).
    images : ndarray of uint8 or of float32
        The images (N, C, H, W), as the question had them; none where they are named only.
    logits_NK : ndarray of float32
        The ensemble's logits.
    temperature : float
        T > 0 that both sides of the distillation divide by.
    """

    round: int
    digest: str
    images: ByteArray | FloatArray
    logits_NK: FloatArray
    temperature: float

    @property
    def images_NCHW(self) -> FloatArray:
        """The images in the shared pixel range."""
        return pixel_values(self.images)

    @classmethod
    def on(
        cls, question: Question, round_: int, logits_NK: FloatArray, temperature: float
    ) -> Targets:
        """Return the targets on a question's base images."""
        return cls(round_, question.digest, question.base, logits_NK, temperature)

    @classmethod
    def none(cls, image_shape: tuple[int, int, int], num_classes: int) -> Targets:
        """Return the targets of no round."""
        no_images = np.zeros((0, *image_shape), dtype=np.uint8)
        return cls(0, "", no_images, np.zeros((0, num_classes), dtype=np.float32), 1.0)
