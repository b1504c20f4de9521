"""``flwr run`` in simulation, on a SuperLink, FLWR_HOME and port of its own."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedzge_flwr.common.files import atomic_write_text
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.launch.session import CONNECTION, Session, executable, free_ports, session
from fedzge_flwr.launch.staging import stage

_SUPERLINK_START_S = 60.0


@dataclass(frozen=True)
class Resources:
    """What each client is given.

    Parameters
    ----------
    num_cpus : int
        CPUs a client; as many clients run at once as fit.
    num_gpus : float
        Share of a GPU a client, e.g. 0.1.
    more : str
        More of Flower's federation config, e.g. ``"init-args-num-gpus=1"``.
    """

    num_cpus: int = 1
    num_gpus: float = 0.0
    more: str = ""


def simulate(app: Path, run_config: Mapping[str, Any], resources: Resources) -> Path:
    """Run the app in simulation and wait for it.

    Parameters
    ----------
    app : Path
        The app's folder, with its ``pyproject.toml``.
    run_config : Mapping[str, Any]
        Settings that differ from the app's defaults.
    resources : Resources
        What each client is given.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    ConfigError
        If a setting is wrong; nothing has been started then.
    LaunchError
        If the run failed.
    """
    with session(run_config, environment) as launch:
        start_superlink(launch)
        _submit_and_follow(launch, app, resources)
    return launch.folder


def environment(home: Path) -> dict[str, str]:
    """Return what a simulation's processes have in their environment beside the usual."""
    own = {"RAY_USAGE_STATS_ENABLED": "0"}
    # Ray's sockets live below its folder, and the length of their names is limited.
    if "RAY_TMPDIR" not in os.environ and len(str(home)) < 40:
        own["RAY_TMPDIR"] = str(home)
    return own


def start_superlink(launch: Session) -> None:
    """Start a simulation's SuperLink, known to Flower's commands as `CONNECTION`.

    Raises
    ------
    LaunchError
        If it does not start.
    """
    (port,) = free_ports(1)
    superlink = launch.start(
        "superlink",
        [
            executable("flower-superlink"),
            *("--insecure", "--simulation", "--disable-runtime-dependency-installation"),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
    )
    launch.wait(superlink, "superlink", lambda: _healthy(port), _SUPERLINK_START_S)
    _write_connection(launch.home, port)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _write_connection(home: Path, port: int) -> None:
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    content = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
    (home / "flwr").mkdir(exist_ok=True)
    atomic_write_text(home / "flwr" / "config.toml", tomli_w.dumps(content))


def _submit_and_follow(launch: Session, app: Path, resources: Resources) -> None:
    federation = federation_config(launch.settings, resources)
    staged = stage(app.resolve(), launch.home / "app")
    launch.follow(
        [
            *(executable("flwr"), "run", staged, CONNECTION, "--stream"),
            *("--run-config", launch.run_config, "--federation-config", federation),
        ],
        "starting Ray and the clients",
    )


def federation_config(settings: Settings, resources: Resources) -> str:
    """Return Flower's ``--federation-config`` for a run."""
    return (
        f"num-supernodes={settings.run.num_clients} "
        f"client-resources-num-cpus={resources.num_cpus} "
        f"client-resources-num-gpus={float(resources.num_gpus)} {resources.more}"
    )
