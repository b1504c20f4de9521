"""CIFAR's files as attacks: pickles that act, and pickles that fill the memory or the stack."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.fabricate import make_cifar
from tests.helpers.hostile.case import Case, Place, mutated

_RAW = np.zeros((20, 3072), np.uint8)


class _Act:
    """Acts when it is unpickled."""

    def __init__(self, act: Callable[..., object], *arguments: object) -> None:
        self._act = act, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._act


def _cifar(content: Callable[[Place], bytes], name: str = "test_batch") -> Callable[[Place], Path]:
    def make(place: Place) -> Path:
        make_cifar(place.folder / "data", 10)
        (place.folder / "data" / "cifar-10-batches-py" / name).write_bytes(content(place))
        return place.data("cifar10")

    return make


def acting() -> Iterator[Case]:
    """Yield pickles that run something."""
    acts: dict[str, Callable[[Path], object]] = {
        "os.system": lambda canary: _Act(os.system, f"touch {canary}"),
        "subprocess": lambda canary: _Act(subprocess.Popen, ["touch", str(canary)]),
        "exec": lambda canary: _Act(exec, f"open({str(canary)!r}, 'w')"),
        "eval": lambda canary: _Act(eval, f"open({str(canary)!r}, 'w').close()"),
        "open": lambda canary: _Act(open, str(canary), "w"),
        "os.mkdir": lambda canary: _Act(os.mkdir, str(canary)),
        "np.load": lambda canary: _Act(np.load, str(canary.parent / "x.npy")),
        "getattr": lambda canary: _Act(getattr, os, "system"),
        "an array of objects": lambda canary: np.array(
            [_Act(os.system, f"touch {canary}")], dtype=object
        ),
    }
    for protocol in (0, 2, 4, 5):
        for what, act in acts.items():
            if what == "getattr" or (protocol in (0, 5) and what not in ("os.system", "exec")):
                continue

            def content(
                place: Place, act: Callable[[Path], object] = act, protocol: int = protocol
            ) -> bytes:
                whole = {"data": _RAW, "labels": list(range(10)) * 2, "x": act(place.canary)}
                return pickle.dumps(whole, protocol)

            yield Case(f"a pickle of protocol {protocol} with {what}", "doctor", _cifar(content))
    for name in ("data_batch_3", "test_batch"):
        act = acts["os.system"]
        yield Case(
            f"{name} is an act",
            "doctor",
            _cifar(lambda place, act=act: pickle.dumps(act(place.canary)), name),  # type: ignore[misc]
        )
    # What is not needed of the data set is not opened.
    yield Case(
        "batches.meta is an act",
        "doctor",
        _cifar(
            lambda place: pickle.dumps(_Act(os.system, f"touch {place.canary}")), "batches.meta"
        ),
        "harmless",
    )


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def by_hand() -> Iterator[Case]:
    """Yield pickles as no library writes them."""

    def system(place: Place) -> bytes:
        return _text(f"touch {place.canary}")

    crafted: dict[str, Callable[[Place], bytes]] = {
        "INST": lambda place: b"(S'touch " + str(place.canary).encode() + b"'\nios\nsystem\n.",
        "OBJ": lambda place: b"(cos\nsystem\n" + system(place) + b"o.",
        "NEWOBJ": lambda place: b"\x80\x02cos\nsystem\n" + system(place) + b"\x85\x81.",
        "STACK_GLOBAL": lambda place: (
            b"\x80\x04\x8c\x02os\x8c\x06system\x93" + system(place) + b"\x85R."
        ),
        "a name with dots": lambda place: (
            b"\x80\x04\x8c\x05numpy\x8c\x0da.b.os.system\x93" + system(place) + b"\x85R."
        ),
        "an attribute of numpy": lambda place: (
            b"\x80\x04\x8c\x05numpy\x8c\x0cf2py.os.system"[:-1]
            + b"m\x93"
            + system(place)
            + b"\x85R."
        ),
        "BUILD on a name": lambda place: (
            b"\x80\x02cnumpy\ndtype\n}" + _text("__code__") + b"K\x01sb."
        ),
        "BUILD on a function": lambda place: (
            b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}"
            + _text("__defaults__")
            + b")s\x86b."
        ),
        "an extension": lambda place: b"\x80\x02\x82\x01.",
        "a persistent name": lambda place: b"Pos.system\n.",
        "a call of a number": lambda place: b"\x80\x02K\x01K\x02\x85R.",
        "no STOP": lambda place: b"\x80\x02}",
        "nothing on the stack": lambda place: b".",
        "two values": lambda place: b"K\x01K\x02.",
        "a stack below its end": lambda place: b"0000.",
        "a mark that is not there": lambda place: b"te.",
        "a memo that is not there": lambda place: b"\x80\x02h\x07.",
        "its own list": lambda place: b"\x80\x02]q\x00h\x00a.",
    }
    bombs: dict[str, bytes] = {
        "a memo of 2³¹": b"\x80\x02]r\xff\xff\xff\x7f.",
        "bytes of 2⁶⁰": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",
        "a text of 2³¹": b"\x80\x04X\xff\xff\xff\x7fx.",
        "a frame of 2⁶²": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b".",
        "a great number": b"L" + b"9" * 5000 + b"L\n.",
        "tuples in tuples as a key": b"})" + b"\x85" * 500_000 + b"K\x01s.",
        "lists in lists": b"]" * 200_000 + b"a" * 199_999 + b".",
        "lists that double": b"]q\x00" + b"(h\x00h\x00lq\x00" * 60 + b".",
        "an array of a terabyte": (
            b"\x80\x02}" + _text("data") + b"cnumpy.core.multiarray\n_reconstruct\n"
            b"cnumpy\nndarray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85" + _text("b") + b"\x87Rs."
        ),
        "a text made bytes, often": (
            b"\x80\x02" + _text("x" * 1_000_000) + b"q\x00(c_codecs\nencode\nq\x01"
            + (b"h\x01h\x00" + _text("latin1") + b"\x86R") * 3000 + b"l."
        ),
        "an array of texts": pickle.dumps({"data": np.array(["a"] * 20), "labels": [1] * 20}),
        "an array of another size": pickle.dumps({"data": _RAW[:, :7], "labels": [1] * 20}),
        "floats": pickle.dumps({"data": _RAW / 2, "labels": [1] * 20}),
        "beyond bytes": pickle.dumps({"data": _RAW.astype(int) + 256, "labels": [1] * 20}),
        "labels in lists": pickle.dumps({"data": _RAW, "labels": [[1]] * 20}),
        "great labels": pickle.dumps({"data": _RAW, "labels": [10**30] * 20}),
        "other labels": pickle.dumps({"data": _RAW, "labels": [10] * 20}),
        "fewer labels": pickle.dumps({"data": _RAW, "labels": [1] * 19}),
        "no labels": pickle.dumps({"data": _RAW}),
        "no data": pickle.dumps({"labels": [1]}),
        "no dictionary": pickle.dumps([1, 2, 3]),
        "nothing": b"",
        "a page": b"<html>",
    }  # fmt: skip
    crafted |= {what: lambda _, data=data: data for what, data in bombs.items()}  # type: ignore[misc]
    for what, content in crafted.items():
        yield Case(f"a pickle with {what}", "doctor", _cifar(content))


def mutations() -> Iterator[Case]:
    """Yield real files with something changed."""
    whole = pickle.dumps({"data": _RAW[:, ::-1], "labels": list(range(10)) * 2}, 2)
    ends = whole[:300] + whole[-300:]
    for seed in range(24):
        data = mutated(ends if seed % 2 else whole, seed)
        yield Case(
            f"a pickle with change {seed}",
            "doctor",
            _cifar(lambda _, data=data: data),  # type: ignore[misc]
            "either",
        )
