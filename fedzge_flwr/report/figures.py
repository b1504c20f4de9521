"""The figures of a report, as Plotly has them; the page colours them for light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, TypeVar

import numpy as np
import plotly.graph_objects as go

from fedzge_flwr.common.text import printable
from fedzge_flwr.observers.recalls import Recalls
from fedzge_flwr.observers.round_row import RoundRow
from fedzge_flwr.report.runs import Group, Reading, Run
from fedzge_flwr.wire.traffic import total

# Okabe and Ito's colours: told apart by most eyes, on light and on dark.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00")
_CENTRAL, _ENSEMBLE, _CLIENTS = "#D55E00", "#0072B2", "#7F7F7F"
_MOST_CLIENT_LINES = 50
_MOST_ROUNDS = 1000
_MOST_CHARACTERS = 80

_T = TypeVar("_T")

AXES: Mapping[str, tuple[str, Reading]] = {
    "round": ("round", lambda row: float(row.round)),
    "queries": ("queries a client", lambda row: float(row.queries_per_client)),
    "bytes": (
        "MB on the wire, all clients",
        lambda row: (row.bytes_down_total + row.bytes_up_total) / 1e6,
    ),
}
"""What accuracy is shown against: the axis's title and where to read it."""

_LINES: tuple[tuple[str, Reading, str], ...] = (
    ("central model", lambda row: row.central_accuracy, _CENTRAL),
    ("ensemble", lambda row: row.ensemble_accuracy, _ENSEMBLE),
    ("mean client", lambda row: row.mean_client_accuracy, _CLIENTS),
)


def accuracy(run: Run, against: str) -> go.Figure:
    """Draw the accuracies of central model, ensemble and clients against one of `AXES`."""
    title, x = AXES[against]
    figure, rows = go.Figure(), _shown(run.rows)
    partitions = sorted({p for row in rows for p in row.client_accuracy})
    for partition in partitions[:_MOST_CLIENT_LINES]:
        xs, ys = _points(rows, x, lambda row, p=partition: row.client_accuracy.get(p))  # type: ignore[misc]
        line(figure, xs, ys, f"client {partition}", _CLIENTS, 1, opacity=0.35, showlegend=False)
    for name, y, colour in _LINES:
        xs, ys = _points(rows, x, y)
        if xs:
            line(figure, xs, ys, name, colour, 3)
    return finished(figure, title, "accuracy", yaxis_tickformat=".0%")


def comparison(groups: Sequence[Group], against: str) -> go.Figure:
    """Draw each group's central model, with its deviation over seeds, and its ensemble, dashed."""
    title, x = AXES[against]
    figure = go.Figure()
    for number, item in enumerate(groups):
        colour = COLOURS[number % len(COLOURS)]
        xs, ys, spread = map(_shown, item.curve(x, lambda row: row.central_accuracy))
        if len(item.runs) > 1 and xs:
            upper = [y + s for y, s in zip(ys, spread, strict=True)]
            lower = [y - s for y, s in zip(ys, spread, strict=True)]
            figure.add_scatter(
                x=xs + xs[::-1],
                y=upper + lower[::-1],
                fill="toself",
                fillcolor=colour,
                opacity=0.2,
                line_width=0,
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
            )
        line(figure, xs, ys, f"{item.label}: central", colour, 3)
        xs, ys, _ = map(_shown, item.curve(x, lambda row: row.ensemble_accuracy))
        line(figure, xs, ys, f"{item.label}: ensemble", colour, 1.5, dash="dash")
    return finished(figure, title, "accuracy", yaxis_tickformat=".0%")


def class_balance(run: Run) -> go.Figure | None:
    """Draw which classes the ensemble gave the round's images, as shares."""
    rows = _shown([row for row in run.rows if sum(row.answer_classes)])
    if not rows:
        return None
    shares = [[count / sum(row.answer_classes) for count in row.answer_classes] for row in rows]
    figure = go.Figure(
        go.Heatmap(
            x=[row.round for row in rows],
            y=[str(number) for number in range(len(shares[0]))],
            z=[list(column) for column in zip(*shares, strict=True)],
            zmin=0,
            colorscale="Viridis",
            colorbar={"tickformat": ".0%", "thickness": 12},
            hovertemplate="round %{x}, class %{y}: %{z:.1%}<extra></extra>",
        )
    )
    return finished(figure, "round", "class", yaxis_type="category")


def recalls(run: Run) -> go.Figure | None:
    """Draw how much of each class central model and ensemble recognise, at the last evaluation."""
    last = _last_recalls(run)
    if last is None:
        return None
    figure = go.Figure()
    for name, values, colour in (
        ("central model", last.central_recalls, _CENTRAL),
        ("ensemble", last.ensemble_recalls, _ENSEMBLE),
    ):
        if values:
            figure.add_bar(
                x=[str(number) for number in range(len(values))],
                y=list(values),
                name=name,
                marker_color=colour,
                hovertemplate="class %{x}: %{y:.1%}",
            )
    return finished(
        figure, "class", "recall", xaxis_type="category", yaxis_tickformat=".0%", barmode="group"
    )


