"""A process that holds run folders: ``python -m tests.helpers.holding FOLDER`` or ``CONFIG.json``.

A folder is locked, and that is all. With a run config the server and its clients run in the process
until clients are asked in the second round. Either way it then says so and stays.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def hold(folder: Path) -> None:
    from fedzge_flwr.observers.lock import FolderLock

    with FolderLock(folder):
        stay()


def run(config: dict[str, object]) -> None:
    import torch

    import client_app
    from fedzge_flwr.observers.run_folder import RunFolder
    from tests.helpers.inprocess import InProcessGrid
    from tests.helpers.running import run_server

    torch.set_num_threads(1)
    whole = RunFolder.on_phase

    def on_phase(self: RunFolder, round_: int, name: str) -> None:
        whole(self, round_, name)
        if (round_, name) == (2, "ask_clients"):
            stay()

    RunFolder.on_phase = on_phase  # type: ignore[method-assign]
    run_server(InProcessGrid(client_app.app, config, int(str(config["num-clients"]))), config)


def stay() -> None:
    print("holding", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    given = Path(sys.argv[1])
    if given.is_dir():
        hold(given)
    else:
        run(json.loads(given.read_text()))
