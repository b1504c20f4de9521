"""Opens every attack as a user would, and tells what came of it: a line of JSON for each.

``python -m tests.helpers.hostile.process FOLDER [STEP]``: every so many of them. It is a process of
its own, since an attack may end it, fill its memory, or never come back; Python's audit hook tells
what it does.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.hostile import data, pickles, runs
from tests.helpers.hostile.case import SECRET, Case, Place, make_outside

MOST_SECONDS = 60
_ACTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pickle.",
    "ctypes.",
    "socket.connect",
    "os.spawn",
)


def all_cases() -> list[Case]:
    """Return all attacks; no two have one name."""
    makers = (
        *(runs.special_files, runs.pictures, runs.configs, runs.rows, runs.presets, runs.mutations),
        *(pickles.acting, pickles.by_hand, pickles.mutations),
        *(data.idx, data.svhn, data.lists, data.arrays, data.own_pictures),
    )
    cases = [case for maker in makers for case in maker()]
    assert len({case.name for case in cases}) == len(cases)
    return cases


class Watch:
    """Notes what runs something, and what opens a file of a folder, while it is on."""

    def __init__(self, outside: Path) -> None:
        self._outside = str(outside)
        self.on = False
        self.acts: list[str] = []
        self.outside: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event.startswith(_ACTS):
            self.acts.append(event)
        if event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], (str, Path)):
            self.on = False
            if os.path.realpath(arguments[0]).startswith(self._outside):
                self.outside.append(str(arguments[0]))
            self.on = True


def open_it(case: Case, path: Path, place: Place) -> tuple[int, list[str]]:
    """Open an attack, and return the exit code and the lines of what went wrong."""
    if case.how == "own":
        from fedzge_flwr.common.errors import FedZGEError
        from fedzge_flwr.data.own import load_own
        from fedzge_flwr.images.spec import DatasetSpec

        try:
            load_own(str(path), DatasetSpec(10, (1, 8, 8)))
        except FedZGEError as error:
            return 1, str(error).splitlines()
        return 0, []
    if case.how == "doctor":
        from fedzge_flwr.cli.doctor import settings_and_data
        from fedzge_flwr.cli.given import Given
        from fedzge_flwr.common.errors import FedZGEError

        try:
            found = list(settings_and_data(Given(str(path), None, ())))
        except FedZGEError as error:
            return 1, str(error).splitlines()
        wrong = [finding.text for finding in found if finding.state == "wrong"]
        return int(bool(wrong)), [line for text in wrong for line in text.splitlines()]
    from typer.testing import CliRunner

    from fedzge_flwr.cli.app import app

    page = place.folder / "report.html"
    done = CliRunner().invoke(app, ["report", str(path), "-o", str(page)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert page.exists() == (done.exit_code == 0)
    return done.exit_code, done.stderr.splitlines()


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def look(case: Case, place: Place, watch: Watch) -> dict[str, Any]:
    """Make an attack, open it, and return what there is to say about it."""
    begun = time.monotonic()
    path = case.make(place)
    said, stderr = io.StringIO(), sys.stderr
    watch.acts, watch.outside = [], []
    started, failure, code, lines = time.monotonic(), "", -1, list[str]()
    sys.stderr = said
    watch.on = True
    try:
        with _at_most(MOST_SECONDS):
            code, lines = open_it(case, path, place)
    except BaseException as error:  # noqa: BLE001 - what should have been one line
        failure = f"{type(error).__name__}: {error}"[:500]
    finally:
        watch.on = False
        sys.stderr = stderr
    page = place.folder / "report.html"
    text = page.read_text() if page.exists() else ""
    return {
        "name": case.name,
        "outcome": case.outcome,
        "how": case.how,
        "code": code,
        "lines": lines,
        "failure": failure,
        "acts": watch.acts,
        "outside": watch.outside,
        "canary": place.canary.exists(),
        "secret": SECRET in "".join((text, said.getvalue(), *lines)),
        "page": text if 0 < len(text) < 20_000_000 else "",
        "page_mb": len(text) / 1e6,
        "leads_out": case.leads_out,
        "seconds": time.monotonic() - started,
        "making": started - begun,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    make_outside(folder / "outside")
    # What would be started to draw PostScript, and anything else by these names.
    (folder / "bin").mkdir()
    for name in ("gs", "gswin32c", "djpeg", "convert", "sh"):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n: > {folder}/canary\n")
        (folder / "bin" / name).chmod(0o700)
    os.environ["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    import_what_is_needed()
    watch = Watch(folder / "outside")
    step = int(sys.argv[2]) if sys.argv[2:] else 1
    for number, case in list(enumerate(all_cases()))[::step]:
        own = folder / f"{number:03}"
        own.mkdir()
        print(
            json.dumps(look(case, Place(own, folder / "outside", folder / "canary"), watch)),
            flush=True,
        )


def import_what_is_needed() -> None:
    """Import it before anything is watched: imports open, compile and start what they like."""
    import datasets  # noqa: F401
    import flwr_datasets  # noqa: F401
    import scipy.io  # noqa: F401
    from PIL import Image

    import fedzge_flwr.data.evaluation
    import fedzge_flwr.report.page
    import fedzge_flwr.server.build  # noqa: F401

    Image.init()


if __name__ == "__main__":
    main()
