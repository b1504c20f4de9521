"""Run folders and presets that mean harm."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.hostile.case import Case, Outcome, Place, mutated, row

_PICTURE = "generated/round-000002.png"
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 moveto\nshowpage\n"
_SVG = b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><script>alert(1)</script></svg>"


def _file(name: str, change: Callable[[bytes], bytes]) -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        run = place.run()
        (run / name).write_bytes(change((run / name).read_bytes()))
        return run

    return make


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Place], Path]:
    def changed(data: bytes) -> bytes:
        config = json.loads(data)
        replaced = change(config)
        return json.dumps(config if replaced is None else replaced).encode()

    return _file("config.json", changed)


def _row(**fields: object) -> Callable[[Place], Path]:
    """Change the second of three rows; None for a field that is left out."""

    def changed(data: bytes) -> bytes:
        first, second, third = map(json.loads, data.splitlines())
        second |= {key: value for key, value in fields.items() if value is not ...}
        for key in [key for key, value in fields.items() if value is ...]:
            del second[key]
        return b"".join(json.dumps(item).encode() + b"\n" for item in (first, second, third))

    return _file("rounds.jsonl", changed)


def _instead(name: str, put: Callable[[Path, Place], object]) -> Callable[[Place], Path]:
    """Put something in the place of a file or folder of a run."""

    def make(place: Place) -> Path:
        run = place.run()
        (run / name).rename(place.folder / "before")
        put(run / name, place)
        return run

    return make


LINKS: dict[str, Callable[[Path, Place], object]] = {
    "a link to a secret": lambda path, place: path.symlink_to(place.outside / path.name),
    "a link to a text": lambda path, place: path.symlink_to(place.outside / "text"),
    "a relative link": lambda path, place: path.symlink_to(
        os.path.relpath(place.outside / "text", path.parent)
    ),
    "a link to where it was": lambda path, place: path.symlink_to(place.folder / "before"),
    "a link to itself": lambda path, place: path.symlink_to(path.name),
    "a link to nowhere": lambda path, place: path.symlink_to("nowhere"),
    "a link to zeros": lambda path, place: path.symlink_to("/dev/zero"),
    "a pipe": lambda path, place: os.mkfifo(path),
    "a folder": lambda path, place: path.mkdir(),
    "a terabyte of nothing": lambda path, place: (path.touch(), os.truncate(path, 1 << 40)),
}


def special_files() -> Iterator[Case]:
    """Yield what is no file of the run."""
    for name in ("config.json", "rounds.jsonl", _PICTURE):
        for what, put in LINKS.items():
            yield Case(f"{name} is {what}", "report", _instead(name, put))
    for what in ("a link to a secret", "a link to where it was", "a pipe"):
        outside: Callable[[Path, Place], object] = LINKS[what]
        if what == "a link to a secret":
            outside = lambda path, place: path.symlink_to(place.outside)  # noqa: E731
        yield Case(f"generated is {what}", "report", _instead("generated", outside))


def _png_of(width: int, height: int) -> Callable[[bytes], bytes]:
    """Change the size that a PNG declares, with its checksum."""

    def change(data: bytes) -> bytes:
        import struct
        import zlib

        head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
        return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]

    return change


def pictures() -> Iterator[Case]:
    """Yield what is not the picture that it seems."""
    changes: dict[str, Callable[[bytes], bytes]] = {
        "a page": lambda _: b"<html><script>alert(1)</script></html>",
        "an SVG": lambda _: _SVG,
        "PostScript": lambda _: _EPS,
        "nothing": lambda _: b"",
        "a bomb": _png_of(30_000, 30_000),
        "a bomb that Pillow only warns of": _png_of(10_000, 9_990),
        "large": _png_of(3000, 3000),
        "cut short": lambda data: data[: len(data) // 2],
        "of no width": _png_of(0, 8),
        "five megabytes": lambda data: data + bytes(5_000_000),
    }
    for what, change in changes.items():
        yield Case(f"a picture is {what}", "report", _file(_PICTURE, change))
    for what, form in (("a JPEG", "jpeg"), ("a GIF", "gif"), ("a TIFF", "tiff")):

        def save(path: Path, _: Place, form: str = form) -> None:
            Image.new("L", (80, 8)).save(path, format=form)

        yield Case(f"a picture is {what}", "report", _instead(_PICTURE, save))
    yield Case(
        "a picture has a page behind it",
        "report",
        _file(_PICTURE, lambda data: data + b"<script>alert('hidden')</script>"),
        "harmless",
    )
    for name in ("round-abc.png", "round-99999999999999999999.png", "round--1.png", "x\n.png"):

        def more(place: Place, name: str = name) -> Path:
            run = place.run()
            (run / "generated" / name).write_bytes(b"no picture")
            return run

        yield Case(f"a picture is called {name!r}", "report", more, "harmless")


def configs() -> Iterator[Case]:
    """Yield descriptions of runs that are none."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    texts = {
        "markup": evil,
        "a mark of the page, often": "/*plotly*/" * 20,
        "other marks of the page": "<!--content-->/*figures*/<!--title-->",
        "7 MB": "x" * 7_000_000,
        "lines": "a\nb\r\nc\x1b[31md\x00e",
        "half a character": "\ud800",
    }
    for what, text in texts.items():
        for where in ("status", "settings", "key", "clients", "seed", "versions"):

            def put(config: dict[str, Any], where: str = where, text: str = text) -> None:
                match where:
                    case "settings":
                        config["settings"] |= {"dataset": text, "run-name": text}
                    case "key":
                        config["settings"][text] = 1
                    case "clients" | "versions":
                        config[where] = {"0": text, text: "1"}
                    case _:
                        config[where] = text

            yield Case(f"{where} has {what}", "report", _config(put), "harmless")
    wrong: dict[str, Callable[[dict[str, Any]], Any]] = {
        "a list": lambda _: [],
        "a number": lambda _: 3,
        "settings as a list": lambda config: {**config, "settings": []},
        "no settings": lambda config: {**config, "settings": None},
        "no status": lambda config: {**config, "status": {"a": [1]}},
        "clients as numbers": lambda config: {**config, "clients": {"0": 3}},
        "counts as texts": lambda config: {**config, "class_counts": [["a"]]},
        "uneven counts": lambda config: {**config, "class_counts": [[1, 2], [3]]},
        "flat counts": lambda config: {**config, "class_counts": [1, 2]},
        "negative counts": lambda config: {**config, "class_counts": [[-1]]},
        "settings without end": lambda config: {
            **config, "settings": {f"key-{n}": n for n in range(100_000)}
        },
    }  # fmt: skip
    for what, change in wrong.items():
        yield Case(f"config.json is {what}", "report", _config(change))
    for what, change in {
        "a setting that is a table": {"settings": {"dataset": {"a": [1, {"b": 2}]}}},
        "no counts": {"class_counts": []},
        "no classes": {"class_counts": [[], []]},
    }.items():
        yield Case(
            f"config.json has {what}",
            "report",
            _config(lambda config, change=change: {**config, **change}),  # type: ignore[misc]
            "harmless",
        )
    raw = {
        "deep": b"[" * 100_000,
        "rather deep": b'{"status": "x", "settings": ' + b"[" * 500 + b"]" * 500 + b"}",
        "17 MB": b'{"status": "' + b"x" * 17_000_000 + b'", "settings": {}}',
        "not a number": b'{"status": "x", "settings": {}, "seconds": NaN}',
        "infinite": b'{"status": "x", "settings": {}, "seconds": 1e999}',
        "a number of 5,000 digits": b'{"status": "x", "settings": {}, "seed": '
        + b"9" * 5000
        + b"}",
        "not UTF-8": b'{"status": "\xff\xfe"}',
        "UTF-16": '{"status": "x"}'.encode("utf-16"),
        "empty": b"",
        "binary": bytes(range(256)),
    }
    for what, data in raw.items():
        outcome: Outcome = "either" if what == "UTF-16" else "refused"
        yield Case(
            f"config.json is {what}", "report", _file("config.json", lambda _, d=data: d), outcome
        )


