"""Run an example here: python -m tests.helpers.run_example DIR CLIENTS 'key=value …' [STEPS].

STEPS: of distillation and of training a round, where an app's settings do not say.
"""

from __future__ import annotations

import sys
import tomllib
from functools import partial
from pathlib import Path

import torch
from flwr.app import Context, RecordDict

import fedzge_flwr


def main(folder: str, num_nodes: str, overrides: str = "", distill_steps: str = "") -> None:
    place = Path(folder).absolute()
    whole = tomllib.loads((place / "pyproject.toml").read_text())
    config = whole["tool"]["flwr"]["app"]["config"] | tomllib.loads(overrides)
    # Before this repository's own apps, which have the same names.
    sys.path.insert(0, str(place))
    if distill_steps:
        steps = int(distill_steps)
        fedzge_flwr.make_settings = partial(  # type: ignore[attr-defined]
            fedzge_flwr.make_settings, client_distill_steps=steps, min_local_steps=steps
        )
    import client_app
    import server_app
    from tests.helpers.inprocess import InProcessGrid

    assert Path(client_app.__file__ or "").parent == place
    torch.set_num_threads(1)
    # Of what an app does not seed itself: its clients' models.
    torch.manual_seed(0)
    context = Context(7, 0, {}, RecordDict(), config)
    server_app.app(InProcessGrid(client_app.app, config, int(num_nodes)), context)


if __name__ == "__main__":
    main(*sys.argv[1:])
