"""The rooms of the package and the arrows between them: ``python -m tests.helpers.rooms``.

A room is an entry at the top of ``fedzge_flwr/``. An arrow is a pair of rooms of which one imports
the other anywhere in its files, within functions too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.helpers.paths import ROOT

PACKAGE = ROOT / "fedzge_flwr"
NAME = "fedzge_flwr"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    """The room of a module; the package itself is the public face, and no room."""
    return module.split(".")[1] if "." in module else ""


def imported(path: Path, *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; without ``everywhere`` only at its top level."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else iter(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def arrows() -> dict[tuple[str, str], list[str]]:
    """The modules behind each arrow (from, to)."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, path in SOURCES.items():
        here = room_of(module)
        for name in imported(path) & set(SOURCES):
            there = room_of(name)
            if here and there and here != there:
                found.setdefault((here, there), []).append(module)
    return found


def doors() -> list[str]:
    """The entries at the top of the package."""
    return sorted(
        path.name
        for path in PACKAGE.iterdir()
        if path.name[0] not in "._" or path.name == "__init__.py"
    )


def drawn_rooms() -> list[str]:
    """The rooms in the order of the tree in CONTRIBUTING, lower ones first."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (tree,) = re.findall(r"^```text\nfedzge_flwr/\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = [line.split()[0] for line in tree.splitlines() if re.match(r" \S", line)]
    return [name.rstrip("/").removesuffix(".py") for name in names]


def definitions() -> Iterator[tuple[str, ast.stmt, int]]:
    """Every class and function with its name and its length in lines, docstring included."""
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                yield f"{module}.{node.name}", node, node.end_lineno - node.lineno + 1


if __name__ == "__main__":
    print(f"{len(doors())} doors, {len(arrows())} arrows")
    for (here, there), modules in sorted(arrows().items()):
        print(f"{here} -> {there}: {', '.join(sorted(set(modules)))}")
