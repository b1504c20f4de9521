"""What is said once, however often it is found: a process serves many clients and messages."""

from __future__ import annotations

import logging
from functools import cache

_LOGGER = logging.getLogger("flwr.fedzge")


def warn_once(subject: str, text: str) -> None:
    """Log a warning, unless this process has warned of the subject before.

    Parameters
    ----------
    subject : str
        What it is about. Texts of one subject may differ in their figures.
    text : str
        One line that names the thing and the fix.
    """
    if subject not in warned_of():
        warned_of().add(subject)
        _LOGGER.warning("%s", text)


@cache
def warned_of() -> set[str]:
    """Return what this process has warned of; ``cache_clear`` forgets it."""
    return set()
