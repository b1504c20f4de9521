"""The page of an audit: one file with everything in it, which opens without a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import plotly.graph_objects as go

from fedzge_flwr.audit.findings import FALSE_POSITIVES, Attack, Findings, write_text
from fedzge_flwr.audit.rates import Rate
from fedzge_flwr.common.text import percent
from fedzge_flwr.report.content import Content
from fedzge_flwr.report.figures import COLOURS, finished, line

_LEAST_RATE = 1e-4


def write_page(path: Path, findings: Findings) -> None:
    """Write the page; it appears when it is whole.

    Raises
    ------
    AuditError
        If it cannot be written.
    """
    content = Content()
    shown = [*findings.attacks, findings.control]
    shown += [] if findings.central is None else [findings.central]
    content.section("Who finds out which images the client has", _attacks(shown))
    content.figure("Members found against others called members", curves(shown))
    first = findings.attacks[0]
    content.section(
        f"Members found at {FALSE_POSITIVES[0]:.0%} false positives, by kind: {first.title}",
        _table(["images", "found"], ([n, rate_text(r)] for n, r in first.groups.items())),
    )
    content.section(
        "What answers on synthetic images tell of the client's classes",
        _table(
            ["distance of the guess", "of a uniform guess", "rank correlation"],
            [[f"{value:.2f}" for value in vars(findings.proportions).values()]],
        ),
    )
    content.section(
        "How alike a model is that was distilled from the answers",
        _table(
            ["answers", "agreement"],
            ([f"{one.answers:,}", percent(one.agreement)] for one in findings.imitation),
        ),
    )
    content.section(
        "What was audited", _table(["what", "is"], ([k, str(v)] for k, v in findings.about.items()))
    )
    write_text(path, content.page(f"Audit of client {findings.about['client']}"))


def curves(attacks: Sequence[Attack]) -> go.Figure:
    """Return the curves of attacks, both axes logarithmic: what counts is at the left."""
    drawn = go.Figure()
    for number, attack in enumerate(attacks):
        rates = zip(attack.curve.false_positive, attack.curve.true_positive, strict=True)
        points = [(max(x, _LEAST_RATE), max(y, _LEAST_RATE)) for x, y in rates]
        line(
            drawn,
            [float(x) for x, _ in points],
            [float(y) for _, y in points],
            attack.title,
            COLOURS[number % len(COLOURS)],
            3,
        )
    return finished(
        drawn,
        "false positive rate",
        "true positive rate",
        xaxis_type="log",
        yaxis_type="log",
    )


def rate_text(rate: Rate) -> str:
    """Return a rate with its interval and numbers."""
    low, high = rate.interval
    return f"{percent(rate.value)} ({percent(low)} to {percent(high)}; {rate.hits} of {rate.total})"


def _attacks(attacks: Sequence[Attack]) -> str:
    head = ["attack", "AUC", *(f"found at {most:.1%} false positives" for most in FALSE_POSITIVES)]
    rows = [
        [a.title, f"{a.auc:.3f}", *(rate_text(a.found[most]) for most in FALSE_POSITIVES)]
        for a in attacks
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    # Takes a second, and no other part of the command needs it.
    import pandas as pd

    table = pd.DataFrame(list(rows), columns=list(head)).to_html(index=False, border=0)
    return f"<div class='scroll'>{table}</div>"
