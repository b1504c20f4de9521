"""What central model and ensemble know of each class of the common test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedzge_flwr.common.arrays import FloatArray, IntArray


@dataclass(frozen=True)
class Recalls:
    """Recall by class, and where the central model parts from the ensemble.

    Parameters
    ----------
    central_recalls, ensemble_recalls : tuple of float, optional
        By class: the part of its test images that are recognised, in [0, 1]; None of a class
        without any. Empty where that model's answers are not known.
    confusion : tuple of tuple of int
        Test images by the ensemble's class and, within it, by the central model's; empty unless
        both are known.

    Raises
    ------
    ValueError
        If the parts do not have the same classes, or a figure is none.
    """

    central_recalls: tuple[float | None, ...] = ()
    ensemble_recalls: tuple[float | None, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        parts = (self.central_recalls, self.ensemble_recalls, self.confusion, *self.confusion)
        if len({len(part) for part in parts if part}) > 1:
            raise ValueError("figures by class of different numbers of classes")
        recalls = (*self.central_recalls, *self.ensemble_recalls)
        if any(value is not None and not 0 <= value <= 1 for value in recalls):
            raise ValueError("a recall is not in [0, 1]")
        if any(count < 0 for row in self.confusion for count in row):
            raise ValueError("a count of test images is below 0")

    @classmethod
    def of(
        cls,
        labels_M: IntArray,
        num_classes: int,
        central_M: Sequence[int] | None,
        ensemble_logits_MK: FloatArray | None,
    ) -> Recalls:
        """Return the figures of a test set.

        Parameters
        ----------
        labels_M : ndarray of int64, (M,)
            The true classes.
        num_classes : int
            K.
        central_M : Sequence[int], optional
            The central model's classes of the same images.
        ensemble_logits_MK : FloatArray, optional
            The ensemble's logits of them.

        Raises
        ------
        ValueError
            If there are not M of them, or a class is not below K.
        """
        central = None if central_M is None else np.asarray(central_M)
        ensemble = None if ensemble_logits_MK is None else ensemble_logits_MK.argmax(axis=1)
        for found in (central, ensemble):
            if found is not None and found.shape != labels_M.shape:
                raise ValueError(f"{len(found)} classes of {len(labels_M)} test images")
        both = central is not None and ensemble is not None
        return cls(
            () if central is None else _recalls(labels_M, central, num_classes),
            () if ensemble is None else _recalls(labels_M, ensemble, num_classes),
            tuple(map(tuple, _counts(ensemble, central, num_classes).tolist())) if both else (),
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Recalls:
        """Return what `dataclasses.asdict` and JSON made of one."""
        return cls(
            tuple(values["central_recalls"]),
            tuple(values["ensemble_recalls"]),
            tuple(map(tuple, values["confusion"])),
        )


def _counts(rows_M: Any, columns_M: Any, num_classes: int) -> IntArray:
    flat_M = rows_M * num_classes + columns_M
    if not ((columns_M >= 0) & (columns_M < num_classes)).all():
        raise ValueError(f"a class that is not one of {num_classes}")
    return np.bincount(flat_M, minlength=num_classes**2).reshape(num_classes, num_classes)


def _recalls(labels_M: Any, found_M: Any, num_classes: int) -> tuple[float | None, ...]:
    counts_KK = _counts(labels_M, found_M, num_classes)
    totals_K, right_K = counts_KK.sum(axis=1), counts_KK.diagonal()
    return tuple(
        round(float(right / total), 6) if total else None
        for right, total in zip(right_K, totals_K, strict=True)
    )
