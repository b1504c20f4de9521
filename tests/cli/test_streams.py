"""Standard output of any encoding, closed, full or left by its reader: no command ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedzge_flwr.config.presets.catalogue import preset_names

PRINTING = """
from fedzge_flwr.cli.streams import enduring_streams
import sys
with enduring_streams():
    for number in range(int(sys.argv[1])):
        print(number, "é … – ± → \\udcff", flush=True)
    open(sys.argv[2], "w").write("done")
"""


def printed(
    tmp_path: Path, shell: str = "", lines: int = 1, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """What a shell sees of a process that prints; it has come to its end."""
    done = tmp_path / "done"
    command = [sys.executable, "-c", PRINTING, str(lines), str(done)]
    run = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$@" {shell}', "bash", *command],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONUTF8": "0", **environment},
    )
    assert done.read_text() == "done", run.stderr
    return run


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", r"0 é … – ± → \udcff"),
        ("ascii", r"0 \xe9 ... - +- -> \udcff"),
        ("latin-1", "0 é ... - ± -> \\udcff"),
        ("cp1252", "0 é … – ± -> \\udcff"),
    ],
)
def test_encodings(tmp_path: Path, encoding: str, expected: str) -> None:
    run = printed(tmp_path, PYTHONIOENCODING=encoding)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.decode(encoding).rstrip() == expected


def test_a_reader_that_has_enough(tmp_path: Path) -> None:
    run = printed(tmp_path, "| head -n 1", lines=20_000)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.decode().startswith("0 é")


def test_closed_streams(tmp_path: Path) -> None:
    run = printed(tmp_path, "<&- >&- 2>&-")
    assert run.returncode == 0


def test_a_full_disk_is_told_at_the_end(tmp_path: Path) -> None:
    run = printed(tmp_path, "> /dev/full")
    assert run.returncode == 1
    assert run.stderr == b"error: output could not be written (No space left on device)\n"


def test_files_do_not_get_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    """What a library writes to descriptor 2 must not land in a file that a run has opened."""
    code = (
        "from fedzge_flwr.cli.streams import enduring_streams\nimport os, sys\n"
        "with enduring_streams():\n    os.write(2, b'library')\n    file = open(sys.argv[1], 'w')\n"
        "    os.write(2, b'library')\n    assert file.fileno() > 2\n"
    )
    run = subprocess.run(
        ["bash", "-c", '"$@" 2>&-', "bash", sys.executable, "-c", code, str(tmp_path / "file")],
        check=False,
    )
    assert run.returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_the_command_uses_them() -> None:
    command = [sys.executable, "-m", "fedzge_flwr.cli", "presets"]
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    told = "error: output could not be written (No space left on device)\n"
    assert (run.returncode, run.stderr) == (1, told)
    whole = subprocess.run(command, capture_output=True, check=False, text=True)
    assert (whole.returncode, whole.stdout.split()) == (0, preset_names())
