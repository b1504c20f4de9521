"""What a disk may hold when the power goes, from what a program has synced."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

Image = dict[str, bytes | None]
"""Contents by path below the root; None: a folder."""

KINDS = ("synced", "names", "all")


class Disk:
    """Takes images of a folder whenever something in it is synced.

    ``synced``: files and names that were synced, and nothing else. ``names``: all names are there,
    as a journal of names alone has them, and what was not synced is empty. ``all``: all that was
    written.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        # An open file keeps its number, so that a number means one file.
        self._held: dict[int, int] = {}
        self.images: list[dict[str, Image]] = []

    @contextmanager
    def watched(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        self._sync_folder(self._root)
        with patch.context() as patched:
            patched.setattr(os, "fsync", self._fsync)
            yield
        for handle in self._held.values():
            os.close(handle)

    def _fsync(self, handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if not path.is_relative_to(self._root):
            return
        if path.is_dir():
            self._sync_folder(path)
        else:
            self._contents[self._number(path)] = path.read_bytes()
        now = self._written(self._root)
        self.images.append(
            {
                "synced": dict(self._survivors(self._root.stat().st_ino, "")),
                "names": {
                    name: None
                    if data is None
                    else self._contents.get((self._root / name).stat().st_ino, b"")
                    for name, data in now.items()
                },
                "all": now,
            }
        )

    def _sync_folder(self, path: Path) -> None:
        self._names[self._number(path)] = {p.name: self._number(p) for p in path.iterdir()}

    def _number(self, path: Path) -> int:
        number = path.stat().st_ino
        if number not in self._held:
            self._held[number] = os.open(path, os.O_RDONLY)
        return number

    def _survivors(self, folder: int, prefix: str) -> Iterator[tuple[str, bytes | None]]:
        for name, number in self._names.get(folder, {}).items():
            if os.path.isdir(f"/proc/self/fd/{self._held[number]}"):  # noqa: PTH112
                yield prefix + name, None
                yield from self._survivors(number, f"{prefix}{name}/")
            else:
                yield prefix + name, self._contents.get(number, b"")

    def _written(self, root: Path) -> Image:
        return {
            str(path.relative_to(root)): None if path.is_dir() else path.read_bytes()
            for path in sorted(root.rglob("*"))
        }


def restore(image: Image, root: Path) -> None:
    """Write an image into a new folder."""
    root.mkdir()
    for name, data in sorted(image.items()):
        if data is None:
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
