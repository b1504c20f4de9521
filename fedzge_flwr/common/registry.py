"""Registries, which are dicts from name to entry, and looking names up in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.text import same_name

T = TypeVar("T")


class Registry(dict[str, T]):
    """Entries by name: the package's own, and what others add as to any dict.

    Parameters
    ----------
    own : Mapping[str, T]
        The package's own entries.
    """

    def __init__(self, own: Mapping[str, T]) -> None:
        super().__init__(own)
        self._own = dict(own)

    def added(self) -> dict[str, T]:
        """Return the entries that are not the package's own, replacements of those included."""
        return {name: entry for name, entry in self.items() if not self.is_own(entry, name)}

    def is_own(self, entry: object, name: str) -> bool:
        """Say whether an entry is the one that the package has under a name."""
        return name in self._own and self._own[name] is entry


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
    for known, entry in registry.items():
        if same_name(known) == same_name(name):
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
