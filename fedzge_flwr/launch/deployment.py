"""A federation on this machine's loopback, by the scripts of ``deploy/``, for one run."""

from __future__ import annotations

import ssl
import urllib.request
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from fedzge_flwr.common.files import atomic_write_text
from fedzge_flwr.launch.guarded import SIGN
from fedzge_flwr.launch.session import LaunchError, Session, free_ports, session
from fedzge_flwr.launch.submission import CONNECTION, submit

_HOST = "127.0.0.1"
# Starting takes seconds; many nodes on few cores take long.
_START_S = 300.0


def deploy(app: Path, run_config: Mapping[str, Any]) -> Path:
    """Run the app on a SuperLink and SuperNodes with TLS and authentication, and wait for it.

    Every command but the waiting is one of ``deploy/``, as its guide gives it. Certificates, keys
    and database live as long as the launch.

    Parameters
    ----------
    app : Path
        The app's folder, with its ``pyproject.toml`` and ``deploy/``.
    run_config : Mapping[str, Any]
        Settings that differ from the app's defaults; ``num-clients`` SuperNodes are started.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    ConfigError
        If a setting is wrong; nothing has been started then.
    LaunchError
        If a script is missing or fails, or the run failed.
    """
    scripts = app.resolve() / "deploy"
    if not (scripts / "superlink.sh").is_file():
        raise LaunchError(f"{scripts} has no superlink.sh: give the repository with --app")
    with session(run_config, lambda _: {}) as launch:
        port, *node_ports = free_ports(1 + launch.settings.run.num_clients)
        start_superlink(launch, scripts, port)
        start_supernodes(launch, scripts, port, node_ports)
        settings = launch.home / "run-config.toml"
        atomic_write_text(settings, tomli_w.dumps(launch.overrides))
        submit(
            launch,
            [scripts / "submit.sh", CONNECTION, settings, "--stream"],
            "waiting for the SuperNodes",
        )
    return launch.folder


def start_superlink(launch: Session, scripts: Path, port: int) -> None:
    """Make certificates and start a SuperLink, known to Flower's commands as `CONNECTION`.

    Raises
    ------
    LaunchError
        If it does not start, or is open to other users of the machine.
    """
    certificates = launch.home / "certificates"
    launch.finish("certificates", [scripts / "certificates.sh", certificates, _HOST])
    superlink = launch.start(
        "superlink",
        [
            *(scripts / "superlink.sh", certificates, launch.home / "superlink"),
            *(_HOST, str(port)),
        ],
    )
    trust = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
    launch.wait(superlink, "superlink", lambda: _healthy(port, trust), _START_S)
    launch.progress.say(f"SuperLink on https://{_HOST}:{port}, nodes authenticated")
    launch.finish(
        "connection",
        [
            *(scripts / "connection.sh", CONNECTION),
            *(f"{_HOST}:{port}", certificates / "ca.crt"),
        ],
    )


def start_supernodes(launch: Session, scripts: Path, port: int, node_ports: list[int]) -> None:
    """Register as many SuperNodes as there are ports for, and connect them to a port here.

    Raises
    ------
    LaunchError
        If one does not start.
    """
    keys = launch.home / "keys"
    for partition, node_port in enumerate(node_ports):
        name = f"node-{partition}"
        launch.finish(f"key of {name}", [scripts / "node-key.sh", keys, name])
        launch.finish(
            f"registering {name}", [scripts / "register.sh", CONNECTION, keys / f"{name}.pub"]
        )
        node = launch.start(
            name,
            [
                *(scripts / "supernode.sh", f"{_HOST}:{port}"),
                *(launch.home / "certificates" / "ca.crt", keys / name, launch.home / name),
                *(str(node_port), f"partition-id={partition} num-partitions={len(node_ports)}"),
            ],
        )
        launch.wait(node, name, partial(_connected, launch.log(name)), _START_S)
        launch.progress.say(f"SuperNode {partition} of {len(node_ports)} is connected")


def _connected(log: Path) -> bool:
    return "SuperNode ID" in log.read_text(encoding="utf-8", errors="replace")


def _healthy(port: int, trust: ssl.SSLContext) -> bool:
    try:
        address = f"https://{_HOST}:{port}/health"
        # No proxy of the user's is asked for what is here.
        handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
        with urllib.request.build_opener(*handlers).open(address, timeout=2) as reply:
            if SIGN not in reply.headers:
                raise LaunchError("this Flower's SuperLink cannot be guarded from other users")
            return bool(reply.status == 200)
    except OSError:
        return False
