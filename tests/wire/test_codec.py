from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import given, settings
from hypothesis import strategies as st

from fedzge_flwr.common.errors import ProtocolError
from fedzge_flwr.wire.codec import decode, encode, from_array, to_array
from fedzge_flwr.wire.messages import (
    ArraySpec,
    CompactDistillRequest,
    CompactLogitsRequest,
    DistillReply,
    DistillRequest,
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    ImagesNeeded,
    LogitsReply,
    LogitsRequest,
    Refused,
    RoundReply,
    RoundRequest,
    TrainReply,
    TrainRequest,
    WireMessage,
)
from fedzge_flwr.wire.size import encoded_bytes

DIMS = {"C": 1, "H": 4, "W": 4, "K": 3}
LIMITS = {"B": 10, "N": 10, "M": 10, "Q": 10, "G": 10, "P": 64, "S": 10, "T": 10}


def floats(*shape: int) -> Any:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def octets(*shape: int) -> Any:
    return np.random.default_rng(2).integers(256, size=shape, dtype=np.uint8)


EXAMPLES: list[WireMessage] = [
    HelloRequest(round=0, version="1"),
    HelloReply(
        round=0,
        partition=2,
        num_partitions=3,
        num_examples=9,
        device="cpu",
        gpu_share=0.25,
        version="1",
    ),
    TrainRequest(round=4, experiment="0f" * 16, state="0f" * 8, durable="f0" * 8),
    TrainReply(round=4, num_examples=9, loss=0.5, began="0f" * 8, state="f0" * 8),
    LogitsRequest(round=4, images=floats(6, 1, 4, 4)),
    LogitsReply(round=4, query="0f" * 32, logits=floats(6, 3)),
    DistillRequest(round=4, temperature=5.0, images=floats(2, 1, 4, 4), logits=floats(2, 3)),
    DistillReply(round=4, loss=0.5, problem="it diverged"),
    ImagesNeeded(round=4),
    Refused(round=4, reason="not now"),
    EvaluateRequest(round=4, split="test", num_logits=8),
    CompactLogitsRequest(
        round=4,
        base=octets(6, 1, 4, 4),
        directions=octets(2, 3, 64),
        seed=7,
        eps=0.5,
        differences="central",
        to_distill=False,
    ),
    RoundRequest(
        round=4,
        base=octets(6, 1, 4, 4),
        directions=octets(2, 3, 64),
        seed=7,
        eps=0.5,
        differences="central",
        to_distill=True,
        targets_round=3,
        temperature=2.0,
        digest="ab",
        images=octets(2, 1, 4, 4),
        targets=floats(2, 3),
    ),
    RoundReply(
        round=4,
        num_examples=9,
        train_loss=0.5,
        distill_loss=0.1,
        distill_problem="",
        query="0f" * 32,
        logits=floats(6, 3),
    ),
    CompactDistillRequest(
        round=4, temperature=5.0, digest="ab", images=octets(2, 1, 4, 4), logits=floats(2, 3)
    ),
    EvaluateReply(round=4, num_examples=8, loss=0.5, accuracy=0.75, logits=floats(8, 3)),
    EvaluateReply(round=4, num_examples=8, loss=0.5, accuracy=0.75, logits=floats(0, 3)),
]
EXAMPLE_IDS = [type(example).__name__ for example in EXAMPLES]


ARRAYS = {
    "scalar": np.array(7, np.int64),
    "empty": floats(0, 3),
    "vector": octets(5),
    "fortran": np.asfortranarray(floats(3, 4)),
    "strided": floats(4, 6)[:, ::2],
    "double": floats(2, 3, 4, 5).astype(np.float64),
    "bool": np.array([True, False]),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_flowers_own_made_with_fewer_copies(name: str) -> None:
    values = ARRAYS[name]
    made, flowers = to_array(values), Array(np.array(values, order="C"))
    assert (made.dtype, tuple(made.shape), made.stype) == (
        flowers.dtype,
        tuple(flowers.shape),
        flowers.stype,
    )
    assert made.data == flowers.data
    back = from_array(made)
    assert back.dtype == values.dtype
    assert np.array_equal(back, values)
    assert not back.flags.writeable


def test_an_array_that_was_made_otherwise_is_refused() -> None:
    for other in (
        Array(dtype="float32", shape=(2,), stype="pickle", data=b"x"),
        Array(dtype="float32", shape=(2,), stype="numpy.ndarray", data=to_array(floats(3)).data),
    ):
        with pytest.raises(ValueError, match="not an array of C order"):
            from_array(other)


def wire(content: RecordDict) -> RecordDict:
    proto = recorddict_to_proto(content)
    return recorddict_from_proto(type(proto).FromString(proto.SerializeToString()))


def read(example: WireMessage, content: RecordDict, **options: Any) -> WireMessage:
    return decode((type(example),), content, sender="node 5", dims=DIMS, limits=LIMITS, **options)


def same(a: WireMessage, b: WireMessage) -> bool:
    return all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name))
        for field in dataclasses.fields(a)
    )


