"""The name that a run's folder takes when the settings give none."""

from __future__ import annotations

import time

from fedzge_flwr.config import Settings


def automatic_run_name(settings: Settings) -> str:
    """Return local date and time, data set, recipe and seed, e.g. ``20260131-120000-…-s0``."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return f"{stamp}-{settings.data.dataset}-{settings.run.recipe}-s{settings.run.seed}"
