"""Pickles of arrays and plain values, as CIFAR's files are, read without running anything of them.

A pickle is a program for a stack machine. The standard library's machine can be kept from calling
what the program names, but not from what a few bytes can make it do to memory and stack. The one
below knows arrays of integers, bytes, texts, numbers, lists, tuples and dictionaries. Names are
compared, never looked up; ``pickletools`` takes the program apart and runs none of it.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_MOST_STEPS = 5_000_000
_INTEGERS = frozenset({"u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"})
_CONSTANTS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
        *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)


class _Name(NamedTuple):
    """What a pickle wants to be imported."""

    module: str
    name: str


class _Type:
    """A data type that is being made."""

    def __init__(self, code: object) -> None:
        code = code.decode("latin-1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or code not in _INTEGERS:
            raise ValueError("it has an array that is not of integers")
        self.dtype: np.dtype[Any] = np.dtype(code)

    def set(self, state: object) -> None:
        """Take the byte order; nothing else is known of integers."""
        if not isinstance(state, tuple) or len(state) < 5 or state[2:5] != (None, None, None):
            raise ValueError("it has an array of a type that is no integer's")
        order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        if order == ">":
            self.dtype = self.dtype.newbyteorder(">")
        elif order not in ("|", "<", "="):
            raise ValueError("it has an array of an unknown order of bytes")


class _Array:
    """An array that is being made."""

    def __init__(self, values: npt.NDArray[Any] | None = None) -> None:
        self.values = values


def read_plain_pickle(data: bytes, most: int) -> Any:
    """Return what a pickle holds.

    Parameters
    ----------
    data : bytes
        A pickle of any protocol, from Python 2 too; texts of that are read as Latin-1.
    most : int
        Bytes that its arrays may have.

    Returns
    -------
    Any
        Numbers, texts, bytes, None, lists, tuples, dictionaries with texts as keys, and arrays of
        integers.

    Raises
    ------
    ValueError
        If it holds anything else, is damaged, or is made to fill the memory.
    """
    machine = _Machine(most)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count > _MOST_STEPS:
                raise ValueError(f"it takes more than {_MOST_STEPS:,} steps to read")
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise ValueError(f"it is damaged ({type(error).__name__})") from error
    return machine.result()


class _Machine:
    def __init__(self, most: int) -> None:
        self._left = most
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Do one step; `_STEPS` has those without an argument of interest here."""
        if name in _CONSTANTS:
            self._stack.append(argument)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "GLOBAL":
            self._stack.append(_Name(*argument.split(" ", 1)))
        elif name in _STEPS:
            _STEPS[name](self)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it is more than arrays, numbers and texts ({name})")

    def result(self) -> Any:
        """Return the one value that is left, arrays finished."""
        (value,) = self._stack
        return _finished(value)

    @property
    def top(self) -> Any:
        """The topmost value."""
        return self._stack[-1]

    def push(self, value: Any) -> None:
        """Put a value onto the stack."""
        self._stack.append(value)

    def mark(self) -> None:
        """Begin a group of values."""
        self._marks.append(len(self._stack))

    def memoize(self) -> None:
        """Keep the topmost value under the next number."""
        self._memo[len(self._memo)] = self._stack[-1]

    def take(self, count: int) -> list[Any]:
        """Take so many values from the stack."""
        if len(self._stack) < count:
            raise IndexError
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def group(self) -> list[Any]:
        """Take all values since the last mark."""
        return self.take(len(self._stack) - self._marks.pop())

    def extend(self, items: list[Any]) -> None:
        """Append to the list on top."""
        _a(list, self._stack[-1]).extend(items)

    def update(self, items: list[Any]) -> None:
        """Set keys and values, in turns, of the dictionary on top."""
        into = _a(dict, self._stack[-1])
        for key, value in zip(items[::2], items[1::2], strict=True):
            into[_a(str, key)] = value

    def dictionary(self) -> None:
        """Put a dictionary onto the stack, of the keys and values since the last mark."""
        items = self.group()
        self.push({})
        self.update(items)

    def name(self) -> None:
        """Put a name onto the stack that consists of the two texts on it."""
        module, name = self.take(2)
        self.push(_Name(_a(str, module), _a(str, name)))

    def call(self) -> None:
        """Make what a name and its arguments stand for."""
        name, arguments = self.take(2)
        if not isinstance(name, _Name):
            raise ValueError("it calls what is no name")
        match (name.module.replace("numpy._core", "numpy.core"), name.name):
            case ("numpy.core.multiarray", "_reconstruct"):
                self.push(_Array())
            case ("numpy", "dtype"):
                self.push(_Type(arguments[0]))
            case ("numpy.core.multiarray", "scalar"):
                self.push(int(self._array((), *arguments).item()))
            case ("numpy.core.numeric", "_frombuffer"):
                raw, type_, shape, order = arguments
                self.push(_Array(self._array(shape, type_, raw, fortran=order == "F")))
            case ("_codecs", "encode"):
                self.push(self._bytes(_a(str, arguments[0])))
            case ("__builtin__" | "builtins", "bytes") if arguments == ():
                self.push(b"")
            case _:
                raise ValueError(f"it wants {name.module}.{name.name}, which is not run")

    def build(self) -> None:
        """Give an array or a type, which stays on the stack, its state."""
        (state,) = self.take(1)
        of = self._stack[-1]
        if isinstance(of, _Type):
            of.set(state)
        elif isinstance(of, _Array):
            _, shape, type_, fortran, raw = state
            of.values = self._array(shape, type_, raw, fortran=bool(fortran))
        else:
            raise ValueError(f"it sets the state of a {type(of).__name__}")

    def _array(
        self, shape: object, type_: object, raw: object, *, fortran: bool = False
    ) -> npt.NDArray[Any]:
        dtype = _a(_Type, type_).dtype
        sizes = [_a(int, size) for size in _a(tuple, shape)]
        held = self._bytes(raw) if isinstance(raw, str) else raw
        if not isinstance(held, (bytes, bytearray)) or min(sizes, default=0) < 0:
            raise ValueError("it has an array that is not of integers")
        if math.prod(sizes) * dtype.itemsize != len(held):
            raise ValueError(f"it has an array of shape {tuple(sizes)} in {len(held):,} bytes")
        return np.ndarray(sizes, dtype, held, order="F" if fortran else "C")

    def _bytes(self, text: str) -> bytes:
        # A text can be named again and again, and each time be as large.
        self._left -= len(text)
        if self._left < 0:
            raise ValueError("its arrays are larger than a file of its size is believed to hold")
        return text.encode("latin-1")


