"""The page: one file with everything in it, which opens without a network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.common.reading import place
from fedzge_flwr.common.text import percent_spread
from fedzge_flwr.report import figures
from fedzge_flwr.report.runs import ACCURACIES, Group, Run, group, load_run

_MOST_PAGE_CHARACTERS = 64_000_000


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Write one page of a run, or of several and how they compare.

    Parameters
    ----------
    folders : Sequence[Path]
        Run folders; those that differ by seed alone are shown as one, mean ± deviation.
    output : Path
        The HTML file; it appears when it is whole.

    Raises
    ------
    RunFolderError
        If one cannot be read, or the page would be too large or cannot be written.
    """
    runs = [load_run(folder) for folder in folders]
    if not runs:
        raise RunFolderError("no run folder was given")
    content = _Content()
    groups = group(runs)
    content.section("Accuracies of the last evaluated round", _summary(groups))
    if len(runs) > 1:
        for against, (title, _) in figures.AXES.items():
            content.figure(
                f"Accuracy against {title}",
                figures.comparison(groups, against),
                "Solid: central model, with the deviation over seeds; dashed: ensemble.",
            )
    for run in runs:
        content.run(run, unfolded=len(runs) == 1)
    page = content.page(_title(runs))
    try:
        with atomic_path(place(output, "--output"), durable=False) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"the report cannot be written to {output} ({error.strerror}); name another file"
        ) from error


class _Content:
    """The parts of a page, and the figures that they have places for."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._figures: list[str] = []

    def section(self, title: str, body: str) -> None:
        self._parts.append(f"<section class='wide'><h2>{escape(title)}</h2>{body}</section>")

    def figure(self, title: str, figure: go.Figure | None, note: str = "") -> None:
        if figure is None:
            return
        number = len(self._figures)
        self._figures.append(str(figure.to_json()))
        self._parts.append(
            f"<section><h2>{escape(title)}</h2><div class='figure' data-figure='{number}' "
            f"role='img' aria-label='{escape(title, quote=True)}'></div>"
            f"{f'<p class=note>{escape(note)}</p>' if note else ''}</section>"
        )

    def run(self, run: Run, *, unfolded: bool) -> None:
        """Add all that there is to see of one run."""
        state = str(run.config["status"])
        self._parts.append(
            f"<details class='wide'{' open' if unfolded else ''}>"
            f"<summary>{escape(run.folder.name)} <span class='state'>{escape(state)}</span>"
            "</summary><div class='grid'>"
        )
        for against, (title, _) in figures.AXES.items():
            self.figure(f"Accuracy against {title}", figures.accuracy(run, against))
        self.figure(
            "Recall by class",
            figures.recalls(run),
            "Of the test images of each class, at the last evaluation.",
        )
        self.figure(
            "Central model against ensemble",
            figures.confusion(run),
            "Test images by the class that each gives them, as shares of the ensemble's class.",
        )
        self.figure(
            "Classes of the answers",
            figures.class_balance(run),
            "Shares of a round's images by the class that the ensemble gives them.",
        )
        self.figure("Bytes by purpose", figures.ledger(run), "Mean of a round's clients.")
        self.figure("Time by phase", figures.phases(run))
        self.figure("Images by client and class", figures.partition(run))
        if run.pictures:
            self.section("Synthetic images, one of each class", _pictures(run))
        self.section("Settings", _settings(run))
        self._parts.append("</div></details>")

    def page(self, title: str) -> str:
        """Return the whole page."""
        template = (files(__package__) / "page.html").read_text(encoding="utf-8")
        # Within a script element nothing may look like its end.
        data = f"[{','.join(self._figures)}]".replace("</", "<\\/")
        texts: dict[str, str] = {
            "<!--title-->": escape(title),
            "<!--content-->": "\n".join(self._parts),
            "/*figures*/": data,
            "/*plotly*/": str(get_plotlyjs()),
        }
        # At once: a mark in a text that has been put in is that text's.
        parts = re.split(f"({'|'.join(map(re.escape, texts))})", template)
        page = "".join(texts.get(part, part) for part in parts)
        if len(page) > _MOST_PAGE_CHARACTERS:
            raise RunFolderError(
                f"the report would have {len(page) / 1e6:,.0f} MB, a page has "
                f"{_MOST_PAGE_CHARACTERS / 1e6:,.0f} at most; give fewer runs"
            )
        return page


def _title(runs: Sequence[Run]) -> str:
    first = runs[0].settings
    what = f"FedZGE on {first.get('dataset')}"
    return what if len(runs) == 1 else f"{what}: {len(runs)} runs"


def _summary(groups: Iterable[Group]) -> str:
    # Takes a second, and no other part of the page needs it.
    import pandas as pd

    rows = []
    for item in groups:
        last = [run.rows[-1] for run in item.runs]
        rows.append(
            {
                "runs": item.label,
                "seeds": ", ".join(str(run.config.get("seed", "?")) for run in item.runs),
                "rounds": _spread([row.round for row in last]),
                "queries a client": _spread([row.queries_per_client for row in last]),
                "MB": _spread([(row.bytes_down_total + row.bytes_up_total) / 1e6 for row in last]),
                **{
                    name: percent_spread([run.last(reading) for run in item.runs])
                    for name, reading in ACCURACIES.items()
                },
            }
        )
    table = pd.DataFrame(rows).to_html(index=False, border=0, classes=None)
    return f"<div class='scroll'>{table}</div>"


def _spread(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if round(low) == round(high) else f"{low:,.0f} to {high:,.0f}"


def _pictures(run: Run) -> str:
    items = []
    for round_, picture in sorted(run.pictures.items()):
        data = base64.b64encode(picture).decode("ascii")
        text = f"round {round_}"
        items.append(
            f"<figure><img alt='Synthetic images of {text}' src='data:image/png;base64,{data}'>"
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f"<div class='strips'>{''.join(items)}</div>"


def _settings(run: Run) -> str:
    rows = {
        **run.settings,
        **{f"version of {name}": text for name, text in run.config.get("versions", {}).items()},
        **{f"client {name}": text for name, text in run.config.get("clients", {}).items()},
        "started": run.config.get("started", ""),
        "seconds": run.config.get("seconds", ""),
    }
    cells = "".join(
        f"<tr><td>{_esc(key)}</td><td>{_esc(value)}</td></tr>" for key, value in rows.items()
    )
    return f"<details><summary>{len(rows)} entries</summary><table>{cells}</table></details>"


def _esc(value: object) -> str:
    return escape(value if isinstance(value, str) else json.dumps(value))
