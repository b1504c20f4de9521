"""What a machine lacks to run FedZGE, found one by one, each with what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console

from fedzge_flwr.cli.given import Given
from fedzge_flwr.common.errors import FedZGEError, MissingDataError
from fedzge_flwr.common.reading import place
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.spec import OWN
from fedzge_flwr.launch import machine
from fedzge_flwr.launch.simulate import Resources, checked_ray_config, exposure

State = Literal["ok", "note", "wrong"]

DEFAULT_PORTS = (8000, 9094)
"""The SuperLink's and the first node's in the deployment guide; a simulation takes what is free."""

_SIGNS = {"ok": "[green]ok   [/]", "note": "[yellow]note [/]", "wrong": "[red]WRONG[/]"}
_IMPORT_S = 600.0
# Of what is printed.
_CHARACTERS = "…→–±"
_LEAST_FREE_GB = 1.0

# Imports what breaks first when the two are not of one build: torchvision's compiled operators.
_PROBE = """
import torch, torchvision
from torchvision.ops import nms
print(torch.cuda.is_available(), torch.cuda.device_count())
"""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Parameters
    ----------
    what : str
        What was looked at, in a word or two.
    state : {"ok", "note", "wrong"}
        A note needs no mending; what is wrong keeps a run from working.
    text : str
        What was found.
    fix : str
        What to do about it, if something is to be done.
    """

    what: str
    state: State
    text: str
    fix: str = ""


def examine(
    given: Given, ports: Sequence[int] | None = None, resources: Resources | None = None
) -> bool:
    """Check everything, print each finding as it is made, and return whether nothing is wrong.

    Parameters
    ----------
    given : Given
        The settings of the run that is meant, for data and output.
    ports : Sequence[int], optional
        Ports that are to be free; without, `DEFAULT_PORTS`.
    resources : Resources, optional
        What each client of a simulation is to be given; without, the launcher's default.
    """
    console = Console(highlight=False, soft_wrap=True)
    wrong = 0
    for title, check in checks(given, ports or DEFAULT_PORTS, resources or Resources()):
        with console.status(f"{title} …"):
            findings = list(check())
        for finding in findings:
            wrong += finding.state == "wrong"
            console.print(f"{_SIGNS[finding.state]} {finding.what}: ", end="")
            console.print(finding.text, markup=False)
            if finding.fix:
                console.print(f"      → {finding.fix}", markup=False)
    console.print("nothing is wrong" if wrong == 0 else f"{wrong} to mend", markup=False)
    return wrong == 0


Check = Callable[[], Iterator[Finding]]


def checks(given: Given, ports: Sequence[int], resources: Resources) -> list[tuple[str, Check]]:
    """Return the checks in order, each with its title."""
    return [
        ("Python", python),
        ("user and terminal", user_and_terminal),
        ("network", proxies),
        ("temporary folder", temporary),
        ("Flower and Ray", frameworks),
        ("torch and torchvision (the first import can take minutes)", torch_pair),
        ("what clients are given", lambda: simulation(resources)),
        ("ports", lambda: free(ports)),
        ("settings, data and output", lambda: settings_and_data(given)),
    ]


def python() -> Iterator[Finding]:
    """Check the version."""
    text = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        yield Finding("Python", "ok", text)
    else:
        yield Finding("Python", "wrong", text, "use Python 3.11, 3.12 or 3.13")


def user_and_terminal() -> Iterator[Finding]:
    """Check that there is a home folder, and that the terminal takes what is printed."""
    try:
        yield Finding("home", "ok", str(place("~")))
    except FedZGEError:
        yield Finding(
            "home",
            "note",
            "none: HOME is not set, or empty, and the system knows no folder of this user's",
            "set HOME, or name 'output-dir' (and 'data-dir') with absolute paths",
        )
    encoding = sys.stdout.encoding
    try:
        _CHARACTERS.encode(encoding)
    except UnicodeError:
        yield Finding(
            "terminal",
            "note",
            f"its encoding is {encoding}, which lacks characters that are printed",
            "set PYTHONIOENCODING=utf-8, or a locale such as LANG=C.UTF-8",
        )


def proxies() -> Iterator[Finding]:
    """Check that nothing of this machine is asked of a proxy."""
    names = machine.proxies_of_loopback(os.environ)
    if names:
        past = machine.past_proxies(os.environ)
        yield Finding(
            "proxy",
            "note",
            f"{', '.join(names)} without an exception for this machine: make run and fedzge run "
            "ask no proxy for it, flwr run does",
            f"export NO_PROXY={past['NO_PROXY']} no_proxy={past['no_proxy']}",
        )


def temporary() -> Iterator[Finding]:
    """Check that a launch finds a folder, with a path that is short enough for sockets."""
    try:
        home = machine.make_home(os.environ)
    except FedZGEError as error:
        yield Finding("temporary folder", "wrong", str(error))
        return
    with suppress(OSError):
        home.rmdir()
    used, named = home.parent, machine.temporary_folders(os.environ)[0]
    if used == named or os.environ.get("RAY_TMPDIR"):
        yield Finding("temporary folder", "ok", f"{used}")
    else:
        yield Finding(
            "temporary folder",
            "note",
            f"{named} is too long for Ray's sockets, or cannot be written: {used} is used",
            "to choose another, name a short one with RAY_TMPDIR",
        )


