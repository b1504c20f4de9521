"""What is opened of others: regular files, bounded, no link on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedzge_flwr.common.errors import ConfigError, DataError, FedZGEError, RunFolderError
from fedzge_flwr.common.reading import (
    most_content,
    open_file,
    parse_json,
    place,
    read_file,
    read_within,
)
from tests.helpers.nobody import nobody, python_as_nobody

__all__ = ["nobody"]


def test_a_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_file(file, 5) == b"12345"
    assert read_within(tmp_path, "file", 5) == b"12345"
    for read in (lambda: read_file(file, 4), lambda: read_within(tmp_path, "file", 4)):
        with pytest.raises(OSError, match=r"has 0\.0 MB, 0\.0 at most are read"):
            read()


@pytest.mark.parametrize("where", ["x", "inner/x"])
def test_links_are_followed_to_a_folder_and_not_in_it(where: str, tmp_path: Path) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "real" / where).write_text("in")
    (tmp_path / "folder").symlink_to("real")
    assert read_within(tmp_path / "folder", where, 9) == b"in"
    (tmp_path / "real" / where).rename(tmp_path / "out")
    (tmp_path / "real" / where).symlink_to(tmp_path / "out")
    assert read_file(tmp_path / "folder" / where, 9) == b"in"
    with pytest.raises(OSError, match="is a link, which is not followed"):
        read_within(tmp_path / "folder", where, 9)


def test_a_folder_on_the_way_is_no_link_either(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "x").write_text("out")
    (tmp_path / "run" / "inner").symlink_to(tmp_path / "else")
    with pytest.raises(OSError, match="is a link"):
        read_within(tmp_path / "run", "inner/x", 9)


def test_what_is_missing_is_named_in_full(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read_within(tmp_path, "a/b", 9)
    assert caught.value.filename == str(tmp_path / "a/b")


def test_pipes_folders_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/zero")):
        with pytest.raises(OSError, match="is no regular file"):
            open_file(path)
        if path.parent == tmp_path:
            with pytest.raises(OSError, match="is no regular file"):
                read_within(tmp_path, path.name, 9)


def test_a_file_of_holes_is_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(10_000_000))
    with open_file(file) as opened:
        assert most_content(opened) == pytest.approx(1e9, rel=0.01)
    os.truncate(file, 0)
    os.truncate(file, 1 << 40)
    with open_file(file) as opened:
        assert most_content(opened) == 1 << 28


@pytest.mark.parametrize(
    "text", ["NaN", "1e999", "-Infinity", "9" * 400, "[" * 30 + "]" * 30, "[" * 100_000, "{", ""]
)
def test_what_is_no_plain_json(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_plain_json() -> None:
    assert parse_json('{"a": [1, -2.5, null, true, "x"]}') == {"a": [1, -2.5, None, True, "x"]}
    with pytest.raises(ValueError, match="a number is beyond 10"):
        parse_json("[11]", most=10)


def test_homes_of_nobody() -> None:
    assert place("~/x") == Path.home() / "x"
    with pytest.raises(ConfigError, match="'~nobody-at-all/x': there is no such home folder here"):
        place("~nobody-at-all/x")


def test_places_that_cannot_be_looked_at(tmp_path: Path) -> None:
    """What asks what is there, after that, would raise what no user is meant to see."""
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / ("x" * 300), tmp_path / "loop"):
        with pytest.raises(
            ConfigError, match=r"^'k' = '.*': cannot be looked at \(.+\); give another"
        ):
            place(path, "k")
    assert place(tmp_path / "new" / "one", "k") == tmp_path / "new" / "one"
    (tmp_path / "file").touch()
    assert place(tmp_path / "file" / "one", "k") == tmp_path / "file" / "one"


def test_places_of_another_user(nobody: int, tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    closed = tmp_path / "closed"
    (closed / "in").mkdir(parents=True)
    closed.chmod(0o700)
    script = """
for path in sys.argv[1:]:
    try:
        place(path, "k")
    except ConfigError as error:
        print(error)
"""
    imports = (
        "from fedzge_flwr.common.errors import ConfigError\n"
        "from fedzge_flwr.common.reading import place"
    )
    done = python_as_nobody(imports, script, str(closed), str(closed / "in"))
    lines = [line.partition("': ")[2] for line in done.stdout.splitlines()]
    assert lines == ["cannot be looked at (Permission denied); give another path"] * 2, done.stderr


def test_a_relative_place_of_a_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = """
import os, sys
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.common.reading import place
os.chdir(sys.argv[1])
os.rmdir(sys.argv[1])
try:
    place("runs", "k")
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(gone)], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("'k' = 'runs': the folder that this was started in is gone")


@pytest.mark.parametrize("kind", [FedZGEError, ConfigError, DataError, RunFolderError])
def test_an_error_is_one_line_whatever_it_quotes(kind: type[FedZGEError]) -> None:
    text = str(kind("a\nb\x1b[31m\udc80é…→" + "x" * 10_000))
    assert text.startswith("a\\nb\\x1b[31m\\udc80é…→xxx")
    assert len(text) == 4001
    assert text.isprintable()
