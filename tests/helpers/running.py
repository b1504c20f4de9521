"""Running the real server app and client app in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from safetensors.torch import load_file

from tests.helpers.inprocess import InProcessGrid


def run_server(grid: InProcessGrid, config: dict[str, Any]) -> Path:
    """Run the ServerApp over a grid; return the run folder."""
    import server_app

    context = Context(
        run_id=7, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config)
    )
    server_app.app(grid, context)
    return folder_of(config)


def folder_of(config: dict[str, Any]) -> Path:
    return Path(config["output-dir"]) / config["run-name"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def central_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "central.safetensors")
