"""Sequence diagrams in Mermaid's notation, drawn as HTML when the site is built.

Mermaid itself would be a script of megabytes. What is drawn is what the pages use: participants,
notes and arrows; a line that is none of these ends the build.
"""

from __future__ import annotations

import html
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from pymdownx.superfences import SuperFencesException

_PARTICIPANT = re.compile(r"(?:participant|actor) (\w+)(?: as (.+))?")
_NOTE = re.compile(r"Note over (\w+)(?:,\s*(\w+))?: (.+)")
_ARROW = re.compile(r"(\w+?)(--?)>>(\w+): (.+)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have fences of Mermaid drawn."""
    options = config.mdx_configs.setdefault("pymdownx.superfences", {})
    fence = {"name": "mermaid", "class": "sequence", "format": draw}
    options["custom_fences"] = [*options.get("custom_fences", []), fence]
    return config


def draw(source: str, *_: Any, **__: Any) -> str:
    """Return a sequence diagram as HTML.

    Parameters
    ----------
    source : str
        The diagram in Mermaid's notation.

    Raises
    ------
    SuperFencesException
        If a line is not drawn; of any other error the fence would be shown as code.
    """
    title, *lines = [line.strip() for line in source.strip().splitlines()]
    if title != "sequenceDiagram":
        raise SuperFencesException(f"only sequence diagrams are drawn, not {title!r}")
    columns: dict[str, int] = {}
    boxes: list[str] = []
    row = 1

    def ends(*names: str) -> list[int]:
        if not columns.keys() >= set(names):
            raise SuperFencesException(f"a sequence diagram lacks a participant of {names}")
        return [columns[name] for name in names]

    for line in lines:
        if found := _PARTICIPANT.fullmatch(line):
            columns[found[1]] = len(columns) + 1
            boxes.append(_box("who", 1, ends(found[1]), found[2] or found[1]))
            continue
        row += 1
        if found := _NOTE.fullmatch(line):
            boxes.append(_box("note", row, ends(found[1], found[2] or found[1]), found[3]))
        elif found := _ARROW.fullmatch(line):
            start, end = ends(found[1], found[3])
            way = "forth" if start < end else "back"
            dashed = " dashed" if found[2] == "--" else ""
            boxes.append(_box(f"message {way}{dashed}", row, [start, end], found[4]))
        else:
            raise SuperFencesException(f"a line of a sequence diagram is not drawn: {line!r}")
    lives = [
        f'<i style="grid-column: {column}; grid-row: 1 / {row + 1}"></i>'
        for column in columns.values()
    ]
    return f'<div class="sequence" style="--columns: {len(columns)}">{"".join(lives + boxes)}</div>'


def _box(kind: str, row: int, columns: list[int], text: str) -> str:
    first, last = min(columns), max(columns)
    place = f"grid-row: {row}; grid-column: {first} / {last + 1}; --span: {last + 1 - first}"
    return f'<div class="{kind}" style="{place}"><span>{html.escape(text)}</span></div>'
