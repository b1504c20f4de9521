"""The pictures of a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedzge_flwr.observers.round_row import RoundRow
from fedzge_flwr.wire.traffic import total

_MAX_CLIENT_LINES = 50
_GAP = 2
"""Pixels between images."""
_MARGINS = {"left": 0.09, "right": 0.98, "bottom": 0.1, "top": 0.93}
"""Fixed: a layout that is found draws all twice, and was a third of the time of a short run."""


def draw_accuracy(rows: Sequence[RoundRow], path: Path) -> None:
    """Draw the accuracies of central model, ensemble and clients over the rounds as PNG.

    Parameters
    ----------
    rows : Sequence[RoundRow]
        At least one round.
    path : Path
        The file to write.
    """
    # Figure, not pyplot: no global state, and no window whatever the backend.
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots(gridspec_kw=_MARGINS)
    partitions = sorted({p for row in rows for p in row.client_accuracy})
    for partition in partitions[:_MAX_CLIENT_LINES]:
        _line(axes, rows, [row.client_accuracy.get(partition) for row in rows], "0.8", None, 0.8)
    lines = (
        ("mean client", "tab:gray", [row.mean_client_accuracy for row in rows]),
        ("ensemble", "tab:blue", [row.ensemble_accuracy for row in rows]),
        ("central model", "tab:red", [row.central_accuracy for row in rows]),
    )
    for label, colour, values in lines:
        _line(axes, rows, values, colour, label, 2.0)
    axes.set(xlabel="round", ylabel="accuracy", ylim=(0, 1), title="Accuracy by round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")
    figure.savefig(path, format="png", dpi=120)


def _line(
    axes: Axes,
    rows: Sequence[RoundRow],
    values: Sequence[float | None],
    colour: str,
    label: str | None,
    width: float,
) -> None:
    points = [
        (row.round, value) for row, value in zip(rows, values, strict=True) if value is not None
    ]
    if points:
        x, y = zip(*points, strict=True)
        marker = "o" if len(points) == 1 else None
        axes.plot(x, y, color=colour, label=label, linewidth=width, marker=marker)


def draw_bytes(rows: Sequence[RoundRow], path: Path) -> None:
    """Draw the mean megabytes of a client by round, down and up, by what they are for, as PNG.

    The mean is over the clients that had any traffic in the round; evaluation is not in it.

    Parameters
    ----------
    rows : Sequence[RoundRow]
        At least one round.
    path : Path
        The file to write.
    """
    figure = Figure(figsize=(8, 5))
    halves = figure.subplots(1, 2, gridspec_kw={**_MARGINS, "wspace": 0.25})
    for axes, way in zip(halves, ("down", "up"), strict=True):
        rounds, below = [row.round for row in rows], np.zeros(len(rows))
        sums: list[dict[str, int]] = [
            getattr(total(row.client_bytes.values()), way) for row in rows
        ]
        for purpose in sorted({name for item in sums for name in item}):
            heights = np.array(
                [
                    item.get(purpose, 0) / 1e6 / max(len(row.client_bytes), 1)
                    for item, row in zip(sums, rows, strict=True)
                ]
            )
            axes.bar(rounds, heights, bottom=below, label=purpose)
            below += heights
        axes.set(xlabel="round", ylabel="MB a client", title=f"Bytes {way}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if below.any():
            axes.legend(loc="best")
    figure.savefig(path, format="png", dpi=120)


def draw_synthetic(
    images_NCHW: npt.NDArray[np.uint8], labels_N: npt.NDArray[np.int64], path: Path
) -> None:
    """Draw synthetic images as PNG, a row for each class, with its number.

    Parameters
    ----------
    images_NCHW : ndarray of uint8
        Images of 1 or 3 channels (`fedzge_flwr.images.pixels.shown`).
    labels_N : ndarray of int64
        The classes that the ensemble gives them.
    path : Path
        The file to write.
    """
    classes = np.unique(labels_N)
    columns = int(max(np.count_nonzero(labels_N == label) for label in classes))
    channels, height, width = images_NCHW.shape[1:]
    cell = (height + _GAP, width + _GAP)
    # One picture: axes of their own for every image take seconds.
    mosaic = np.full((len(classes) * cell[0], columns * cell[1], channels), 255, dtype=np.uint8)
    for row, label in enumerate(classes):
        for column, image in enumerate(images_NCHW[labels_N == label]):
            top, left = row * cell[0], column * cell[1]
            mosaic[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    across, down = 0.8 * columns + 0.8, 0.8 * len(classes) + 0.6
    figure = Figure(figsize=(across, down))
    axes = figure.add_axes((0.6 / across, 0.1 / down, 1 - 0.7 / across, 1 - 0.6 / down))
    axes.imshow(
        mosaic.squeeze(-1) if channels == 1 else mosaic,
        interpolation="nearest",
        cmap="gray",
        vmin=0,
        vmax=255,
    )
    axes.set_frame_on(False)
    axes.set_xticks([])
    axes.set_yticks([(row + 0.5) * cell[0] for row in range(len(classes))], classes)
    axes.tick_params(length=0)
    figure.suptitle("Synthetic images by the ensemble's class")
    figure.savefig(path, format="png", dpi=100)