_STEPS: Mapping[str, Callable[[_Machine], Any]] = {
    "MARK": _Machine.mark,
    "MEMOIZE": _Machine.memoize,
    "POP": lambda machine: machine.take(1),
    "POP_MARK": lambda machine: machine.group(),
    "NONE": lambda machine: machine.push(None),
    "NEWTRUE": lambda machine: machine.push(True),
    "NEWFALSE": lambda machine: machine.push(False),
    "EMPTY_LIST": lambda machine: machine.push([]),
    "EMPTY_TUPLE": lambda machine: machine.push(()),
    "EMPTY_DICT": lambda machine: machine.push({}),
    "DUP": lambda machine: machine.push(machine.top),
    "DICT": _Machine.dictionary,
    "LIST": lambda machine: machine.push(machine.group()),
    "TUPLE": lambda machine: machine.push(tuple(machine.group())),
    "TUPLE1": lambda machine: machine.push(tuple(machine.take(1))),
    "TUPLE2": lambda machine: machine.push(tuple(machine.take(2))),
    "TUPLE3": lambda machine: machine.push(tuple(machine.take(3))),
    "APPEND": lambda machine: machine.extend(machine.take(1)),
    "APPENDS": lambda machine: machine.extend(machine.group()),
    "SETITEM": lambda machine: machine.update(machine.take(2)),
    "SETITEMS": lambda machine: machine.update(machine.group()),
    "STACK_GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}


def _a(type_: type, value: Any) -> Any:
    """Return a value of just this type: texts and whole numbers have harmless hashes."""
    if type(value) is not type_:
        raise ValueError(f"it has a {type(value).__name__} where a {type_.__name__} belongs")
    return value


def _finished(value: Any) -> Any:
    """Return a value with arrays in the places of those that were being made, one level deep."""
    if isinstance(value, dict):
        return {
            key: item.values if isinstance(item, _Array) else item for key, item in value.items()
        }
    return value.values if isinstance(value, _Array) else value
