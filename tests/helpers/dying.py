"""A federation in a process that dies by ``kill -9`` in every phase of its second round.

``python -m tests.helpers.dying CONFIG.json``: each time another process goes on. The server
and all clients are in the process; clients keep their models where ``FEDZGE_STATE_DIR`` says.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pandas  # noqa: F401
import torch
import torch._dynamo

import client_app
import fedzge_flwr.observers.pictures  # noqa: F401 - what the end of a run needs, loaded once
from fedzge_flwr.observers.run_folder import RunFolder
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.resuming import PHASES
from tests.helpers.running import folder_of, run_server


def live(config: dict[str, Any], phase: str, shuffle: int) -> None:
    """Run until a phase of the second round begins, if one is named."""
    whole = RunFolder.on_phase

    def on_phase(self: RunFolder, round_: int, name: str) -> None:
        whole(self, round_, name)
        if (round_, name) == (2, phase):
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.on_phase = on_phase  # type: ignore[method-assign]
    run_server(
        InProcessGrid(client_app.app, config, config["num-clients"], shuffle=shuffle), config
    )


def main(file: str) -> None:
    torch.set_num_threads(1)
    config = {**json.loads(Path(file).read_text()), "node-changes": "warn"}
    for number, phase in enumerate((*PHASES, "")):
        # What takes longest, importing torch and its like, is done once.
        child = os.fork()
        if child == 0:
            live(config, phase, number)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == (signal.SIGKILL if phase else 0), (phase, status)
        config["resume"] = str(folder_of(config))


if __name__ == "__main__":
    main(sys.argv[1])
