"""The page of a comparison: its table, and accuracy against bytes and against queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import plotly.graph_objects as go

from fedzge_flwr.common.errors import ComparisonError
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.compare.catalogue import method_named
from fedzge_flwr.compare.results import Result, table
from fedzge_flwr.compare.session import Point
from fedzge_flwr.report.content import Content
from fedzge_flwr.report.figures import COLOURS, finished, line

_AXES: dict[str, tuple[str, Callable[[Point], float]]] = {
    "bytes": ("MB to and from a client", lambda point: (point.down + point.up) / 1e6),
    "queries": ("queries a client", lambda point: float(point.queries)),
}

_DASHES = ("solid", "dash", "dot")


def write_page(path: Path, results: Sequence[Result]) -> None:
    """Write one HTML file that needs no network; it appears when it is whole.

    Parameters
    ----------
    path : Path
        The file.
    results : Sequence[Result]
        What it shows; at least one.

    Raises
    ------
    ComparisonError
        If it cannot be written.
    """
    content = Content()
    content.section(
        "Accuracy after the last round",
        f"<div class='scroll'>{table(results).to_html(index=False, border=0)}</div>",
    )
    for axis, (title, _) in _AXES.items():
        content.figure(f"Accuracy against {title}", figure(results, axis))
    page = content.page("Comparison")
    try:
        with atomic_path(path, durable=False) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ComparisonError(f"{path} cannot be written: {error.strerror or error}") from error


def figure(results: Sequence[Result], axis: str) -> go.Figure:
    """Return accuracies of what a user would deploy against "bytes" or "queries".

    A line for each method, the mean over its seeds; methods without queries are left out of those.
    """
    title, of = _AXES[axis]
    drawn = go.Figure()
    for name in dict.fromkeys(result.method for result in results):
        runs = [result for result in results if result.method == name]
        method = method_named(name)
        by_round: dict[int, list[tuple[float, float]]] = {}
        for run in runs:
            for point in run.measured.points:
                value = point.central if method.figure == "central" else point.mean_client
                if value is not None:
                    by_round.setdefault(point.round, []).append((of(point), value))
        means = [
            tuple(sum(column) / len(pairs) for column in zip(*pairs, strict=True))
            for _, pairs in sorted(by_round.items())
        ]
        if any(x for x, _ in means):
            number = len(drawn.data)
            line(
                drawn,
                [x for x, _ in means],
                [y for _, y in means],
                method.title,
                COLOURS[number % len(COLOURS)],
                3,
                dash=_DASHES[number // len(COLOURS) % len(_DASHES)],
            )
    return finished(drawn, title, "accuracy", yaxis_tickformat=".0%", xaxis_type="log")
