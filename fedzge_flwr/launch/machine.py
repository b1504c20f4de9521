"""What a run needs of the machine: looked at before anything starts, and by ``fedzge doctor``."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedzge_flwr.common.errors import ConfigError, RunFolderError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
_NO_PROXY = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
_ANSWER_S = 5.0
# What a client of gRPC, which Ray speaks, says first, and what it is answered: a frame's head of 9
# bytes, the fourth of which says of what kind it is (RFC 9113).
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
_FRAME, _FRAME_KIND, _SETTINGS = 9, 3, b"\x04"
# A socket's path has 107 bytes; Ray's below a launch's home takes 85 of them.
_LONGEST_PLACE = 22
_MANY = 10_000
_SHORT_PLACES = ("/tmp", "/var/tmp", "/dev/shm")


# -- loopback and proxies ---------------------------------------------------------------------


def past_proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables by which no program asks a proxy for what is on this machine."""
    given = [item for name in _NO_PROXY for item in environment.get(name, "").split(",")]
    if "*" in given:
        return dict.fromkeys(_NO_PROXY, "*")
    listed = dict.fromkeys([*(item.strip() for item in given if item.strip()), *LOOPBACK])
    return dict.fromkeys(_NO_PROXY, ",".join(listed))


def proxies_of_loopback(environment: Mapping[str, str]) -> list[str]:
    """Return the names of variables by which a proxy is asked for what is on this machine."""
    given = ",".join(environment.get(name, "") for name in _NO_PROXY[:2]).split(",")
    excepted = {item.strip() for item in given}
    if "*" in excepted or set(LOOPBACK[:2]) <= excepted:
        return []
    names = [name for low in _PROXIES for name in (low, low.upper())]
    return [name for name in names if environment.get(name)]


# -- Ray --------------------------------------------------------------------------------------


def cluster(environment: Mapping[str, str]) -> str | None:
    """Return the address of the Ray cluster that is to be used; None: a run starts its own."""
    address = environment.get("RAY_ADDRESS", "").strip()
    return None if address in ("", "local") else address


