"""The rules of the architecture, read from the imports."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT, modules_after

PACKAGE = ROOT / "fedzge_flwr"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path, *, everywhere: bool) -> set[str]:
    """Modules that a file imports; without ``everywhere`` only at its top level."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(names: set[str]) -> set[str]:
    # The package itself imports nothing: its public names are fetched when they are first used.
    return {name for name in names if name in SOURCES and name != "fedzge_flwr"}


def reachable(start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += within(imported(SOURCES[name], everywhere=True))
    return seen


def test_imports_go_one_way() -> None:
    graph = {
        name: within(imported(path, everywhere=False)) - {name} for name, path in SOURCES.items()
    }
    for package, path in SOURCES.items():
        # A package's __init__ may gather its own modules; they do not import it back.
        if path.name == "__init__.py":
            for name in graph:
                if name.startswith(f"{package}.") and package != "fedzge_flwr":
                    graph[name] -= {package}
    tuple(TopologicalSorter(graph).static_order())


SERVER_SIDE = [
    name
    for name in SOURCES
    if name.startswith(
        ("fedzge_flwr.server", "fedzge_flwr.zeroth_order.estimators", "fedzge_flwr.transfer")
    )
    or name.removeprefix("fedzge_flwr.")
    in {
        "strategy",
        "grid_clients",
        "grid_exchange",
        "roster",
        "checkpoints",
        "losses",
        "generators",
        "observers",
        "results",
        "training",
    }
]


@pytest.mark.parametrize("name", SERVER_SIDE)
def test_the_server_side_never_imports_data_loading(name: str) -> None:
    seen = reachable(name)
    assert not {other for other in seen if other.startswith("fedzge_flwr.data")} - {
        "fedzge_flwr.images.spec"
    }
    assert "fedzge_flwr.black_boxes.partition" not in seen


def test_client_and_strategy_never_import_each_other() -> None:
    clients = {
        "fedzge_flwr.client.endpoints",
        "fedzge_flwr.black_boxes.partition",
        "fedzge_flwr.black_boxes.contract",
    }
    servers = {"fedzge_flwr.strategy", "fedzge_flwr.grid.clients", "fedzge_flwr.server.phases"}
    for name in clients:
        assert not reachable(name) & servers
    for name in servers:
        assert not reachable(name) & clients


MATHS = ("losses", "zeroth_order", "training", "models", "generators", "server", "transfer")
MATHS += ("pixels", "data")
TRANSPORT = (
    "protocol",
    "client",
    "client_state",
    "guards",
    "grid_clients",
    "grid_exchange",
    "roster",
    "ledger",
)


@pytest.mark.parametrize("name", SOURCES)
def test_maths_and_transport_stay_apart(name: str) -> None:
    part = name.removeprefix("fedzge_flwr.").split(".")[0]
    roots = {other.split(".")[0] for other in imported(SOURCES[name], everywhere=True)}
    if part in MATHS:
        assert "flwr" not in roots
    if part in TRANSPORT:
        assert "torch" not in roots


def test_only_the_protocol_spells_actions_and_record_keys() -> None:
    spelled = {"query.hello", "train.local", "query.logits", "train.distill", "evaluate.local"}
    spelled |= {"message", "arrays", "wire-version"}
    for name, path in SOURCES.items():
        if name.startswith("fedzge_flwr.protocol") or name == "fedzge_flwr.common.errors":
            continue
        nodes = ast.walk(ast.parse(path.read_text()))
        constants = {node.value for node in nodes if isinstance(node, ast.Constant)}
        assert not constants & spelled, name


def test_light_imports() -> None:
    heavy = {"torch", "torchvision", "matplotlib", "pandas", "sklearn", "datasets", "ray"}
    assert not modules_after("import fedzge_flwr, fedzge_flwr.config") & heavy
    # What a client's process loads before it knows what it is asked.
    client = modules_after("import client_app")
    assert not client & {"torchvision", "matplotlib", "sklearn", "datasets", "flwr_datasets", "PIL"}
    server = modules_after("import server_app")
    assert not server & {"torchvision", "matplotlib", "sklearn", "datasets", "flwr_datasets"}