@pytest.mark.parametrize("example", EXAMPLES, ids=EXAMPLE_IDS)
def test_round_trip(example: WireMessage) -> None:
    assert same(read(example, wire(encode(example))), example)


def array_fields(example: WireMessage) -> dict[str, ArraySpec]:
    return {
        field.name: field.metadata["wire"]
        for field in dataclasses.fields(example)
        if isinstance(field.metadata["wire"], ArraySpec)
    }


def npy(values: Any, **save: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, **save)
    return buffer.getvalue()


def mutations(example: WireMessage) -> dict[str, tuple[str, Any]]:
    """Each way to spoil a message: (field that the error must name, function of the content)."""
    found: dict[str, tuple[str, Any]] = {}

    def scalar(name: str, value: Any) -> Any:
        return lambda content: content["message"].__setitem__(name, value)

    def array(name: str, value: Array) -> Any:
        return lambda content: content["arrays"].__setitem__(name, value)

    found["wrong version"] = ("wire-version", scalar("wire-version", 99))
    found["wrong type"] = ("type", scalar("type", "Other"))
    found["extra scalar"] = ("message", scalar("more", 1))
    found["extra record"] = ("message", lambda c: c.__setitem__("more", MetricRecord({})))
    found["no record"] = ("message", lambda c: c.__delitem__("message"))
    found["record of another kind"] = (
        "message",
        lambda c: c.__setitem__("message", MetricRecord({"round": 1})),
    )
    for field in dataclasses.fields(example):
        spec = field.metadata["wire"]
        name = field.name
        if isinstance(spec, ArraySpec):
            good = getattr(example, name)
            dtype = str(good.dtype)
            found[f"{name} missing"] = ("arrays", lambda c, n=name: c["arrays"].__delitem__(n))
            for label, value in {
                "float64": Array(good.astype(np.float64)),
                "transposed": Array(np.ascontiguousarray(good.T)),
                "one more": Array(np.concatenate((good, np.ones((11, *good.shape[1:]), dtype)))),
                "flat": Array(good.ravel()),
                "other stype": Array(dtype, good.shape, "pickle", npy(good)),
                "truncated": Array(dtype, good.shape, "numpy.ndarray", npy(good)[:-4]),
                "too long": Array(dtype, good.shape, "numpy.ndarray", npy(good) + b"\0" * 8),
                "huge": Array(dtype, good.shape, "numpy.ndarray", npy(good) + b"\0" * 9999),
                "garbage": Array(dtype, good.shape, "numpy.ndarray", b"x" * (good.nbytes + 80)),
                "lying header": Array(
                    dtype, good.shape, "numpy.ndarray", npy(good.astype(np.int32))
                ),
                "negative shape": Array(dtype, (-1, *good.shape[1:]), "numpy.ndarray", npy(good)),
            }.items():
                found[f"{name} {label}"] = (name, array(name, value))
            if good.size and good.dtype.kind == "f":
                for bad in (np.nan, np.inf, *([-2e6] if spec.largest else [])):
                    spoiled = good.copy()
                    spoiled.flat[-1] = bad
                    found[f"{name} {bad}"] = (name, array(name, Array(spoiled)))
            continue
        found[f"{name} missing"] = ("message", lambda c, n=name: c["message"].__delitem__(n))
        wrong = {
            int: [True, 1.0, "1", -1, [1]],
            float: [1, True, "1", float("nan"), -0.5, float("inf")],
            str: [1, b"x", "x" * 300],
            bool: [0, 1.0, "true"],
        }
        for value in wrong[spec.kind]:
            found[f"{name} = {str(value)[:10]!r}"] = (name, scalar(name, value))
        if spec.choices:
            found[f"{name} unknown"] = (name, scalar(name, "other"))
        if spec.pattern:
            for value in ("0F" * 16, "../" * 10, "0f" * 33, "0f" * 8 + "\n"):
                found[f"{name} = {value[:20]!r}"] = (name, scalar(name, value))
        if spec.high == 1.0:
            found[f"{name} above"] = (name, scalar(name, 1.5))
    if array_fields(example):
        found["extra array"] = ("arrays", array("more", Array(floats(1))))
        found["no arrays"] = ("message", lambda c: c.__delitem__("arrays"))
        found["arrays of another kind"] = (
            "arrays",
            lambda c: c.__setitem__("arrays", ConfigRecord({})),
        )
    return found


