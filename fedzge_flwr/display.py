"""Figures as people read them."""

from __future__ import annotations


def percent(fraction: float | None) -> str:
    """Return a fraction in per cent, or a dash for what was not measured."""
    return "–" if fraction is None else f"{100 * fraction:.1f} %"
