"""Public images, for the methods that need them: unlabelled, in levels, the same for every seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from fedzge_flwr.common.arrays import ByteArray
from fedzge_flwr.common.randomness import Purpose, numpy_stream
from fedzge_flwr.config.sections import DataSettings
from fedzge_flwr.data.loading import load_split

PublicImages: TypeAlias = Callable[[DataSettings, int], ByteArray]
"""Returns at most so many images, uint8 (N, C, H, W), of the data set's shape."""

_TENTH = 10


def photographs(data: DataSettings, most: int) -> ByteArray:
    """Return crops of the two photographs that scikit-learn brings: another data set.

    A crop is a square of the photograph, of a side between the image's, if that is less, and half
    of the photograph's, scaled; grey where the images are. Of more channels, or of two, each is one
    of the three colours in turn.
    """
    from PIL import Image
    from sklearn.datasets import load_sample_images

    channels, height, width = data.spec.image_shape
    stream = numpy_stream(0, Purpose.IMAGES)
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    crops = np.empty((most, height, width, 3), dtype=np.uint8)
    for crop in crops:
        picture = pictures[int(stream.integers(len(pictures)))]
        half = min(picture.size) // 2
        # Larger images than the photographs allow are of crops that are enlarged.
        side = int(stream.integers(min(max(height, width), half - 1), half))
        left = int(stream.integers(picture.size[0] - side))
        top = int(stream.integers(picture.size[1] - side))
        box = (left, top, left + side, top + side)
        crop[:] = np.asarray(picture.resize((width, height), Image.Resampling.BOX, box))
    images_NCHW = crops.transpose(0, 3, 1, 2)
    if channels == 1:
        images_NCHW = np.round(images_NCHW.mean(axis=1, keepdims=True)).astype(np.uint8)
    else:
        images_NCHW = images_NCHW[:, np.arange(channels) % images_NCHW.shape[1]]
    return np.ascontiguousarray(images_NCHW)


def own_tenth(data: DataSettings, most: int) -> ByteArray:
    """Return a tenth of the training images themselves: the best case, which nobody has."""
    images = load_split(data, "train").images_NCHW
    chosen = numpy_stream(0, Purpose.IMAGES).permutation(len(images))
    return np.ascontiguousarray(images[chosen[: min(len(images) // _TENTH, most)]])


PUBLIC: dict[str, PublicImages] = {"photographs": photographs, "a tenth": own_tenth}
"""Public images by what they are."""
