"""Run an example here: python -m tests.helpers.run_example DIR CLIENTS 'key=value …' [STEPS].

STEPS: of distillation a round, for clients that are given no settings, in place of their 150.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import torch
from flwr.app import Context, RecordDict

from fedzge_flwr import make_settings
from fedzge_flwr.black_boxes import module


def main(folder: str, num_nodes: str, overrides: str = "", distill_steps: str = "") -> None:
    place = Path(folder).absolute()
    whole = tomllib.loads((place / "pyproject.toml").read_text())
    config = whole["tool"]["flwr"]["app"]["config"] | tomllib.loads(overrides)
    # Before this repository's own apps, which have the same names.
    sys.path.insert(0, str(place))
    import client_app
    import server_app
    from tests.helpers.inprocess import InProcessGrid

    if distill_steps:
        settings = make_settings(client_distill_steps=int(distill_steps))
        module.Settings = lambda: settings  # type: ignore[assignment,misc]
    assert Path(client_app.__file__ or "").parent == place
    torch.set_num_threads(1)
    context = Context(7, 0, {}, RecordDict(), config)
    server_app.app(InProcessGrid(client_app.app, config, int(num_nodes)), context)


if __name__ == "__main__":
    main(*sys.argv[1:])
