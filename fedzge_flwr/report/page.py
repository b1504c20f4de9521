"""The page: one file with everything in it, which opens without a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from fedzge_flwr.common.errors import RunFolderError
from fedzge_flwr.common.files import atomic_path
from fedzge_flwr.common.reading import place
from fedzge_flwr.common.text import percent_spread
from fedzge_flwr.report import figures
from fedzge_flwr.report.content import Content
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
    content = Content()
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
        _add_run(content, run, unfolded=len(runs) == 1)
    page = content.page(_title(runs))
    try:
        with atomic_path(place(output, "--output"), durable=False) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(
            f"the report cannot be written to {output} ({error.strerror}); name another file"
        ) from error


def _add_run(content: Content, run: Run, *, unfolded: bool) -> None:
    """Add all that there is to see of one run."""
    state = str(run.config["status"])
    content.begin(
        f"<details class='wide'{' open' if unfolded else ''}>"
        f"<summary>{escape(run.name)} <span class='state'>{escape(state)}</span>"
        "</summary><div class='grid'>"
    )
    for against, (title, _) in figures.AXES.items():
        content.figure(f"Accuracy against {title}", figures.accuracy(run, against))
    content.figure(
        "Recall by class",
        figures.recalls(run),
        "Of the test images of each class, at the last evaluation.",
    )
    content.figure(
        "Central model against ensemble",
        figures.confusion(run),
        "Test images by the class that each gives them, as shares of the ensemble's class.",
    )
    content.figure(
        "Classes of the answers",
        figures.class_balance(run),
        "Shares of a round's images by the class that the ensemble gives them.",
    )
    content.figure("Bytes by purpose", figures.ledger(run), "Mean of a round's clients.")
    content.figure("Time by phase", figures.phases(run))
    content.figure("Images by client and class", figures.partition(run))
    if run.pictures:
        content.section("Synthetic images, one of each class", _pictures(run))
    content.section("Settings", _settings(run))
    content.begin("</div></details>")


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