def confusion(run: Run) -> go.Figure | None:
    """Draw the central model's classes of the test images against the ensemble's."""
    last = _last_recalls(run)
    if last is None or not last.confusion:
        return None
    numbers = [str(number) for number in range(len(last.confusion))]
    shares = [[count / max(sum(row), 1) for count in row] for row in last.confusion]
    figure = go.Figure(
        go.Heatmap(
            x=numbers,
            y=numbers,
            z=shares,
            customdata=[list(row) for row in last.confusion],
            zmin=0,
            zmax=1,
            colorscale="Viridis",
            colorbar={"tickformat": ".0%", "thickness": 12},
            hovertemplate="ensemble %{y}, central model %{x}: %{customdata} images, %{z:.1%}"
            "<extra></extra>",
        )
    )
    return finished(
        figure,
        "class that the central model gives",
        "class that the ensemble gives",
        xaxis_type="category",
        yaxis_type="category",
    )


def ledger(run: Run) -> go.Figure:
    """Draw the mean MB of a client by round, up above 0 and down below, by what they are for."""
    figure, rows = go.Figure(), _shown(run.rows)
    sums = [total(row.client_bytes.values()) for row in rows]
    rounds = [row.round for row in rows]
    colours: dict[str, str] = {}
    for way, sign in (("down", -1), ("up", 1)):
        for purpose in sorted({name for item in sums for name in getattr(item, way)}):
            colour = colours.setdefault(purpose, COLOURS[len(colours) % len(COLOURS)])
            figure.add_bar(
                x=rounds,
                y=[
                    sign * getattr(item, way).get(purpose, 0) / 1e6 / max(len(row.client_bytes), 1)
                    for item, row in zip(sums, rows, strict=True)
                ],
                name=_label(f"{way}: {purpose}"),
                marker={"color": colour, "opacity": 1.0 if way == "up" else 0.65},
            )
    return finished(figure, "round", "MB a client (down below 0)", barmode="relative")


def phases(run: Run) -> go.Figure:
    """Draw the seconds of each round by phase, the longest phases first."""
    rows = _shown(run.rows)
    names = sorted(
        {name for row in rows for name in row.phase_seconds},
        key=lambda name: -sum(row.phase_seconds.get(name, 0.0) for row in rows),
    )
    shown, others = names[: len(COLOURS) - 1], names[len(COLOURS) - 1 :]
    figure = go.Figure()
    for colour, (title, summed) in zip(
        COLOURS,
        [(name.replace("_", " "), [name]) for name in shown] + [("others", others)],
        strict=False,
    ):
        figure.add_bar(
            x=[row.round for row in rows],
            y=[sum(row.phase_seconds.get(name, 0.0) for name in summed) for row in rows],
            name=_label(title),
            marker_color=colour,
        )
    return finished(figure, "round", "seconds", barmode="stack")


def partition(run: Run) -> go.Figure | None:
    """Draw how many images of each class each client has, where that is known."""
    counts = run.config.get("class_counts")
    if not counts:
        return None
    figure = go.Figure(
        go.Heatmap(
            x=[str(number) for number in range(len(counts[0]))],
            y=[f"client {partition}" for partition in range(len(counts))],
            z=counts,
            zmin=0,
            colorscale="Viridis",
            colorbar={"thickness": 12},
            hovertemplate="%{y}, class %{x}: %{z} images<extra></extra>",
        )
    )
    return finished(
        figure, "class", "", xaxis_type="category", yaxis_type="category", yaxis_automargin=True
    )


def _last_recalls(run: Run) -> Recalls | None:
    found = (row.recalls for row in reversed(run.rows))
    return next((item for item in found if item.central_recalls or item.ensemble_recalls), None)


def _shown(values: Sequence[_T]) -> list[_T]:
    """Return at most so many of what there is by round, evenly chosen: no screen shows more."""
    at = np.linspace(0, len(values) - 1, min(_MOST_ROUNDS, len(values))).round().astype(int)
    return [values[number] for number in at]


def _label(text: str) -> str:
    """Return a text as Plotly shows it as it is: in labels it knows some of HTML, links too."""
    return escape(printable(text, _MOST_CHARACTERS), quote=False)


def _points(rows: Sequence[RoundRow], x: Reading, y: Reading) -> tuple[list[float], list[float]]:
    read = [(x(row), y(row)) for row in rows]
    known = [(a, b) for a, b in read if a is not None and b is not None]
    return [a for a, _ in known], [b for _, b in known]


def line(
    figure: go.Figure,
    xs: Sequence[float],
    ys: Sequence[float],
    name: str,
    colour: str,
    width: float,
    *,
    dash: str = "solid",
    **more: Any,
) -> None:
    """Add a line to a figure; a single value is a dot."""
    figure.add_scatter(
        x=xs,
        y=ys,
        name=_label(name),
        mode="lines+markers" if len(xs) == 1 else "lines",
        line={"color": colour, "width": width, "dash": dash},
        hovertemplate="%{y:.1%}",
        **more,
    )


def finished(figure: go.Figure, x: str, y: str, **layout: Any) -> go.Figure:
    """Give a figure the titles of its axes, and what all figures of a page have."""
    return figure.update_layout(
        template="none",
        xaxis_title=x,
        yaxis_title=y,
        margin={"l": 60, "r": 10, "t": 10, "b": 45},
        legend={"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0},
        hovermode="closest",
        **layout,
    )
