"""Strict encoding and decoding of messages.

A message is a RecordDict of a ConfigRecord "message" (wire version, type, scalar fields) and, if
the type has arrays, an ArrayRecord "arrays". Decoding refuses anything else in one line that names
the sender and the field, and looks at declared sizes before it touches a payload.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedzge_flwr.common.errors import ProtocolError
from fedzge_flwr.wire.messages import ArraySpec, ScalarSpec, WireMessage

WIRE_VERSION = 8

_SCALARS = "message"
_ARRAYS = "arrays"
_VERSION_KEY = "wire-version"
_TYPE_KEY = "type"
_STYPE = "numpy.ndarray"
# Flower's `ConfigRecord.count_bytes`, which its mod that logs sizes calls, refuses empty strings.
_EMPTY = "-"
MAX_STRING = 200
"""Characters of the longest string in a message."""

M = TypeVar("M", bound=WireMessage)


def _specs(cls: type[WireMessage]) -> tuple[dict[str, ScalarSpec], dict[str, ArraySpec]]:
    scalars: dict[str, ScalarSpec] = {}
    arrays: dict[str, ArraySpec] = {}
    for item in dataclasses.fields(cls):
        spec = item.metadata["wire"]
        if isinstance(spec, ScalarSpec):
            scalars[item.name] = spec
        else:
            arrays[item.name] = spec
    return scalars, arrays


def encode(message: WireMessage, arrays: ArrayRecord | None = None) -> RecordDict:
    """Encode a message.

    Parameters
    ----------
    message : WireMessage
        The message; its arrays must have the declared dtype.
    arrays : ArrayRecord, optional
        Its arrays as `encode_arrays` returned them, of this or of a message with the same ones.

    Raises
    ------
    TypeError
        If a field has another type than declared: a mistake on this side.
    """
    scalars, array_specs = _specs(type(message))
    values: dict[str, Any] = {_VERSION_KEY: WIRE_VERSION, _TYPE_KEY: type(message).__name__}
    for name, spec in scalars.items():
        value = getattr(message, name)
        if type(value) is not spec.kind:
            raise TypeError(f"{type(message).__name__}.{name} is a {type(value).__name__}")
        values[name] = _EMPTY if value == "" else value
    content = RecordDict({_SCALARS: ConfigRecord(values)})
    if array_specs:
        content[_ARRAYS] = encode_arrays(message) if arrays is None else arrays
    return content


def encode_arrays(message: WireMessage) -> ArrayRecord:
    """Encode a message's arrays alone; messages to several clients may share them.

    Raises
    ------
    TypeError
        If one has another dtype or number of dimensions than declared: a mistake on this side.
    """
    record = ArrayRecord()
    for name, spec in _specs(type(message))[1].items():
        array = getattr(message, name)
        if array.dtype != spec.dtype or array.ndim != len(spec.dims):
            raise TypeError(f"{type(message).__name__}.{name}: {array.dtype}{array.shape}")
        record[name] = to_array(array)
    return record


def decode(
    classes: Sequence[type[M]],
    content: RecordDict,
    *,
    sender: str,
    expect: Mapping[str, int | str] | None = None,
    dims: Mapping[str, int] | None = None,
    limits: Mapping[str, int] | None = None,
) -> M:
    """Decode a message of one of some known types: that which it says it is.

    Parameters
    ----------
    classes : Sequence[type[WireMessage]]
        The types of which one must have been sent.
    content : RecordDict
        What was received.
    sender : str
        Who sent it, for the error.
    expect : Mapping[str, int or str], optional
        Fields that must have a given value, of the types that have them.
    dims : Mapping[str, int], optional
        Dimensions whose value the receiver knows.
    limits : Mapping[str, int], optional
        Largest value of the dimensions that it does not know. Every dimension of
        ``classes`` is in ``dims`` or here.

    Raises
    ------
    ProtocolError
        If anything is missing, extra, of the wrong type, shape or size, not finite or out of range.
    """
    config = _scalars(content, sender)
    cls = _type_of(config, classes, sender)
    scalars, arrays = _specs(cls)
    _same_keys(sender, "message", set(content), {_SCALARS, _ARRAYS} if arrays else {_SCALARS})
    _same_keys(sender, _SCALARS, set(config), {_VERSION_KEY, _TYPE_KEY, *scalars})
    values: dict[str, Any] = {}
    for name, spec in scalars.items():
        value = "" if config[name] == _EMPTY else config[name]
        values[name] = _check_scalar(sender, name, spec, value)
    for name, wanted in (expect or {}).items():
        if values.get(name, wanted) != wanted:
            raise ProtocolError(sender, name, f"{values[name]}, expected {wanted}")
    if arrays:
        values |= _decode_arrays(sender, arrays, content[_ARRAYS], dict(dims or {}), limits or {})
    return cls(**values)


def _type_of(config: ConfigRecord, classes: Sequence[type[M]], sender: str) -> type[M]:
    """Return the type that a message says it is."""
    by_name = {cls.__name__: cls for cls in classes}
    name = config.get(_TYPE_KEY)
    if not isinstance(name, str) or name not in by_name:
        raise ProtocolError(
            sender, _TYPE_KEY, f"{_shorten(repr(name))}, expected {' or '.join(by_name)}"
        )
    return by_name[name]


def to_array(values: npt.NDArray[np.generic]) -> Array:
    """Return Flower's ``Array(values)``, made with one copy of the values instead of three."""
    values = np.asarray(values, order="C")
    data = b"".join((_npy_header(values.dtype, values.shape), values.data))
    return Array(dtype=str(values.dtype), shape=values.shape, stype=_STYPE, data=data)


