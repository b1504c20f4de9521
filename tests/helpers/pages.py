"""The documentation as files."""

from __future__ import annotations

from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"


PAGES = [
    path
    for path in (*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("*/README.md"))
    if not path.is_relative_to(ROOT / ".venv")
]
