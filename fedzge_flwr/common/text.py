"""Figures, and texts of others', as people read them."""

from __future__ import annotations

import statistics
import unicodedata
from collections.abc import Sequence

_MOST_NAMED = 10


def printable(text: str, most: int = 300) -> str:
    """Return a text of others' as one line for a log: control characters escaped, and cut."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]
    )
    return shown if len(text) <= most and len(shown) <= most else f"{shown[:most]}…"


def same_name(name: str) -> str:
    """Return a name in the one form of Unicode (NFC) in which equal names are equal.

    Keyboards and file systems differ in it: é is one character, or two.
    """
    return unicodedata.normalize("NFC", name)


def error_line(error: Exception) -> str:
    """Return an error's type, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def percent(fraction: float | None) -> str:
    """Return a fraction in per cent, or a dash for what was not measured."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def percent_spread(fractions: Sequence[float | None]) -> str:
    """Return mean ± standard deviation (no n − 1), in per cent, of those that were measured.

    Without the deviation for a single one; a dash if there is none.
    """
    known = [fraction for fraction in fractions if fraction is not None]
    if len(known) < 2:
        return percent(next(iter(known), None))
    return f"{100 * statistics.fmean(known):.1f} ± {100 * statistics.pstdev(known):.1f} %"


def duration(seconds: float) -> str:
    """Return a length of time of at least 0 s in its largest whole unit: 40 s, 12 min, 3 h."""
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def clients_named(partitions: Sequence[int]) -> str:
    """Return clients by their partitions, the first ten of many.

    Examples
    --------
    >>> clients_named([3]), clients_named([0, 2])
    ('client 3', 'clients 0, 2')
    """
    names = ", ".join(map(str, partitions[:_MOST_NAMED]))
    left = len(partitions) - _MOST_NAMED
    more = f" and {left} more" if left > 0 else ""
    return f"client{'s' * (len(partitions) > 1)} {names}{more}"
