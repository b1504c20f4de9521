"""The documentation's snippets of Python, to be run as they stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from fedzge_flwr import (
    COPIES,
    DATASETS,
    ENSEMBLES,
    ESTIMATORS,
    GENERATORS,
    LOADERS,
    MODELS,
    OBJECTIVES,
    SOURCES,
)
from tests.helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
ADOPTING = (ROOT / "docs" / "adopting.md").read_text()


def snippets_of(page: str) -> dict[str, str]:
    return dict(re.findall(r"^```python (\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


SNIPPETS = snippets_of(EXTENDING)


@pytest.fixture
def registries() -> Iterator[None]:
    """As they were, afterwards."""
    registries: list[dict[str, Any]] = [
        *(COPIES, DATASETS, ENSEMBLES, ESTIMATORS, GENERATORS, LOADERS, MODELS),  # type: ignore[list-item]
        *(OBJECTIVES, SOURCES),  # type: ignore[list-item]
    ]
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def run_snippet(name: str, *replaced: tuple[str, str]) -> dict[str, Any]:
    """Run a snippet, with pieces of it replaced; return its names."""
    text = SNIPPETS[name]
    for old, new in replaced:
        assert old in text
        text = text.replace(old, new)
    names: dict[str, Any] = {}
    exec(compile(text, f"extending.md: {name}", "exec"), names)
    return names