def rows() -> Iterator[Case]:
    """Yield rounds that never were."""
    fields: dict[str, dict[str, object]] = {
        "a round before the last": {"round": 1},
        "a round after the next": {"round": 7},
        "round 0": {"round": 0},
        "round −1": {"round": -1},
        "half a round": {"round": 1.5},
        "no round": {"round": ...},
        "a round that is a list": {"round": []},
        "a text for an accuracy": {"central_accuracy": "high"},
        "a list for an accuracy": {"central_accuracy": [1]},
        "a great number": {"queries_per_client": 10**400},
        "a great accuracy": {"ensemble_accuracy": 1e300},
        "accuracies in a list": {"client_accuracy": [1, 2]},
        "accuracies of nobody": {"client_accuracy": {"x": 1}},
        "an accuracy that is a text": {"client_accuracy": {"0": "x"}},
        "bytes in a list": {"client_bytes": []},
        "bytes of nobody": {"client_bytes": {"0": 3}},
        "bytes as texts": {"client_bytes": {"0": {"down": {"a": "b"}, "up": {}}}},
        "a missing number": {"missing": [3]},
        "missing nobody": {"missing": 3},
        "missing a field": {"missing": [{"partition": 0}]},
        "sampled nobody": {"sampled": None},
        "sampled texts": {"sampled": "abc"},
        "classes as a number": {"answer_classes": 5},
        "fewer classes": {"answer_classes": [1, 2]},
        "negative classes": {"answer_classes": [-1] * 10},
        "recalls as a number": {"recalls": 5},
        "recalls above 1": {"recalls": {"central_recalls": [2.0]}},
        "a confusion that is not square": {"recalls": {"confusion": [[1, 2]]}},
        "a confusion of texts": {"recalls": {"confusion": [["x"]]}},
        "phases as a list": {"phase_seconds": [1]},
        "a phase that is a text": {"phase_seconds": {"a": "b"}},
        "phases without end": {"phase_seconds": {f"p{n}": 1.0 for n in range(10_000)}},
        "losses as a list": {"loss": []},
        "a loss that is a list": {"loss": {"a": []}},
        "deep losses": {"loss": json.loads("[" * 50 + "]" * 50)},
    }
    for what, change in fields.items():
        yield Case(f"a row has {what}", "report", _row(**change))
    evil = "<a href='javascript:alert(1)'>x</a><b>\n%{y}" + "x" * 1000
    for what, change in {
        "a phase with a link": {"phase_seconds": {evil: 1.0, "\ud800": 1.0}},
        "bytes for a link": {"client_bytes": {"0": {"down": {evil: 5}, "up": {"\ud800": 1}}}},
        "a long reason": {"skipped": "x" * 1_000_000},
        "accuracies of many": {"client_accuracy": {str(n): 0.5 for n in range(50_000)}},
        "a field of a later version": {"surprise": 1},
        "bytes that go sideways": {"client_bytes": {"0": {"sideways": {}}}},
        "no loss": {"loss": {"a": None}},
        "nothing measured": {"central_accuracy": None, "client_accuracy": {}, "client_bytes": {}},
    }.items():
        yield Case(f"a row has {what}", "report", _row(**change), "harmless")
    raw: dict[str, Callable[[bytes], bytes]] = {
        "a list": lambda data: data + b"[]\n",
        "a text": lambda data: data + b'"round"\n',
        "null": lambda data: data + b"null\n",
        "an empty line": lambda data: data + b"\n",
        "the rows twice": lambda data: data + data,
        "deep": lambda data: data + b"[" * 100_000 + b"\n",
        "deep objects": lambda data: data + b'{"a":' * 100_000 + b"\n",
        "not a number": lambda data: data.replace(b"0.5", b"NaN"),
        "infinite": lambda data: data.replace(b"0.5", b"-Infinity"),
        "beyond floats": lambda data: data.replace(b"0.5", b"1e999"),
        "not UTF-8": lambda data: data.replace(b"generator", b"\xff\xfe\xfd"),
        "nothing": lambda data: b"",
        "no whole row": lambda data: data.splitlines()[0],
        "in the order of another": lambda data: b"\n".join(data.splitlines()[::-1]) + b"\n",
        "65 MB": lambda data: data * (65_000_000 // len(data) + 1),
    }
    for what, changed in raw.items():
        yield Case(f"rounds.jsonl is {what}", "report", _file("rounds.jsonl", changed))


def many_rounds(place: Place) -> Path:
    """Make a run of more rounds than a page shows."""
    run = place.run(rounds=1)
    line = json.dumps(row(1).to_json())
    lines = [re.sub('"round": 1,', f'"round": {number},', line) for number in range(1, 20_001)]
    (run / "rounds.jsonl").write_text("\n".join(lines) + "\n")
    return run


def presets() -> Iterator[Case]:
    """Yield settings of someone else."""
    texts: dict[str, str | bytes] = {
        "a deep list": "a = " + "[" * 100_000,
        "a deep table": "a = " + "{b=" * 100_000,
        "two megabytes": "# " + "x" * 2_000_000,
        "not UTF-8": b"dataset = '\xff'",
        "binary": bytes(range(256)),
        "a key of two lines": '"a\\nb\\u001b[31m" = 1',
        "a long key": f"{'k' * 500_000} = 1",
        "a long value": f'dataset = "{"x" * 500_000}"',
        "a value of two lines": 'central-model = "a\\nb\\u001b[2J"',
        "a table": "[dataset]\nname = 'x'",
        "a date": "seed = 2026-01-01",
        "infinity": "alpha = inf",
        "not a number": "alpha = nan",
        "a great number": f"num-clients = {'9' * 4000}",
        "a number of 5,000 digits": f"num-clients = {'9' * 5000}",
        "clients without end": "num-clients = 1000000000000",
        "a path with a null": 'data-dir = "a\\u0000b"\ndataset = "mnist"',
        "a path of two lines": 'output-dir = "/tmp/a\\nb"',
        "a path without end": f'data-dir = "{"a/" * 100_000}"',
        "a long name in a path": f'output-dir = "/tmp/{"a" * 2000}"',
        "the home of nobody": 'dataset = "mnist"\ndata-dir = "~nobody-at-all/x"',
        "output at nobody's": 'output-dir = "~nobody-at-all/x"',
        "devices as data": 'dataset = "mnist"\ndata-dir = "/dev"',
        "processes as data": 'dataset = "cifar10"\ndata-dir = "/proc/self/fd"',
        "output onto a device": 'output-dir = "/dev/null/x"',
        "output into the kernel": 'output-dir = "/proc/sys/x"',
        "a data set above": 'dataset = "../../etc"',
        "a model that is code": "central-model = \"__import__('os').system('id')\"",
        "a name above": 'run-name = "../../x"',
        "a device that is code": 'server-device = "cuda; id"',
    }
    for what, text in texts.items():
        yield Case(
            f"a preset has {what}",
            "doctor",
            lambda place, t=text: place.preset(t),  # type: ignore[misc]
        )
    yield Case("a preset with extremes", "doctor", lambda p: p.preset("alpha = 1e308"), "either")
    yield Case("a preset with hardly any", "doctor", lambda p: p.preset("alpha = 1e-308"), "either")

    def link(place: Place) -> Path:
        (place.folder / "preset.toml").symlink_to(place.outside / "text")
        return place.folder / "preset.toml"

    def pipe(place: Place) -> Path:
        os.mkfifo(place.folder / "preset.toml")
        return place.folder / "preset.toml"

    yield Case("a preset is a pipe", "doctor", pipe)
    yield Case("a preset is a folder", "doctor", lambda place: place.folder)
    # Who names a link has named what it leads to: it may be read, and is not shown.
    yield Case("a preset is a link to a secret", "doctor", link, leads_out=True)


def mutations() -> Iterator[Case]:
    """Yield real files with something changed."""
    for name, count in (("config.json", 12), ("rounds.jsonl", 20), (_PICTURE, 12)):
        for seed in range(count):
            yield Case(
                f"{name} with change {seed}",
                "report",
                _file(name, lambda data, seed=seed: mutated(data, seed)),  # type: ignore[misc]
                "either",
            )
    yield Case("a run of 20,000 rounds", "report", many_rounds, "harmless")
