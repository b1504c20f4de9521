"""The rules of the architecture: what importing a room loads, which way imports go, sizes."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests.helpers.paths import ROOT, modules_after
from tests.helpers.rooms import (
    NAME,
    SOURCES,
    arrows,
    definitions,
    doors,
    drawn_rooms,
    imported,
    room_of,
)

TREE = drawn_rooms()

# What importing all of a room loads, of this package and of the heavy libraries, and no more: rooms
# that its files import within functions are in `arrows`, not here.
LOADS: dict[str, set[str]] = {
    "common": set(),
    "images": {"common"},
    "query": {"common", "images"},
    "wire": {"common", "images", "query", "flwr"},
    "config": {"common", "images"},
    "learning": {"common", "images", "config", "torch", "torchvision"},
    "zeroth_order": {"common", "images", "query", "learning", "config", "torch"},
    "synthesis": {"common", "images", "config", "learning", "torch"},
    "data": {"common", "images", "config", "learning", "torch", "flwr"},
    "black_boxes": {"common", "images", "query", "config", "learning", "data", "torch"},
    "client": {"common", "images", "query", "wire", "config", "black_boxes", "flwr"},
    "server": {
        *("common", "images", "query", "config", "learning", "zeroth_order", "synthesis", "torch"),
    },
    "grid": {"common", "images", "query", "wire", "config", "server", "flwr"},
}
HEAVY = {"torch", "torchvision", "flwr", "ray", "matplotlib", "plotly", "pandas", "sklearn"}
HEAVY |= {"datasets", "flwr_datasets"}


@cache
def loads(module: str) -> frozenset[str]:
    """What a module of the package imports at its top, and all that this loads in turn."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if name in SOURCES:
            waiting += imported(SOURCES[name], everywhere=False)
    return frozenset(found)


def loaded_by(room: str) -> set[str]:
    """The rooms and heavy libraries that are loaded once all of a room is imported, as is read."""
    modules = {
        name
        for module in SOURCES
        if room_of(module) == room and not module.endswith("__main__")
        for name in loads(module)
    }
    rooms = {room_of(name) for name in modules & set(SOURCES)}
    return (rooms - {room, ""}) | ({name.split(".")[0] for name in modules} & HEAVY)


