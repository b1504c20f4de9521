"""Six small runs and the SHA-256 of what each came to: ``python -m tests.helpers.identity``.

For changes that are to change no number: run it before and after. Real messages in this process,
one thread, half a minute; the hashes are those of one kind of processor and one build of torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message

from fedzge_flwr.config.presets.catalogue import paper_settings
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.running import folder_of, run_server

SMALL: dict[str, Any] = {
    "server-threads": 1,
    "num-clients": 4,
    "num-train-images": 400,
    "num-test-images": 200,
}
DEFAULT = {
    **SMALL,
    "num-server-rounds": 4,
    "synthetic-batch-size": 120,
    "memory-size": 300,
    "generator-share": 1.0,
    "generator-steps": 2,
    "central-distill-steps": 30,
    "client-distill-steps": 20,
    "min-local-steps": 4,
}
PAPER = {
    **paper_settings(),
    **SMALL,
    "num-server-rounds": 3,
    "synthetic-batch-size": 60,
    "local-epochs": 2,
    "central-distill-steps": 4,
}
HALF = {
    "fraction-train": 0.5,
    "local-models": "cnn,resnet18,cnn,resnet18",
    "central-model": "resnet18",
    "num-server-rounds": 2,
    "generator-width": 16,
}


def run(place: Path, name: str, config: dict[str, Any], **options: Any) -> dict[str, str]:
    """Run in a folder of this name; return the hashes of central model and generator."""
    import client_app

    config = {**config, "output-dir": str(place), "run-name": name}
    run_server(InProcessGrid(client_app.app, config, config["num-clients"], **options), config)
    return {
        model: hashlib.sha256(
            (folder_of(config) / f"{model}.safetensors").read_bytes()
        ).hexdigest()[:24]
        for model in ("central", "generator")
    }


def stop_in_round_3(message: Message) -> bool:
    if message.metadata.group_id == "3":
        raise KeyboardInterrupt
    return False


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = {
            "default": run(place, "default", DEFAULT),
            "preset paper": run(place, "paper", PAPER),
            "preset paper, half of the clients, CNN and ResNet": run(
                place, "half", {**PAPER, **HALF}
            ),
            "default, half of the clients": run(
                place, "default-half", {**DEFAULT, "fraction-train": 0.5}
            ),
        }
        os.environ["FEDZGE_STATE_DIR"] = str(place / "states")
        try:
            run(place, "stopped", DEFAULT, lose=stop_in_round_3)
        except KeyboardInterrupt:
            again = {**DEFAULT, "resume": str(place / "stopped")}
            found["default, stopped in round 3 and resumed"] = run(place, "stopped", again)
        found["default, with a state-dir"] = run(place, "kept", DEFAULT)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
