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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, cast


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
    sys.path.insert(0, given["app"])
    # Ray's own processes take seconds to come up; this one imports Flower and the app meanwhile.
    with ThreadPoolExecutor(1) as beside:
        init_args = given["backend-config"]["init_args"]
        ray = beside.submit(_start_ray, init_args, given["share-cores-among"])
        try:
            _run(given, ray.result)
        except BaseException:  # noqa: BLE001 - whatever it is, the process is to end with it
            traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            # Threads of Flower may wait for what no longer comes, and Ray need not come up.
            os._exit(1)


def _run(given: dict[str, Any], until_ray_is_up: Callable[[], None]) -> None:
    from flwr.common.config import get_fused_config_from_dir, get_project_config
    from flwr.simulation import run_simulation

    folder = Path(given["app"])
    components = get_project_config(folder)["tool"]["flwr"]["app"]["components"]
    try:
        config = get_fused_config_from_dir(folder, given["run-config"])
    except ValueError as error:
        sys.stderr.write(f"fedzge: run config: the app in {folder} refuses it: {error}\n")
        raise
    server, client = (
        Configured(_attribute(components[name]), config) for name in ("serverapp", "clientapp")
    )
    _refuse_unknown_names(config)
    until_ray_is_up()
    run_simulation(
        cast(Any, server),
        cast(Any, client),
        given["num-supernodes"],
        backend_config=given["backend-config"],
        verbose_logging=given["verbose"],
    )


def _start_ray(init_args: dict[str, Any], num_clients: int) -> None:
    """Start Ray as Flower would, which finds it started then.

    Ray has one client run on each CPU. If ``num_clients``, which a round asks, is not 0, it is told
    of as many CPUs as `clients_at_once` says.
    """
    import ray

    # Ray's processes have the environment, and not what this process has put into `sys.path`.
    places = os.pathsep.join([*sys.path, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["PYTHONPATH"] = places
    told = {"logging_level": "WARNING", "log_to_driver": True, **init_args}
    if num_clients and (cores := _cores()):
        told["num_cpus"] = clients_at_once(num_clients, cores)
    # Workers of a cluster that runs already have another environment.
    elsewhere = {"env_vars": {"PYTHONPATH": places}} if os.environ.get("RAY_ADDRESS") else None
    ray.init(**told, runtime_env=elsewhere)


def _cores() -> int:
    """Return what Ray counts, which knows of containers; 0: this version of it does not tell.

    `fedzge_flwr.launch.machine` asks the same before a run, which this process cannot import.
    """
    try:
        from ray._private.utils import get_num_cpus

        return int(get_num_cpus(override_docker_cpu_warning=True))
    except Exception:  # noqa: BLE001 - what is private to Ray may be anything
        return 0


def clients_at_once(num_clients: int, cores: int) -> int:
    """Return how many clients to run at a time, such that cores idle least at the end of a phase.

    Clients work about equally long. Of five on two cores, two and two would run and then one alone,
    in three times the time of one. If three run at first, and share the cores, it is 2.5 times.

    Parameters
    ----------
    num_clients : int
        Clients asked in a round, at least 1.
    cores : int
        Cores, at least 1.

    Returns
    -------
    int
        From ``cores`` to one and a half times as many: each is a process of some 500 MB.
    """

    def lasts(at_once: int) -> float:
        full, rest = divmod(num_clients, at_once)
        return full * max(at_once / cores, 1.0) + (max(rest / cores, 1.0) if rest else 0.0)

    candidates = range(cores, max(cores, min(3 * cores // 2, num_clients)) + 1)
    return min(candidates, key=lambda at_once: (round(lasts(at_once), 9), at_once))


def _refuse_unknown_names(config: dict[str, Any]) -> None:
    """End with the line that the server would end with, before a round is begun.

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
