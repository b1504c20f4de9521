"""Pictures of generated images: one a round, and a few images of each class of the last round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedzge_flwr.common.files import atomic_path, remove_remains
from fedzge_flwr.images.pixels import PIXEL_RANGE, shown
from fedzge_flwr.server.round import SyntheticBatch

_GRID_IMAGES_PER_CLASS = 10
_GRID_CLASSES = 20
_STRIP_CLASSES = 10


class GeneratedPictures:
    """The folder ``generated``: a picture a round, one image of each class side by side.

    Parameters
    ----------
    folder : Path
        The folder; made with the first picture.

    Attributes
    ----------
    samples : tuple of ndarray, optional
        The last round's first few images of each of the first classes, uint8 (N, C, H, W), grey or
        RGB (`fedzge_flwr.images.pixels.shown`), and their labels (N,).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.samples: tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]] | None = None

    def draw(self, round_: int, batch: SyntheticBatch) -> None:
        """Draw a round's picture.

        Raises
        ------
        Exception
            If it cannot be drawn or written.
        """
        from PIL import Image

        images, labels = self.samples = _labelled_samples(batch)
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


def _labelled_samples(
    batch: SyntheticBatch,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the first few images of each of the first classes, and their labels."""
    labels = batch.y_N.cpu().numpy()
    chosen = np.concatenate(
        [
            np.flatnonzero(labels == label)[:_GRID_IMAGES_PER_CLASS]
            for label in np.unique(labels)[:_GRID_CLASSES]
        ]
    )
    images = PIXEL_RANGE.to_uint8(batch.x_NCHW.detach()).cpu().numpy()
    return shown(images[chosen]), labels[chosen]