def simulation(resources: Resources) -> Iterator[Finding]:
    """Check that Ray can be had, with what each client is to be given."""
    try:
        checked_ray_config(resources)
    except FedZGEError as error:
        yield Finding("simulation", "wrong", str(error))
        return
    address = machine.cluster(os.environ)
    yield Finding(
        "simulation",
        "ok",
        f"on the Ray cluster at {address}" if address else "with a Ray of its own",
    )


def frameworks() -> Iterator[Finding]:
    """Check that Flower's commands and Ray are there."""
    for name, fix in (
        ("flwr", "pip install 'flwr[simulation]>=1.41'"),
        ("ray", "pip install 'flwr[simulation]>=1.41' (simulation needs it)"),
    ):
        found = _version(name)
        if found is None:
            yield Finding(name, "wrong", "not installed", fix)
        elif name == "ray" and (warning := exposure(found)):
            yield Finding(name, "note", warning)
        else:
            yield Finding(name, "ok", found)
    for command in ("flwr", "flower-superlink"):
        if not (Path(sys.executable).parent / command).exists():
            yield Finding(
                "flwr",
                "wrong",
                f"the command {command} is not beside {sys.executable}",
                "install this package into this Python's environment",
            )


def torch_pair() -> Iterator[Finding]:
    """Import both in a process of their own: one of another build fails, or crashes."""
    versions = {name: _version(name) for name in ("torch", "torchvision")}
    text = ", ".join(f"{name} {found or 'not installed'}" for name, found in versions.items())
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=_IMPORT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield Finding(
            "torch",
            "wrong",
            f"{text}: importing takes over {_IMPORT_S:.0f} s",
            "install the environment on a local disk",
        )
        return
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        yield Finding(
            "torch",
            "wrong",
            f"{text} cannot be imported together: {last}",
            "take both from one index: pip install --force-reinstall torch torchvision",
        )
        return
    yield Finding("torch", "ok", text)
    available, count = done.stdout.split()[-2:]
    if available == "True":
        yield Finding("GPU", "ok", f"{count} seen by torch; give clients shares: --client-gpus 0.1")
    elif shutil.which("nvidia-smi"):
        yield Finding(
            "GPU",
            "wrong",
            "nvidia-smi is there, but torch sees no GPU",
            "install a torch built for the driver's CUDA, or look at CUDA_VISIBLE_DEVICES",
        )
    else:
        yield Finding("GPU", "note", "none; everything runs on CPUs")


def free(ports: Sequence[int]) -> Iterator[Finding]:
    """Check that ports can be listened on."""
    for port in ports:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                yield Finding(
                    "port",
                    "wrong",
                    f"{port} cannot be had ({reason}){_listener(port)}",
                    "end that process, or start the SuperLink on another port (PORT=…)",
                )
            else:
                yield Finding("port", "ok", f"{port} is free")


def settings_and_data(given: Given) -> Iterator[Finding]:
    """Check the settings, that the images are there and can be divided, and the output folder."""
    try:
        settings = from_run_config(given.run_config())
        _check_parts(settings)
        output = place(settings.run.output_dir, "output-dir")
    except FedZGEError as error:
        yield Finding("settings", "wrong", str(error))
        return
    yield from _data(settings)
    yield from _output(output)


def _check_parts(settings: Settings) -> None:
    # Takes seconds, and needs torch, of which the findings before this one tell.
    from fedzge_flwr.server.build import check_models, check_names

    check_names(settings)
    check_models(settings)


def _data(settings: Settings) -> Iterator[Finding]:
    from fedzge_flwr.data.loading import load_split
    from fedzge_flwr.data.partition import partition_indices

    data = settings.data
    if data.dataset == OWN:
        yield Finding("data", "note", "the nodes' own; each node's log says what it finds")
        return
    # Looking must not fetch gigabytes.
    looked = data.model_copy(update={"download": False})
    try:
        counts = [f"{len(load_split(looked, 'train')):,} training"]
        if "test" in (settings.run.server_evaluation, settings.run.client_evaluation):
            counts.append(f"{len(load_split(looked, 'test')):,} test")
        partition_indices(looked, settings.run.num_clients, settings.run.seed)
    except FedZGEError as error:
        if data.download and isinstance(error, MissingDataError):
            yield Finding("data", "note", f"{data.dataset} is not there; the run will fetch it")
        else:
            yield Finding("data", "wrong", str(error))
        return
    yield Finding(
        "data",
        "ok",
        f"{data.dataset}: {' and '.join(counts)} images for {settings.run.num_clients} clients",
    )


def _output(folder: Path) -> Iterator[Finding]:
    try:
        machine.check_output(folder)
    except FedZGEError as error:
        yield Finding(
            "output", "wrong", str(error), "name another with 'output-dir', or mend its permissions"
        )
        return
    there = next(path for path in (folder, *folder.parents) if path.exists())
    gigabytes = shutil.disk_usage(there).free / 1e9
    if gigabytes < _LEAST_FREE_GB:
        yield Finding(
            "output", "wrong", f"{folder}: {gigabytes:.1f} GB free", "make room, or name another"
        )
    else:
        yield Finding("output", "ok", f"{folder} can be written, {gigabytes:,.0f} GB free")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _listener(port: int) -> str:
    """Say who listens, if it may be known."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                name = psutil.Process(connection.pid).name()
                return f": process {connection.pid} ({name}) listens there"
    except psutil.Error:
        pass
    return ""
