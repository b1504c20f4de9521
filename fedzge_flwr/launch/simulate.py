"""A run in simulation: Flower's engine and Ray, which no other user of the machine can reach."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.files import atomic_write_text
from fedzge_flwr.config.pairs import parse_pairs
from fedzge_flwr.launch.machine import check_cluster, check_resources, check_shares, cluster
from fedzge_flwr.launch.session import Session, outcome, session
from fedzge_flwr.launch.staging import stage

ENGINE = Path(__file__).with_name("engine.py")

_FIRST_RAY_WITH_TOKENS = (2, 52)

_FOR_RAY = {
    "client-resources-num-cpus": int,
    "client-resources-num-gpus": float,
    "init-args-num-cpus": int,
    "init-args-num-gpus": int,
    "init-args-logging-level": str,
    "init-args-log-to-driver": bool,
}
"""Those keys of Flower's ``--federation-config`` that a run here may be given, and their types."""


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
    for_ray = checked_ray_config(resources)
    with session(run_config, environment) as launch:
        if warning := exposure(version("ray")):
            launch.progress.say(f"  warning: {warning}")
        _run(launch, app, for_ray)
    return launch.folder


def environment(home: Path) -> dict[str, str]:
    """Return what a simulation's processes have in their environment beside the usual.

    Ray then listens on loopback alone and takes orders from nobody who has not read its token,
    which is in a file below the home. A cluster that is there already (``RAY_ADDRESS``) is as its
    owner made it.
    """
    own = {"RAY_USAGE_STATS_ENABLED": "0"}
    if cluster(os.environ):
        return own
    token = home / "ray-token"
    # The home is its owner's alone, and `atomic_write_text` would make the file the umask's.
    with os.fdopen(os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return {
        **own,
        "RAY_ADDRESS": "",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Ray's own folder is everybody's to write, and holds sockets.
        "RAY_TMPDIR": str(home),
        # Off, Ray's address is 127.0.0.1, on Linux too.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def exposure(ray: str) -> str:
    """Return the warning that a version of Ray calls for, or nothing."""
    if tuple(map(int, ray.split(".")[:2])) >= _FIRST_RAY_WITH_TOKENS:
        return ""
    return (
        f"Ray {ray} knows no tokens: while this runs, every user of this machine can run code as "
        f"you (pip install 'ray>={'.'.join(map(str, _FIRST_RAY_WITH_TOKENS))}')"
    )


def ray_config(resources: Resources) -> dict[str, dict[str, Any]]:
    """Return what Flower's engine is told about Ray.

    Raises
    ------
    ConfigError
        If a key or its type is not among those that a run may be given.
    """
    more = parse_pairs([resources.more], "--federation-config")
    found: dict[str, dict[str, Any]] = {
        "client_resources": {"num_cpus": resources.num_cpus, "num_gpus": float(resources.num_gpus)},
        "init_args": {"include_dashboard": False},
    }
    for key, value in more.items():
        kind = _FOR_RAY.get(key)
        if kind is None:
            raise ConfigError(f"--federation-config: '{key}' is none of {', '.join(_FOR_RAY)}")
        if type(value) not in ((int, float) if kind is float else (kind,)):
            raise ConfigError(f"--federation-config: '{key}' = {value!r} is no {kind.__name__}")
        part = "init_args" if key.startswith("init-args-") else "client_resources"
        name = key.removeprefix(f"{part.replace('_', '-')}-").replace("-", "_")
        found[part][name] = value
    return found


def checked_ray_config(resources: Resources) -> dict[str, dict[str, Any]]:
    """Return what Flower's engine is told about Ray, once the machine has what it asks for.

    Raises
    ------
    ConfigError
        As `ray_config`; if there are too few CPUs or GPUs here, or no Ray where ``RAY_ADDRESS``
        says.
    """
    found = ray_config(resources)
    clients, told = found["client_resources"], found["init_args"]
    given: dict[str, float] = {
        name: told[name] for name in ("num_cpus", "num_gpus") if name in told
    }
    check_shares(clients, given)
    address = cluster(os.environ)
    if address is None:
        check_resources(clients, given)
    elif given:
        raise ConfigError(
            f"--federation-config: init-args-num-… are not for a Ray cluster that runs already "
            f"(RAY_ADDRESS = '{address}'), which has what it has; leave them out"
        )
    else:
        check_cluster(address)
    return found


def _run(launch: Session, app: Path, for_ray: Mapping[str, Any]) -> None:
    specification = launch.home / "simulation.json"
    content = {
        "app": str(stage(app.resolve(), launch.home / "app")),
        "run-config": launch.overrides,
        "num-supernodes": launch.settings.run.num_clients,
        "backend-config": for_ray,
        "share-cores-among": 0 if _is_settled(for_ray) else launch.settings.run.participants,
        "verbose": False,
    }
    atomic_write_text(specification, json.dumps(content))
    engine = launch.follow(
        [sys.executable, "-P", ENGINE, specification],
        "importing PyTorch, starting Ray and the clients (the first time can take minutes)",
    )
    if engine.returncode != 0:
        raise launch.failed(f"the server's process ended ({outcome(engine)})")
    launch.progress.poll("finished")


def _is_settled(for_ray: Mapping[str, Any]) -> bool:
    """Say whether it is settled how many clients run at a time: by the user, a GPU or a cluster."""
    clients = for_ray["client_resources"]
    one_core_each = clients["num_cpus"] == 1 and not clients["num_gpus"]
    return not one_core_each or "num_cpus" in for_ray["init_args"] or bool(cluster(os.environ))
