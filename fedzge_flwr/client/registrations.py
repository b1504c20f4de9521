"""What has been registered, in the processes of Ray's that a simulation's clients run in.

Flower loads a ClientApp once, and sends it pickled to these. Functions of this package are pickled
by reference, so that there nothing would import the module that registered a model or a data set.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeAlias

from fedzge_flwr.common.registry import Registry

Registrations: TypeAlias = "dict[str, dict[str, Any]]"
"""Entries by name, by the place of their registry."""

_PLACES = {
    "fedzge_flwr.data.loading": "LOADERS",
    "fedzge_flwr.images.spec": "DATASETS",
    "fedzge_flwr.learning.models.catalogue": "MODELS",
    "fedzge_flwr.query.copies": "COPIES",
}
"""The registries that a client looks into, by their modules: of another room's, none is loaded."""


def registrations() -> Registrations:
    """Return what has been added to the registries that a client looks into."""
    loaded = [module for module in _PLACES if module in sys.modules]
    added = {module: _registry(module).added() for module in loaded}
    return {module: entries for module, entries in added.items() if entries}


def register_again(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Register what another process has. What has been added here already stays.

    A function that was pickled by value is another one each time.
    """
    for module, entries in found.items():
        registry = _registry(module)
        added = registry.added()
        registry.update({name: entry for name, entry in entries.items() if name not in added})


def _registry(module: str) -> Registry[Any]:
    registry: Registry[Any] = getattr(import_module(module), _PLACES[module])
    return registry
