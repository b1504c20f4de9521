"""Looking names up in registries, which are plain dicts from name to entry."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from fedzge_flwr.common.errors import ConfigError

T = TypeVar("T")


def lookup(registry: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``registry[name]``, in whichever form of Unicode either is written.

    Parameters
    ----------
    registry : Mapping[str, T]
        The entries by name.
    name : str
        The name asked for.
    kind : str
        What the entries are, for the error, e.g. ``"model"``.

    Raises
    ------
    ConfigError
        If there is no such name; the message lists the known ones.
    """
    if name in registry:
        return registry[name]
    # Two that look the same on the screen: é as one character or as two.
    form = unicodedata.normalize("NFC", name)
    for known, entry in registry.items():
        if unicodedata.normalize("NFC", known) == form:
            return entry
    raise ConfigError(f"no {kind} named '{name}'; known: {', '.join(sorted(registry))}")


def one_of(value: str, literal: Any, name: str) -> None:
    """Check an argument that takes one of a few words.

    Parameters
    ----------
    value : str
        What was given.
    literal : Any
        The ``typing.Literal`` of what may be.
    name : str
        The argument's, for the error.

    Raises
    ------
    ConfigError
        If it is none of them; the message lists them.
    """
    known = get_args(literal)
    if value not in known:
        raise ConfigError(f"{name} = {value!r}: give one of {', '.join(map(repr, known))}")
