"""Processes that are found again and ended, whatever they have become."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

MARKER = "FEDZGE_LAUNCH_ID"


class ProcessFamily:
    """Processes that one launch started, with all their descendants.

    Flower's SuperLink starts the simulation, which starts Ray, which starts daemons and workers of
    its own. Some leave their parent: those inherit a marker in the environment. Some overwrite
    their environment with a title: those were seen as descendants earlier, by `watch`.

    Parameters
    ----------
    environment : Mapping[str, str]
        Environment of the processes; the marker is added.
    directory : Path
        Their working directory.
    """

    def __init__(self, environment: Mapping[str, str], directory: Path) -> None:
        self._id = uuid.uuid4().hex
        self._environment = {**environment, MARKER: self._id}
        self._directory = directory
        self._started: list[subprocess.Popen[bytes]] = []
        self._seen: set[psutil.Process] = set()
        self._present: list[psutil.Process] = []

    def start(self, command: Sequence[str | Path], output: IO[bytes]) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own: Ctrl-C reaches the launcher only."""
        process = subprocess.Popen(
            [str(part) for part in command],
            env=self._environment,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def run(self, command: Sequence[str | Path], timeout: float) -> str:
        """Run a short command and return what it prints on standard output.

        Raises
        ------
        subprocess.TimeoutExpired
            If it takes longer than ``timeout`` seconds.
        """
        finished = subprocess.run(
            [str(part) for part in command],
            env=self._environment,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return finished.stdout.decode(errors="replace")

    def watch(self) -> None:
        """Remember the started processes' present descendants; to be called now and then.

        It looks at every process of the machine, which takes milliseconds.
        """
        self._present = []
        for started in self._started:
            # Once waited for, its number may be another process's.
            if started.poll() is not None:
                continue
            try:
                process = psutil.Process(started.pid)
                self._present += [process, *process.children(recursive=True)]
            except psutil.Error:
                continue
        self._seen.update(self._present)

    def has_lost(self, names: Collection[str]) -> bool:
        """Whether of these names one, when last watched, has ended unasked, and none runs.

        Others of the name may be there for what somebody else has submitted: while one of them
        runs, nobody can tell which has ended.
        """
        running = []
        for process in self._present:
            try:
                if process.name() in names:
                    running.append(_runs(process))
            except psutil.Error:
                continue
        return bool(running) and not any(running)

    def alive(self) -> list[psutil.Process]:
        """Return the processes of the family that still run."""
        self.watch()
        for process in psutil.process_iter():
            try:
                if process.pid != os.getpid() and process.environ().get(MARKER) == self._id:
                    self._seen.add(process)
            except psutil.Error:
                # Gone, a zombie, or another user's.
                continue
        return [process for process in self._seen if _runs(process)]

    def end(self, patience: float = 5.0) -> list[psutil.Process]:
        """End them all: first asked, then, after ``patience`` seconds, killed; who is left."""
        for sign in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
            processes = self.alive()
            if not processes:
                break
            for process in processes:
                try:
                    process.send_signal(sign)
                except psutil.Error:
                    continue
            psutil.wait_procs(processes, timeout=patience)
        return self.alive()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
