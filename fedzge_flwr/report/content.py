"""A page of sections and figures: one HTML file with everything in it."""

from __future__ import annotations

import re
from html import escape
from importlib.resources import files

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from fedzge_flwr.common.errors import RunFolderError

_MOST_PAGE_CHARACTERS = 64_000_000


class Content:
    """The parts of a page, and the figures that they have places for."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._figures: list[str] = []

    def section(self, title: str, body: str) -> None:
        """Add a section as wide as the page; the body is HTML."""
        self._parts.append(f"<section class='wide'><h2>{escape(title)}</h2>{body}</section>")

    def begin(self, html: str) -> None:
        """Add HTML as it is: an element that later parts lie in, or its end."""
        self._parts.append(html)

    def figure(self, title: str, figure: go.Figure | None, note: str = "") -> None:
        """Add a figure, if there is one, with a note below it."""
        if figure is None:
            return
        number = len(self._figures)
        self._figures.append(str(figure.to_json()))
        self._parts.append(
            f"<section><h2>{escape(title)}</h2><div class='figure' data-figure='{number}' "
            f"role='img' aria-label='{escape(title, quote=True)}'></div>"
            f"{f'<p class=note>{escape(note)}</p>' if note else ''}</section>"
        )

    def page(self, title: str) -> str:
        """Return the whole page.

        Raises
        ------
        RunFolderError
            If it would be too large for a browser.
        """
        template = (files(__package__) / "page.html").read_text(encoding="utf-8")
        # Within a script element nothing may look like its end.
        data = f"[{','.join(self._figures)}]".replace("</", "<\\/")
        texts: dict[str, str] = {
            "<!--title-->": escape(title),
            "<!--content-->": "\n".join(self._parts),
            "/*figures*/": data,
            "/*plotly*/": str(get_plotlyjs()),
        }
        # At once: a mark in a text that has been put in is that text's.
        parts = re.split(f"({'|'.join(map(re.escape, texts))})", template)
        page = "".join(texts.get(part, part) for part in parts)
        if len(page) > _MOST_PAGE_CHARACTERS:
            raise RunFolderError(
                f"the report would have {len(page) / 1e6:,.0f} MB, a page has "
                f"{_MOST_PAGE_CHARACTERS / 1e6:,.0f} at most; give fewer runs"
            )
        return page
