"""``flwr run`` in simulation: own SuperLink, own FLWR_HOME and port, verdict, clean-up."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedzge_flwr.config import Settings, from_run_config
from fedzge_flwr.errors import FedZGEError
from fedzge_flwr.files import atomic_write_text
from fedzge_flwr.launch.processes import ProcessFamily
from fedzge_flwr.launch.progress import Progress
from fedzge_flwr.naming import free_run_folder

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, ``kill``, and a terminal that is closed."""

_CONNECTION = "fedzge"
_POLL_S = 0.3
_SUPERLINK_START_S = 60.0
_SHORT_COMMAND_S = 60.0


class LaunchError(FedZGEError):
    """The run could not be started, or it failed."""


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
    settings = from_run_config(run_config)
    folder = free_run_folder(settings)
    # The SuperLink works in a folder of its own, where relative paths must not follow it.
    data_dir = Path(settings.data.data_dir).expanduser().absolute()
    overrides = {
        **run_config,
        "output-dir": str(folder.parent),
        "run-name": folder.name,
        "data-dir": str(data_dir),
    }
    home = Path(tempfile.mkdtemp(prefix="fedzge-"))
    family = ProcessFamily(_environment(home), home)
    completed = False
    try:
        with Progress(folder, settings.run.num_server_rounds) as progress:
            progress.say(
                f"FedZGE: {settings.run.num_clients} clients, {settings.data.dataset}, recipe "
                f"{settings.run.recipe}, {settings.run.num_server_rounds} rounds"
            )
            port = _start_superlink(family, home, progress)
            _write_connection(home, port)
            _submit_and_follow(family, home, app, overrides, settings, resources, progress)
            progress.poll("finished")
        completed = True
    finally:
        with _uninterrupted():
            left = family.end()
            if not completed:
                _mark_interrupted(folder)
                _keep_log(home, folder)
            shutil.rmtree(home, ignore_errors=True)
    if left:
        raise LaunchError(f"these processes could not be ended: {[item.pid for item in left]}")
    return folder


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let no impatient second Ctrl-C stop the clean-up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {sign: signal.signal(sign, signal.SIG_IGN) for sign in STOPPING_SIGNALS}
    try:
        yield
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)


def _environment(home: Path) -> dict[str, str]:
    environment = {
        **os.environ,
        "FLWR_HOME": str(home / "flwr"),
        # torch keeps a cache there.
        "TMPDIR": str(home),
        # The app's dependencies are in this environment already; without this Flower builds
        # another of several gigabytes for each run.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    # Ray's sockets live below its folder, and the length of their names is limited.
    if "RAY_TMPDIR" not in environment and len(str(home)) < 40:
        environment["RAY_TMPDIR"] = str(home)
    return environment


def _executable(name: str) -> Path:
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise LaunchError(f"{path} is missing: install the package into this Python's environment")
    return path


def _start_superlink(family: ProcessFamily, home: Path, progress: Progress) -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    log = home / "superlink.log"
    with log.open("wb") as output:
        superlink = family.start(
            [
                _executable("flower-superlink"),
                *("--insecure", "--simulation", "--disable-runtime-dependency-installation"),
                *("--host", "127.0.0.1", "--port", str(port)),
            ],
            output,
        )
    deadline = time.monotonic() + _SUPERLINK_START_S
    while time.monotonic() < deadline:
        progress.now("starting Flower's SuperLink")
        if superlink.poll() is not None:
            break
        if _healthy(port):
            return port
        time.sleep(_POLL_S)
    raise LaunchError(f"the SuperLink did not start:\n{_tail(log)}")


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def _write_connection(home: Path, port: int) -> None:
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    content = {"superlink": {"default": _CONNECTION, _CONNECTION: connection}}
    (home / "flwr").mkdir(exist_ok=True)
    atomic_write_text(home / "flwr" / "config.toml", tomli_w.dumps(content))


def _submit_and_follow(
    family: ProcessFamily,
    home: Path,
    app: Path,
    overrides: Mapping[str, Any],
    settings: Settings,
    resources: Resources,
    progress: Progress,
) -> None:
    config = home / "run-config.toml"
    atomic_write_text(config, tomli_w.dumps(dict(overrides)))
    federation = federation_config(settings, resources)
    log = home / "flower.log"
    with log.open("wb") as output:
        flwr = family.start(
            [
                *(_executable("flwr"), "run", app.resolve(), _CONNECTION, "--stream"),
                *("--run-config", config, "--federation-config", federation),
            ],
            output,
        )
    while flwr.poll() is None:
        progress.poll("starting Ray and the clients")
        family.watch()
        time.sleep(_POLL_S)
    text = log.read_text(encoding="utf-8", errors="replace")
    submitted = re.search(r"Successfully started run (\d+)", text)
    if submitted is None:
        raise LaunchError(f"flwr run refused the app:\n{_tail(log)}")
    status = _status(family, submitted.group(1))
    if status != "finished:completed":
        raise LaunchError(_failure(text) or f"the run ended as '{status}':\n{_tail(log)}")


def federation_config(settings: Settings, resources: Resources) -> str:
    """Return Flower's ``--federation-config`` for a run."""
    return (
        f"num-supernodes={settings.run.num_clients} "
        f"client-resources-num-cpus={resources.num_cpus} "
        f"client-resources-num-gpus={float(resources.num_gpus)} {resources.more}"
    )


def _status(family: ProcessFamily, run_id: str) -> str:
    """Ask how a run ended: ``flwr run`` exits with 0 whatever became of it."""
    listing = family.run(
        [_executable("flwr"), "list", _CONNECTION, "--run-id", run_id, "--format", "json"],
        timeout=_SHORT_COMMAND_S,
    )
    with suppress(ValueError, KeyError, IndexError):
        return str(json.loads(listing[listing.index("{") :])["runs"][0]["status"])
    return f"unknown ({listing.strip()[:200]})"


def _failure(log_text: str) -> str | None:
    """Return the one line in which the app said why it failed."""
    found = re.findall(r"fedzge: (.+)", log_text)
    return found[-1].strip() if found else None


def _tail(log: Path, num_lines: int = 30) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-num_lines:])


def _keep_log(home: Path, folder: Path) -> None:
    """Keep Flower's log beside the results of a run that did not end well."""
    log = home / "flower.log"
    if log.is_file() and folder.is_dir():
        with suppress(OSError):
            shutil.copy(log, folder / "flower.log")


def _mark_interrupted(folder: Path) -> None:
    """Correct the status of a run whose server had no time to; to be called when it is gone."""
    path = folder / "config.json"
    with suppress(OSError, ValueError):
        (folder / "progress.json").unlink(missing_ok=True)
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["status"] not in ("starting", "running"):
            return
        atomic_write_text(path, json.dumps({**content, "status": "interrupted"}, indent=2) + "\n")
