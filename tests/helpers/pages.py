"""The documentation as files."""

from __future__ import annotations

from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"


PAGES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("examples/*/README.md")]