CASES = [
    pytest.param(example, *case, id=f"{type(example).__name__}-{label}")
    for example in EXAMPLES[:-1]
    for label, case in mutations(example).items()
]


@pytest.mark.parametrize(("example", "field", "spoil"), CASES)
def test_every_spoiled_field_is_named(example: WireMessage, field: str, spoil: Any) -> None:
    content = wire(encode(example))
    spoil(content)
    with pytest.raises(ProtocolError) as caught:
        read(example, content)
    assert caught.value.field == field
    assert str(caught.value).startswith("node 5: ")
    assert "\n" not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(
    index=st.integers(0, len(EXAMPLES) - 1),
    position=st.integers(0, 5000),
    byte=st.integers(0, 255),
)
def test_random_bytes_never_crash(index: int, position: int, byte: int) -> None:
    """One byte of an array's encoding is changed: it decodes to a whole message, or is refused."""
    example = EXAMPLES[index]
    names = list(array_fields(example))
    if not names:
        return
    content = encode(example)
    name = names[position % len(names)]
    whole = content["arrays"][name]
    data = bytearray(whole.data)
    data[position % len(data)] = byte
    content["arrays"][name] = Array(whole.dtype, whole.shape, whole.stype, bytes(data))
    try:
        found = read(example, content)
    except ProtocolError:
        return
    assert getattr(found, name).shape == getattr(example, name).shape
    assert np.isfinite(getattr(found, name)).all()


def test_dimensions_must_agree_across_arrays() -> None:
    content = encode(
        DistillRequest(round=1, temperature=1.0, images=floats(2, 1, 4, 4), logits=floats(3, 3))
    )
    with pytest.raises(ProtocolError, match=r"'logits': shape \(3, 3\), expected \(2, 3\)"):
        read(EXAMPLES[6], content)


def test_round_must_be_the_one_asked() -> None:
    content = encode(TrainReply(round=3, num_examples=1, loss=0.1))
    with pytest.raises(ProtocolError, match="'round': 3, expected 4"):
        read(EXAMPLES[3], content, expect={"round": 4})


def test_losses_stay_where_their_sums_are_finite() -> None:
    content = encode(TrainReply(round=4, num_examples=1, loss=1.7e308))
    with pytest.raises(ProtocolError, match=r"'loss': 1\.7e\+308 is above 1e\+30"):
        read(EXAMPLES[3], content)


def test_a_header_that_claims_terabytes_allocates_nothing() -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 3)}
    )
    data = header.getvalue()
    payload = data + b"\0" * (6 * 3 * 4)
    content = encode(LogitsReply(round=1, query="0f" * 32, logits=floats(6, 3)))
    content["arrays"]["logits"] = Array("float32", (6, 3), "numpy.ndarray", payload)
    with pytest.raises(ProtocolError, match="not the array that it declares"):
        read(EXAMPLES[5], content)


def test_encode_refuses_undeclared_types() -> None:
    with pytest.raises(TypeError, match=r"LogitsReply\.logits: float64"):
        encode(LogitsReply(round=1, query="0f" * 32, logits=np.zeros((2, 3))))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"TrainReply\.loss is a int"):
        encode(TrainReply(round=1, num_examples=2, loss=1))


def pushed_bytes(message: Message) -> int:
    """What Flower's HTTP client would push for a message, object by object."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    return sum(len(item.deflate()) for item in get_all_nested_objects(message).values())


def test_size_is_what_flower_pushes() -> None:
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 2, 3
    shared = encode(EXAMPLES[4])
    messages = [Message(shared, node, LogitsRequest.ACTION) for node in (4, 2**60)]
    # An array of several chunks, two of them equal: those travel once.
    big = ArrayRecord({"zeros": Array(np.zeros(4_000_000, np.float32))})
    messages.append(Message(RecordDict({"arrays": big}), 4, "query.logits"))
    sizes = encoded_bytes(messages)
    assert sizes == [pushed_bytes(message) for message in messages]
    assert sizes[0] < sizes[1]
    assert sizes[0] > EXAMPLES[4].images.nbytes  # type: ignore[attr-defined]
    assert sizes[2] < 16_000_000
