"""How many images a question asks about: the one rule, for both sides of the wire."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from fedzge_flwr.common.registry import Registry

Differences: TypeAlias = Literal["forward", "central"]
"""How a slope is measured: (f(x+εu) − f(x))/ε, or (f(x+εu) − f(x−εu))/2ε for twice the queries."""

COPIES: Registry[Callable[[int, bool], int]] = Registry({"surrogate": lambda q, two_sided: 1})
"""Copies of a generated image that an estimator asks about, of q and of ``differences`` being
"central", where they are not those of `num_copies`. Clients limit questions by it and build no
estimator, so one from outside the package that asks otherwise is named here on both sides."""


def num_copies(num_directions: int, differences: Differences) -> int:
    """Return the copies of an image along q directions: 1 + q, or 1 + 2q on both sides."""
    return 1 + num_directions * (2 if differences == "central" else 1)


def copies_asked(estimator: str, q: int, differences: Differences) -> int:
    """Return the copies of a generated image that an estimator asks about, the image included."""
    if estimator in COPIES:
        return COPIES[estimator](q, differences == "central")
    return num_copies(q, differences)


def num_queries(num_base: int, num_perturbed: int, copies: int) -> int:
    """Return the images asked about when some of the base images are asked about in copies."""
    return num_base + (copies - 1) * num_perturbed