def from_array(array: Array) -> npt.NDArray[np.generic]:
    """Return the values of what `to_array` made, read-only and without a copy.

    Raises
    ------
    ValueError
        If it was made otherwise.
    """
    dtype, shape = np.dtype(array.dtype), tuple(array.shape)
    header = _npy_header(dtype, shape)
    if array.stype != _STYPE or array.data[: len(header)] != header:
        raise ValueError("not an array of C order in NumPy's format")
    return np.frombuffer(array.data, dtype=dtype, offset=len(header)).reshape(shape)


def _scalars(content: RecordDict, sender: str) -> ConfigRecord:
    """Return the record of a message's scalars, of this version of the wire."""
    if _SCALARS not in content:
        raise ProtocolError(sender, "message", f"lacks {_SCALARS}")
    config = content[_SCALARS]
    if not isinstance(config, ConfigRecord):
        raise ProtocolError(sender, _SCALARS, f"a {type(config).__name__}, not a ConfigRecord")
    if config.get(_VERSION_KEY) != WIRE_VERSION:
        raise ProtocolError(
            sender,
            _VERSION_KEY,
            f"{_shorten(repr(config.get(_VERSION_KEY)))}, expected {WIRE_VERSION}; install the "
            "same fedzge-flwr on both sides",
        )
    return config


def _same_keys(sender: str, field: str, found: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - found):
        raise ProtocolError(sender, field, f"lacks {', '.join(missing)}")
    if extra := sorted(found - wanted):
        raise ProtocolError(sender, field, f"has unknown {', '.join(map(_shorten, extra))}")


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}…"


def _check_scalar(sender: str, name: str, spec: ScalarSpec, value: object) -> object:
    if type(value) is not spec.kind:
        raise ProtocolError(
            sender, name, f"a {type(value).__name__}, expected {spec.kind.__name__}"
        )
    if isinstance(value, str):
        if len(value) > MAX_STRING:
            raise ProtocolError(sender, name, f"{len(value)} characters; at most {MAX_STRING}")
        if not value.isprintable():
            # It goes into logs and terminals.
            raise ProtocolError(sender, name, f"{_shorten(value)!r} has control characters")
        if spec.choices is not None and value not in spec.choices:
            raise ProtocolError(
                sender, name, f"{_shorten(value)!r}, expected one of {', '.join(spec.choices)}"
            )
        if spec.pattern is not None and re.fullmatch(spec.pattern, value) is None:
            raise ProtocolError(sender, name, f"{_shorten(value)!r}, expected {spec.pattern}")
    if isinstance(value, (int, float)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ProtocolError(sender, name, f"{value} is not finite")
        if spec.low is not None and value < spec.low:
            raise ProtocolError(sender, name, f"{value} is below {spec.low}")
        if spec.high is not None and value > spec.high:
            raise ProtocolError(sender, name, f"{value} is above {spec.high}")
    return value


def _decode_arrays(
    sender: str,
    specs: Mapping[str, ArraySpec],
    record: object,
    bound: dict[str, int],
    limits: Mapping[str, int],
) -> dict[str, npt.NDArray[np.generic]]:
    if not isinstance(record, ArrayRecord):
        raise ProtocolError(sender, _ARRAYS, f"a {type(record).__name__}, not an ArrayRecord")
    _same_keys(sender, _ARRAYS, set(record), set(specs))
    return {
        name: _decode_array(sender, name, spec, record[name], bound, limits)
        for name, spec in specs.items()
    }


def _decode_array(
    sender: str,
    name: str,
    spec: ArraySpec,
    array: Array,
    bound: dict[str, int],
    limits: Mapping[str, int],
) -> npt.NDArray[np.generic]:
    """Decode one array; binds the dimensions that it is the first to give a value."""
    if array.stype != _STYPE:
        raise ProtocolError(sender, name, f"serialised as {_shorten(array.stype)!r}, not {_STYPE}")
    if array.dtype != spec.dtype:
        raise ProtocolError(sender, name, f"dtype {_shorten(array.dtype)}, expected {spec.dtype}")
    shape = tuple(array.shape)
    wanted = ", ".join(
        str(bound[dim]) if dim in bound else f"{dim} ≤ {limits[dim]}" for dim in spec.dims
    )
    fits = len(shape) == len(spec.dims) and all(
        size == bound[dim] if dim in bound else 0 <= size <= limits[dim]
        for dim, size in zip(spec.dims, shape, strict=True)
    )
    if not fits:
        raise ProtocolError(sender, name, f"shape {shape}, expected ({wanted})")
    bound.update(zip(spec.dims, shape, strict=True))
    dtype = np.dtype(spec.dtype)
    # np.save writes one header for a dtype and shape. It is compared, not parsed: a header that
    # was tampered with might claim any size, or break NumPy's parser.
    header = _npy_header(dtype, shape)
    wanted_bytes = len(header) + math.prod(shape) * dtype.itemsize
    if len(array.data) != wanted_bytes:
        raise ProtocolError(
            sender,
            name,
            f"{len(array.data)} bytes; shape {shape} of {spec.dtype} takes {wanted_bytes}",
        )
    if array.data[: len(header)] != header:
        raise ProtocolError(sender, name, "its payload is not the array that it declares")
    values = np.frombuffer(array.data, dtype=dtype, offset=len(header)).reshape(shape)
    if not np.isfinite(values).all():
        raise ProtocolError(sender, name, "holds values that are not finite")
    if spec.largest is not None and values.size and np.abs(values).max() > spec.largest:
        raise ProtocolError(
            sender,
            name,
            f"holds values of magnitude {np.abs(values).max():g}; at most {spec.largest:g}",
        )
    return values


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Return the header that ``np.save`` writes for a C-ordered array."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header,
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape},
    )
    return header.getvalue()
