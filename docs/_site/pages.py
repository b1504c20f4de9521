"""Pages of the site that are made when it is built, of what lies elsewhere in the repository.

These are the API reference (of the package's public names), the examples' README files, the
changelog, the rules for contributors, and the page around a run's report.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fedzge_flwr

ROOT = Path(__file__).parents[2]

INCLUDED = {
    **{
        f"examples/{path.parent.name}.md": path.relative_to(ROOT).as_posix()
        for path in sorted(ROOT.glob("examples/*/README.md"))
    },
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "report.md": "docs/_site/report.md",
}
"""Pages, and the files of the repository that they are."""

GROUPS = {
    "Strategy": ("strategy", "server", "grid"),
    "Settings and errors": ("config", "common"),
    "Black boxes": ("black_boxes", "client"),
    "Images and data sets": ("images", "data"),
    "Queries and estimators": ("query", "zeroth_order", "wire"),
    "Models and objectives": ("learning", "synthesis"),
    "Observers": ("observers", "report"),
}
"""Pages of the API, and what each is about: the package's folders whose public names it has."""

OTHERS = "Other names"
"""The page of public names from any other folder."""

_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
_NAMED_FENCE = re.compile(r"^```(\w+) \w+$", re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made in the place of their folders in the navigation."""
    examples = [uri for uri in INCLUDED if uri.startswith("examples/")]
    api = ["api/index.md", *(_uri(title) for title in _by_group())]
    config.nav = _filled(config.nav, {"examples/": examples, "api/": api})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    made = {uri: (ROOT / source).read_text("utf-8") for uri, source in INCLUDED.items()}
    groups = _by_group()
    made["api/index.md"] = _index(groups)
    for title, objects in groups.items():
        blocks = [f"::: {fedzge_flwr.__name__}.{item.name}" for item in objects]
        made[_uri(title)] = "\n\n".join([f"# {title}", *blocks]) + "\n"
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(
    markdown: str, page: Page, config: MkDocsConfig, files: Files, **_: object
) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    uri = page.file.src_uri
    source = PurePosixPath(INCLUDED.get(uri, f"docs/{uri}"))
    pages = {file: made for made, file in INCLUDED.items()}

    def link(found: re.Match[str]) -> str:
        target = os.path.normpath(source.parent / found["path"])
        if target not in pages and not target.startswith("docs/"):
            # A file that is no page is only named; one that is not there is for MkDocs to find.
            return found["text"] if (ROOT / target).exists() else found[0]
        moved = pages.get(target, target.removeprefix("docs/"))
        path = os.path.relpath(moved, PurePosixPath(uri).parent)
        return f"[{found['text']}]({path}{found['anchor'] or ''})"

    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(link, prose) for prose in parts[::2]]
    # A second word names a snippet for the tests, and means something else to the site.
    parts[1::2] = [_NAMED_FENCE.sub(r"```\1", fence) for fence in parts[1::2]]
    return "".join(parts)


def _filled(nav: object, pages: dict[str, list[str]]) -> object:
    """Return a navigation with lists of pages for names of folders."""
    if isinstance(nav, list):
        return [_filled(item, pages) for item in nav]
    if isinstance(nav, dict):
        return {title: _filled(item, pages) for title, item in nav.items()}
    return pages.get(nav, nav) if isinstance(nav, str) else nav


def _by_group() -> dict[str, list[griffe.Object | griffe.Alias]]:
    """Return the public names by the title of their page."""
    package = griffe.load(fedzge_flwr.__name__, search_paths=[ROOT])
    groups: dict[str, list[griffe.Object | griffe.Alias]] = {
        title: [] for title in (*GROUPS, OTHERS)
    }
    titles = {folder: title for title, folders in GROUPS.items() for folder in folders}
    order = list(titles)

    def place(item: griffe.Object | griffe.Alias) -> tuple[int, str]:
        folder = _folder(item)
        return (order.index(folder) if folder in order else len(order)), item.canonical_path

    for item in sorted((package[name] for name in fedzge_flwr.__all__), key=place):
        groups[titles.get(_folder(item), OTHERS)].append(item)
    return {title: objects for title, objects in groups.items() if objects}


def _folder(item: griffe.Object | griffe.Alias) -> str:
    """Return the package's folder, or its module, in which a name is defined."""
    return item.canonical_path.split(".")[1]


def _uri(title: str) -> str:
    return f"api/{title.lower().replace(' ', '-')}.md"


def _index(groups: dict[str, list[griffe.Object | griffe.Alias]]) -> str:
    """Return the page that lists all names, each with the first sentence about it."""
    lines = [
        "# API",
        "",
        "All public names, which `fedzge_flwr` exports. Other modules may change between versions.",
    ]
    for title, objects in groups.items():
        lines += ["", f"## {title}", "", "| name | what it is |", "|---|---|", *_rows(objects)]
    return "\n".join(lines) + "\n"


def _rows(objects: Iterable[griffe.Object | griffe.Alias]) -> Iterable[str]:
    for item in objects:
        text = item.docstring.value if item.docstring else ""
        first = " ".join(text.split("\n\n")[0].split()).replace("|", r"\|")
        yield f"| [`{item.name}`][{fedzge_flwr.__name__}.{item.name}] | {first} |"
