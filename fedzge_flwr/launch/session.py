"""What every launch needs: a home, processes that are ended, progress, the verdict on a run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedzge_flwr.common.errors import ConfigError, FedZGEError, RunFolderError
from fedzge_flwr.common.files import atomic_write_text, make_folder
from fedzge_flwr.common.reading import place
from fedzge_flwr.config.owner import STATE_DIR_VARIABLE
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.spec import WITHOUT_FILES
from fedzge_flwr.launch.logs import first_error, keep, of_app
from fedzge_flwr.launch.machine import (
    cannot_be_written,
    check_output,
    cluster,
    make_home,
    past_proxies,
    remove_empty,
)
from fedzge_flwr.launch.processes import ProcessFamily
from fedzge_flwr.launch.progress import Progress
from fedzge_flwr.observers.lock import FolderLock
from fedzge_flwr.observers.naming import config_of, free_run_folder, run_to_resume

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, ``kill``, and a terminal that is closed."""

_POLL_S = 0.3
# Looking through the machine's processes takes longer than reading a run's files, from its clients.
_WATCH_S = 1.5
_SHORT_COMMAND_S = 120.0


class LaunchError(FedZGEError):
    """The run could not be started, or it failed; with what a log says first, and its path."""


@dataclass(frozen=True)
class Session:
    """A launch that goes on.

    Parameters
    ----------
    settings : Settings
        The run's settings.
    folder : Path
        The run folder: empty until the server takes it over, unless a run is resumed.
    overrides : Mapping[str, Any]
        The settings that differ from the app's defaults, for processes that work elsewhere.
    home : Path
        Folder of everything that is not to outlive the launch.
    family : ProcessFamily
        Starts processes, which are ended with the launch.
    progress : Progress
        Tells the user.
    """

    settings: Settings
    folder: Path
    overrides: Mapping[str, Any]
    home: Path
    family: ProcessFamily
    progress: Progress

    def start(self, name: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        """Start a process whose output goes to the log ``name``."""
        with self.log(name).open("wb") as output:
            return self.family.start(command, output)

    def log(self, name: str) -> Path:
        """Return the file of a process's output."""
        return self.home / f"{name}.log"

    def finish(self, name: str, command: Sequence[str | Path]) -> str:
        """Run a short command to its end and return its output.

        Raises
        ------
        LaunchError
            If it fails, or takes too long.
        """
        process = self.start(name, command)
        self.wait(process, name, lambda: process.poll() is not None, _SHORT_COMMAND_S)
        if process.returncode != 0:
            raise self.failed(f"{Path(command[0]).name} failed", name)
        return self.log(name).read_text(encoding="utf-8", errors="replace")

    def wait(
        self,
        process: subprocess.Popen[bytes],
        name: str,
        ready: Callable[[], bool],
        patience: float,
    ) -> None:
        """Wait until a process is ready.

        Raises
        ------
        LaunchError
            If it ends before, or takes longer than ``patience`` seconds.
        """
        ended = False
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            self.progress.now(f"waiting for {name}")
            self.family.watch()
            # Asked in this order: what has ended may have become ready first.
            ended = process.poll() is not None
            if ready():
                return
            if ended:
                break
            time.sleep(_POLL_S)
        if ended:
            raise self.failed(f"{name} ended ({outcome(process)}) before it was ready", name)
        raise self.failed(f"{name} was not ready within {patience:.0f} s", name)

    def follow(
        self,
        command: Sequence[str | Path],
        otherwise: str,
        lost: Callable[[], bool] = lambda: False,
    ) -> subprocess.Popen[bytes]:
        """Start the run and show its progress until the process that was started has ended.

        Parameters
        ----------
        command : Sequence[str | Path]
            Stays until the run has ended; its output is the log ``flower``.
        otherwise : str
            What is going on when the run folder does not say.
        lost : Callable[[], bool]
            Whether to wait no longer; asked now and then.

        Returns
        -------
        subprocess.Popen
            The process; it still runs if the run was ``lost``.
        """
        process = self.start("flower", command)
        watched = time.monotonic()
        while process.poll() is None:
            self.progress.poll(otherwise)
            if time.monotonic() - watched > _WATCH_S:
                self.family.watch()
                watched = time.monotonic()
                if lost():
                    break
            time.sleep(_POLL_S)
        return process

    def failed(self, what: str, name: str = "flower") -> LaunchError:
        """Return an error with the first cause that a log tells, and where the log is kept.

        Parameters
        ----------
        what : str
            What has failed.
        name : str
            Which log tells why.
        """
        log = self.log(name)
        said = of_app(log)
        kept = keep(self.home, self.folder) / log.name
        return LaunchError(f"{said or f'{what}: {first_error(log)}'} (log: {kept})")

    def written(self) -> int:
        """Return when the server last wrote its status, in nanoseconds; 0: never."""
        with suppress(OSError):
            return (self.folder / "config.json").stat().st_mtime_ns
        return 0

    def says_finished(self) -> bool:
        """Say whether the server wrote that all went well: the last thing that it does."""
        return bool(config_of(self.folder).get("status") == "finished")


@contextmanager
def session(
    run_config: Mapping[str, Any], environment: Callable[[Path], Mapping[str, str]]
) -> Iterator[Session]:
    """Check the settings, make a home, and afterwards end every process and remove the home.

    Parameters
    ----------
    run_config : Mapping[str, Any]
        Settings that differ from the app's defaults; relative paths in them are the user's.
    environment : Callable
        From the home to what the processes' environment has beside the user's.

    Raises
    ------
    ConfigError
        If a setting is of a wrong type or out of range; nothing has been started then. What names
        of parts there are, the app knows.
    RunFolderError
        If there is no run to resume, another writes it, its name is taken, or it cannot be written.
    LaunchError
        If a process cannot be ended.
    """
    settings = from_run_config(run_config)
    with (
        _run_folder(settings) as folder,
        _launched(run_config, settings, folder, environment) as launch,
    ):
        yield launch


@contextmanager
def _launched(
    run_config: Mapping[str, Any],
    settings: Settings,
    folder: Path,
    environment: Callable[[Path], Mapping[str, str]],
) -> Iterator[Session]:
    overrides = {**run_config, **_whole_paths(settings, folder)}
    home = make_home(os.environ)
    own = {**_states(folder), **_common(home), **environment(home)}
    family = ProcessFamily({**os.environ, **own}, home)
    completed = False
    try:
        with Progress(folder, settings.run.num_server_rounds) as progress:
            if settings.run.resume:
                progress.say(f"resuming {folder}")
            progress.say(_in_short(settings))
            try:
                yield Session(settings, folder, overrides, home, family, progress)
            finally:
                progress.recap()
        completed = True
    finally:
        with _uninterrupted():
            left = family.end()
            if completed:
                _tidy(own, folder)
            else:
                _leave_unfinished(folder)
            if keep(home, folder, whole=not completed) != home:
                shutil.rmtree(home, ignore_errors=True)
    if left:
        raise LaunchError(f"these processes could not be ended: {[item.pid for item in left]}")


@contextmanager
def _run_folder(settings: Settings) -> Iterator[Path]:
    """Yield the run's folder, which no other launch is given; one that stays empty is removed."""
    if settings.run.resume:
        folder = run_to_resume(settings)
        # The server will hold it; but nothing needs to be started for one that is held already.
        FolderLock(folder).release()
        yield folder
        return
    made = _reserve(settings)
    try:
        check_output(made[0])
        yield made[0]
    finally:
        remove_empty(made)


def _reserve(settings: Settings) -> Sequence[Path]:
    """Make the folder of a run, and return it and its parents that were not there either."""
    folder = free_run_folder(settings)
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        make_folder(folder, exist_ok=False)
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.parent.is_dir():
            # Another run has just taken the name: there is a next one, or an explanation.
            return _reserve(settings)
        raise cannot_be_written(folder, error) from error
    return made


def _leave_unfinished(folder: Path) -> None:
    """See to the run folder of a run that did not end well, if it has begun."""
    if not os.path.lexists(folder / "config.json"):
        return
    # What another process writes by now is not this launch's, and stays as it is.
    with suppress(RunFolderError), FolderLock(folder):
        _mark_interrupted(folder)
        _tell_how_to_resume(folder)


def _in_short(settings: Settings) -> str:
    run = settings.run
    return (
        f"FedZGE: {run.num_clients} clients, {settings.data.dataset}, recipe {run.recipe}, "
        f"{run.num_server_rounds} rounds"
    )


def _whole_paths(settings: Settings, folder: Path) -> dict[str, str]:
    """Return the settings that are paths: the SuperLink works in a folder of its own."""
    return {
        "output-dir": str(folder.parent),
        # A folder that is gone on with may have been given any name since.
        "run-name": settings.run.run_name if settings.run.resume else folder.name,
        "resume": str(folder) if settings.run.resume else "",
        **_data_place(settings),
    }


def _data_place(settings: Settings) -> dict[str, str]:
    try:
        return {"data-dir": str(place(settings.data.data_dir, "data-dir"))}
    except ConfigError:
        # Nobody without a home need name a folder for what is in none.
        if settings.data.dataset in WITHOUT_FILES:
            return {}
        raise


def free_ports(number: int) -> list[int]:
    """Return ports of the loopback interface that nobody listens on, all different.

    Raises
    ------
    LaunchError
        If there are not so many, or so many files cannot be open.
    """
    try:
        with ExitStack() as stack:
            probes = [stack.enter_context(closing(socket.socket())) for _ in range(number)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            return [int(probe.getsockname()[1]) for probe in probes]
    except OSError as error:
        raise LaunchError(
            f"{number} free ports: {error.strerror}; lower 'num-clients', or raise the limit on "
            "open files (ulimit -n)"
        ) from error


def executable(name: str) -> Path:
    """Return a command of this Python's environment.

    Raises
    ------
    LaunchError
        If it is not there.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise LaunchError(f"{path} is missing: install the package into this Python's environment")
    return path


def outcome(process: subprocess.Popen[bytes]) -> str:
    """Say in a few words how a process that has ended did."""
    code = process.returncode
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"by signal {-code}"


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


def _common(home: Path) -> dict[str, str]:
    return {
        **past_proxies(os.environ),
        **_home_of_children(home),
        # Logs are read here as UTF-8, and no line of one may end who writes it.
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "FLWR_HOME": str(home / "flwr"),
        # torch keeps a cache there.
        "TMPDIR": str(home),
        # The app's dependencies are in this environment already; without this Flower builds
        # another of several gigabytes for each run.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def _home_of_children(home: Path) -> dict[str, str]:
    """Give those a home that have none: libraries keep caches there, and some insist."""
    try:
        place("~")
    except ConfigError:
        return {"HOME": str(home)}
    return {}


def _states(folder: Path) -> dict[str, str]:
    """Have clients keep their models in the run folder, so that the run can be resumed.

    Here one user owns all clients. Workers of a Ray cluster elsewhere may not see the folder.
    """
    if STATE_DIR_VARIABLE in os.environ or cluster(os.environ):
        return {}
    return {STATE_DIR_VARIABLE: str(folder / "clients")}


def _tidy(environment: Mapping[str, str], folder: Path) -> None:
    """Of a finished run's clients keep the final models only."""
    if STATE_DIR_VARIABLE in environment:
        for path in (folder / "clients").glob("*/*/*"):
            if path.name != "client.safetensors":
                path.unlink(missing_ok=True)


def _tell_how_to_resume(folder: Path) -> None:
    if any((folder / "checkpoints").glob("round-*")):
        quoted = shlex.quote(str(folder))
        told = [f"fedzge run --resume {quoted}"]
        # These two mean something to make, or within its recipe.
        if not set("'$") & set(str(folder)):
            told.insert(0, f"make run RESUME={quoted}")
        print(f"to go on from the last checkpoint: {', or '.join(told)}", flush=True)  # noqa: T201


def _mark_interrupted(folder: Path) -> None:
    """Correct the status of a run whose server had no time to; to be called when it is gone."""
    content = config_of(folder)
    with suppress(OSError):
        (folder / "progress.json").unlink(missing_ok=True)
        if content.get("status") in ("starting", "running"):
            text = json.dumps({**content, "status": "interrupted"}, indent=2)
            atomic_write_text(folder / "config.json", text + "\n")