def check_cluster(address: str) -> None:
    """Check that something answers where ``RAY_ADDRESS`` says: Ray itself waits for minutes.

    Raises
    ------
    ConfigError
        If nothing does, or it is no address.
    """
    if address == "auto":
        # Ray looks for one on this machine, and says at once if there is none.
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    fix = "give HOST:PORT of a Ray cluster that runs, or unset it for one of the run's own"
    if not host or not port.isascii() or not port.isdigit():
        raise ConfigError(f"RAY_ADDRESS = '{address}' is no address; {fix}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S) as there:
            there.sendall(_HTTP2)
            answer = there.recv(_FRAME)
    except (OSError, OverflowError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"RAY_ADDRESS = '{address}': no Ray answers there ({why}); {fix}"
        ) from None
    # With TLS it answers something else.
    if not os.environ.get("RAY_USE_TLS") and answer[_FRAME_KIND : _FRAME_KIND + 1] != _SETTINGS:
        raise ConfigError(f"RAY_ADDRESS = '{address}': what answers there is no Ray; {fix}")


def check_resources(clients: Mapping[str, float], given: Mapping[str, float]) -> None:
    """Check that a client's share is one, and that this machine has it.

    Parameters
    ----------
    clients : Mapping[str, float]
        What each client is given: ``num_cpus`` and ``num_gpus``.
    given : Mapping[str, float]
        What Ray is told that there is, if it is told.

    Raises
    ------
    ConfigError
        If not even one client could run.
    """
    for name, option, fix in (
        ("num_cpus", "--client-cpus", "give a smaller number"),
        ("num_gpus", "--client-gpus", "leave it out, or look at CUDA_VISIBLE_DEVICES"),
    ):
        wanted = clients[name]
        # One CPU there is, and Ray takes a second to be asked.
        if wanted <= (name == "num_cpus") and name not in given:
            continue
        there = given.get(name, _ray_counts(name))
        if there is not None and there < wanted:
            what = {"num_cpus": "CPUs", "num_gpus": "GPUs"}[name]
            found = f"{there:g} {what}" if there else f"no {what.removesuffix('s')}"
            verb = "is" if there in (0, 1) else "are"
            raise ConfigError(f"{option} {wanted:g}: there {verb} {found} here for Ray; {fix}")


def check_shares(clients: Mapping[str, float], given: Mapping[str, float]) -> None:
    """Check what can be seen without a look at the machine; parameters as in `check_resources`.

    Raises
    ------
    ConfigError
        If a number is none that Ray takes.
    """
    cpus, gpus = clients["num_cpus"], clients["num_gpus"]
    if not 1 <= cpus < _MANY:
        raise ConfigError(f"--client-cpus {cpus:g}: give a whole number of CPUs, at least 1")
    if not 0 <= gpus < _MANY or (gpus > 1 and gpus != int(gpus)):
        raise ConfigError(
            f"--client-gpus {gpus:g}: give a share of a GPU such as 0.1, or a whole number of them"
        )
    # Ray counts shares in ten thousandths.
    if 0 < gpus < 1 / _MANY:
        raise ConfigError(f"--client-gpus {gpus:g}: give at least {1 / _MANY:g}, or 0")
    for name, number in given.items():
        if not 0 <= number < _MANY:
            key = f"init-args-{name.replace('_', '-')}"
            raise ConfigError(
                f"--federation-config: '{key}' = {number:g}: give at most {_MANY - 1}"
            )


def _ray_counts(name: str) -> float | None:
    """Return how many Ray will find; None: this version of Ray does not tell."""
    try:
        if name == "num_cpus":
            from ray._private.utils import get_num_cpus

            return float(get_num_cpus(override_docker_cpu_warning=True))
        from ray._private.accelerators import get_accelerator_manager_for_resource

        manager = get_accelerator_manager_for_resource("GPU")
        there = int(manager.get_current_node_num_accelerators())
        visible = manager.get_current_process_visible_accelerator_ids()
        return float(there if visible is None else min(there, len(visible)))
    except Exception:  # noqa: BLE001 - what is private to Ray may be anything; Ray will say then
        return None


# -- folders ----------------------------------------------------------------------------------


def make_home(environment: Mapping[str, str]) -> Path:
    """Make a folder that is its owner's alone, where Ray can make its sockets.

    Below ``RAY_TMPDIR`` or ``TMPDIR``. Where the latter is too long a path for sockets, or cannot
    be written, it is below another folder for temporary files.

    Raises
    ------
    ConfigError
        If there is no such folder, or ``RAY_TMPDIR`` is none.
    """
    fix = f"name a folder with RAY_TMPDIR that you may write to, of at most {_LONGEST_PLACE} bytes"
    if chosen := environment.get("RAY_TMPDIR"):
        place = Path(chosen).absolute()
        if problem := _problem_of(place, make=True):
            raise ConfigError(f"RAY_TMPDIR = '{place}' {problem}; {fix}")
        return Path(tempfile.mkdtemp(prefix="fedzge-", dir=place))
    for place in temporary_folders(environment):
        if not _problem_of(place):
            return Path(tempfile.mkdtemp(prefix="fedzge-", dir=place))
    places = ", ".join(map(str, temporary_folders(environment)))
    raise ConfigError(
        f"none of {places} can be written and is short enough for Ray's sockets; {fix}"
    )


def temporary_folders(environment: Mapping[str, str]) -> list[Path]:
    """Return where a launch's home may be, the best first."""
    named = [environment[name] for name in ("TMPDIR", "TEMP", "TMP") if environment.get(name)]
    return list(dict.fromkeys(Path(place).absolute() for place in (*named, *_SHORT_PLACES)))


def _problem_of(place: Path, *, make: bool = False) -> str:
    """Say what is wrong with a folder for a launch's home; nothing if it will do."""
    if len(os.fsencode(place)) > _LONGEST_PLACE:
        return f"has {len(os.fsencode(place))} bytes, too many for the sockets that Ray makes there"
    try:
        if make:
            place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"cannot be written ({error.strerror})"


def check_output(folder: Path) -> None:
    """Write where a run's folder will be; what is made for it is removed again.

    Parameters
    ----------
    folder : Path
        The run folder, or that in which it will be.

    Raises
    ------
    RunFolderError
        If it cannot be written.
    """
    made: Sequence[Path] = []
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        raise cannot_be_written(folder, error) from error
    finally:
        remove_empty(made)


def cannot_be_written(folder: Path, error: OSError) -> RunFolderError:
    """Return the error of a run's folder that cannot be made, or written to."""
    return RunFolderError(
        f"'output-dir': {folder} cannot be written ({error.strerror}); name a folder that you may "
        "write to: --output-dir DIR, or --run-config 'output-dir=\"DIR\"'"
    )


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, the inmost first; what someone has put into one in the meantime stays."""
    for path in folders:
        with suppress(OSError):
            path.rmdir()
