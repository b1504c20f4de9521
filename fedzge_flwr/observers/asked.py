"""Pictures of what was asked about: one a round, and a few images of each class of the last one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.files import atomic_path, remove_remains
from fedzge_flwr.images.pixels import PIXEL_RANGE, shown

_GRID_IMAGES_PER_CLASS = 10
_GRID_CLASSES = 20
_STRIP_CLASSES = 10


class AskedPictures:
    """The folder ``generated``: a picture a round, one image of each class side by side.

    The class is the ensemble's; of each the images of which it is surest are shown.

    Parameters
    ----------
    folder : Path
        The folder; made with the first picture.

    Attributes
    ----------
    samples : tuple of ndarray, optional
        A few of the last round's images of each of the first classes, uint8 (N, C, H, W), grey or
        RGB (`fedzge_flwr.images.pixels.shown`), and their classes (N,).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.samples: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None = None

    def draw(self, round_: int, images_NCHW: FloatArray, logits_NK: FloatArray) -> None:
        """Draw a round's picture.

        Parameters
        ----------
        round_ : int
            From 1.
        images_NCHW : ndarray of float32
            The images asked about, in the shared pixel range.
        logits_NK : ndarray of float32
            The ensemble's logits on them.

        Raises
        ------
        Exception
            If it cannot be drawn or written.
        """
        from PIL import Image

        images, labels = self.samples = _surest(images_NCHW, logits_NK)
        _, firsts = np.unique(labels, return_index=True)
        strip = np.concatenate(images[firsts[:_STRIP_CLASSES]].transpose(0, 2, 3, 1), axis=1)
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"round-{round_:06d}.png"
        with atomic_path(path, durable=False) as temporary:
            Image.fromarray(strip.squeeze(-1) if strip.shape[-1] == 1 else strip).save(temporary)

    def drop_after(self, round_: int) -> None:
        """Remove the pictures of later rounds.

        Raises
        ------
        OSError
            If one cannot be removed.
        """
        for picture in self._folder.glob("round-*.png"):
            if picture.stem > f"round-{round_:06d}":
                picture.unlink()
        remove_remains(self._folder)


def _surest(
    images_NCHW: FloatArray, logits_NK: FloatArray
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return a few images of each of the first classes, the surest first, and their classes."""
    classes_N = logits_NK.argmax(axis=1)
    second_N, first_N = np.partition(logits_NK, -2, axis=1)[:, -2:].T
    by_margin = np.argsort(second_N - first_N, kind="stable")
    chosen = np.concatenate(
        [
            by_margin[classes_N[by_margin] == label][:_GRID_IMAGES_PER_CLASS]
            for label in np.unique(classes_N)[:_GRID_CLASSES]
        ]
    )
    images = PIXEL_RANGE.to_uint8(torch.from_numpy(images_NCHW[chosen])).numpy()
    return shown(images), classes_N[chosen]