@pytest.mark.parametrize("room", ["query", "config", "synthesis"])
def test_what_is_read_of_imports_is_what_they_load(room: str) -> None:
    """In a fresh interpreter."""
    code = f"""
import importlib, pkgutil, sys
room = importlib.import_module("{NAME}.{room}")
for found in pkgutil.walk_packages(getattr(room, "__path__", ()), room.__name__ + "."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
print("\\n".join(sys.modules))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    modules = run.stdout.split()
    rooms = {room_of(name) for name in modules if name.startswith(f"{NAME}.")} - {room}
    assert loaded_by(room) == rooms | ({name.split(".")[0] for name in modules} & HEAVY)


@pytest.mark.parametrize("room", TREE)
def test_importing_a_room_loads_no_more_than_the_tree_allows(room: str) -> None:
    loaded = loaded_by(room)
    below = set(TREE[: TREE.index(room)])
    assert loaded - HEAVY <= below
    if room in LOADS:
        assert loaded <= LOADS[room]


def test_the_server_side_never_loads_data_loading() -> None:
    for room in ("server", "grid", "observers", "strategy"):
        assert not loaded_by(room) & {"data", "black_boxes", "client"}


def test_the_tree_in_contributing_is_the_folders() -> None:
    face = {"__init__.py", "py.typed"}
    assert sorted(TREE) == sorted(name.removesuffix(".py") for name in doors() if name not in face)
    assert len(TREE) <= 20


def test_every_file_is_in_the_tree() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text[text.index("```text\nfedzge_flwr/") :]
    words = set(re.findall(r"\w+", tree[: tree.index("\n```\n")]))
    for name, path in SOURCES.items():
        if path.name not in ("__init__.py", "__main__.py"):
            assert path.stem in words, name


def test_arrows_go_one_way() -> None:
    found = arrows()
    upward = {arrow: modules for arrow, modules in found.items() if _is_upward(*arrow)}
    assert upward == {}
    assert len(found) <= 115


def _is_upward(here: str, there: str) -> bool:
    return TREE.index(there) > TREE.index(here)


def test_no_circle_between_modules() -> None:
    graph = {
        name: (imported(path, everywhere=False) & set(SOURCES)) - {name, NAME}
        for name, path in SOURCES.items()
    }
    tuple(TopologicalSorter(graph).static_order())


def test_an_init_is_bare() -> None:
    """Else importing a room would load its neighbours."""
    for name, path in SOURCES.items():
        if path.name == "__init__.py" and name != NAME:
            assert len(ast.parse(path.read_text()).body) <= 1, name


def test_classes_and_functions_are_read_at_a_sitting() -> None:
    most = {ast.ClassDef: 200, ast.FunctionDef: 50, ast.AsyncFunctionDef: 50}
    large = {name: size for name, node, size in definitions() if size > most[type(node)]}  # type: ignore[index]
    assert large == {}


@pytest.mark.parametrize("recipe", ["efficient", "paper"])
def test_the_algorithm_is_one_short_file(recipe: str) -> None:
    lines = SOURCES[f"{NAME}.server.{recipe}"].read_text().splitlines()
    assert len(lines) <= 150


def test_only_the_wire_spells_actions_and_record_keys() -> None:
    spelled = {"query.hello", "train.local", "query.logits", "train.distill", "evaluate.local"}
    spelled |= {"message", "arrays", "wire-version"}
    for name, path in SOURCES.items():
        if room_of(name) == "wire" or name == f"{NAME}.common.errors":
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        constants = {node.value for node in nodes if isinstance(node, ast.Constant)}
        # Flower's own strategies send weights under that key.
        of_flower = {"arrays"} if name.endswith(".compare.methods.weights") else set()
        assert not constants & spelled - of_flower, name


def test_only_the_pixels_map_bytes_to_floats() -> None:
    """Nobody else counts to 255, but for the digits, which come in 17 greys, and pictures."""
    others = {f"{NAME}.{name}" for name in ("images.pixels", "observers.pictures", "data.loading")}
    for name, path in SOURCES.items():
        if name in others:
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        assert not any(isinstance(n, ast.Constant) and n.value in (255, 255.0) for n in nodes), name


def test_light_imports() -> None:
    heavy = {"torch", "torchvision", "matplotlib", "pandas", "sklearn", "datasets", "ray"}
    assert not modules_after("import fedzge_flwr, fedzge_flwr.config.parsing") & heavy
    # What a client's process loads before it knows what it is asked.
    client = modules_after("import client_app")
    assert not client & {"torchvision", "matplotlib", "sklearn", "datasets", "flwr_datasets", "PIL"}
    # What a mistake in the command line is told by: the wait is the import's.
    command = modules_after("import fedzge_flwr.cli.app, fedzge_flwr.cli.run")
    assert not command & (heavy | {"flwr", "scipy"})
    server = modules_after("import server_app")
    assert not server & {"torchvision", "matplotlib", "sklearn", "datasets", "flwr_datasets"}


def test_nothing_lies_at_the_top_that_nobody_put_there() -> None:
    """What a test or a command leaves in the folder that it is run from is committed by mistake."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("no git checkout")
    found = {line.split("/")[0] for line in listed.stdout.splitlines()}
    folders = {"fedzge_flwr", "tests", "benchmarks", "examples", "docs", "deploy", ".ci"}
    files = {"server_app.py", "client_app.py", "pyproject.toml", "README.md", "CONTRIBUTING.md"}
    files |= {"CHANGELOG.md", "LICENSE", "Makefile", "mkdocs.yml", ".gitignore"}
    assert found <= folders | files
