"""Stopping runs and going on with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from tests.helpers.inprocess import InProcessGrid
from tests.helpers.running import folder_of, rows_of, run_server


def resume(make_grid: Any, config: dict[str, Any], **options: Any) -> InProcessGrid:
    """Go on, as a new Flower run: its contexts are empty and its nodes have other ids."""
    again = {**config, "resume": str(folder_of(config)), "node-changes": "warn"}
    grid: InProcessGrid = make_grid(again, shuffle=5, **options)
    run_server(grid, again)
    return grid


def results(config: dict[str, Any]) -> list[Any]:
    """What a run has come to: its models and what is reported of its rounds."""
    folder = folder_of(config)
    kept = ("round", "central_accuracy", "loss", "participants", "queries_per_client")
    rows = [{key: row[key] for key in kept} for row in rows_of(folder)]
    return [
        (folder / f"{name}.safetensors").read_bytes() for name in ("central", "generator")
    ] + rows


def client_models(states: Path) -> dict[str, bytes]:
    """The bytes of every client's final model, by client."""
    return {
        path.parent.name: b"".join(value.tobytes() for _, value in sorted(load_file(path).items()))
        for path in states.glob("*/client-*/client.safetensors")
    }


PHASES = (
    "sample_clients",
    "compose_images",
    "ask_clients",
    "combine_answers",
    "update_generator",
    "remember",
    "distill_central",
    "train_generator",
    "distill_clients",
    "deliver_targets",
    "evaluate_clients",
    "evaluate_central",
    "save_checkpoint",
)


def assert_same_results(folder: Path, wanted: Path) -> None:
    for name in ("central", "generator"):
        file = f"{name}.safetensors"
        assert (folder / file).read_bytes() == (wanted / file).read_bytes()
    kept = ("round", "central_accuracy", "ensemble_accuracy", "client_accuracy", "participants")
    assert [[row[key] for key in kept] for row in rows_of(folder)] == [
        [row[key] for key in kept] for row in rows_of(wanted)
    ]


def unbroken(config: dict[str, Any]) -> Path:
    import client_app

    whole = {**config, "run-name": "unbroken"}
    return run_server(InProcessGrid(client_app.app, whole, 3), whole)
