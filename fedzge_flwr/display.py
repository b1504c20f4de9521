"""Figures, and texts of others', as people read them."""

from __future__ import annotations


def printable(text: str, most: int = 300) -> str:
    """Return a text of others' as one line for a log: control characters escaped, and cut."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]
    )
    return shown if len(text) <= most and len(shown) <= most else f"{shown[:most]}…"


def percent(fraction: float | None) -> str:
    """Return a fraction in per cent, or a dash for what was not measured."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    """Return a length of time of at least 0 s in its largest whole unit: 40 s, 12 min, 3 h."""
    for length, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
