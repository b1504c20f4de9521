"""An app in Flower's simulation, without a SuperLink: ``python -P engine.py SPECIFICATION``.

A SuperLink listens on a port and runs whatever any user of the machine sends to it. One run needs
none: this process runs the server's part of the app and Ray, which runs the clients'. It imports
nothing of this package, since what the app imports is the copy that is packed with the app.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from flwr.common.config import get_fused_config_from_dir, get_project_config
from flwr.simulation import run_simulation


class Configured:
    """A ServerApp or ClientApp that is given the run's settings; Flower gives them by a SuperLink.

    Parameters
    ----------
    app : Any
        The app.
    run_config : dict[str, Any]
        All settings of the run.
    """

    def __init__(self, app: Any, run_config: dict[str, Any]) -> None:
        self._app = app
        self._run_config = run_config

    def __call__(self, **arguments: Any) -> Any:
        """Call the app; afterwards its context is the one that Flower knows."""
        context = arguments["context"]
        flowers, context.run_config = context.run_config, dict(self._run_config)
        try:
            return self._app(**arguments)
        finally:
            context.run_config = flowers


def main(specification: Path) -> None:
    """Run what a JSON file of ``simulate`` says; the exit code is 0 only if the app succeeded."""
    given = json.loads(specification.read_text(encoding="utf-8"))
    folder = Path(given["app"])
    components = get_project_config(folder)["tool"]["flwr"]["app"]["components"]
    try:
        config = get_fused_config_from_dir(folder, given["run-config"])
    except ValueError as error:
        sys.exit(f"fedzge: run config: the app in {folder} refuses it: {error}")
    sys.path.insert(0, str(folder))
    try:
        server, client = (
            Configured(_attribute(components[name]), config) for name in ("serverapp", "clientapp")
        )
        _refuse_unknown_names(config)
        run_simulation(
            cast(Any, server),
            cast(Any, client),
            given["num-supernodes"],
            backend_config=given["backend-config"],
            verbose_logging=given["verbose"],
        )
    except BaseException:  # noqa: BLE001 - whatever it is, the process is to end with it
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of Flower may wait for what no longer comes.
        os._exit(1)


def _refuse_unknown_names(config: dict[str, Any]) -> None:
    """End with the line that the server would end with, before Ray is started, which takes long.

    The app has been imported, so that its own parts are registered. Of an app with settings of its
    own, nothing is known.
    """
    if "recipe" not in config:
        return
    # The app's own copy, by names: the launcher's is another.
    errors, parsing, build = (
        import_module(f"fedzge_flwr.{name}")
        for name in ("common.errors", "config.parsing", "server.build")
    )
    try:
        settings = parsing.from_run_config(config)
        build.check_names(settings)
        build.check_models(settings)
    except errors.FedZGEError as error:
        sys.stderr.write(f"fedzge: {error}\n")
        raise


def _attribute(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
