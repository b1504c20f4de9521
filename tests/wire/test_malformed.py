"""Malformed requests and replies, mutated from those of real runs, at the real endpoints."""

from __future__ import annotations

import dataclasses
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from fedzge_flwr.black_boxes.contract import ClientEvaluation, ClientProfile, FitReport
from fedzge_flwr.client.endpoints import register_endpoints
from fedzge_flwr.common.errors import FedZGEError, ProtocolError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.grid.exchange import GridExchange
from fedzge_flwr.grid.standing import Standing
from fedzge_flwr.query.copies import copies_asked
from fedzge_flwr.wire import messages as message_types
from fedzge_flwr.wire.messages import (
    ArraySpec,
    CompactDistillRequest,
    CompactLogitsRequest,
    DistillRequest,
    EvaluateRequest,
    HelloRequest,
    ImagesNeeded,
    LogitsRequest,
    Refused,
    Reply,
    Request,
    RoundRequest,
    TrainRequest,
    WireMessage,
)
from tests.helpers.inprocess import InProcessGrid, through_the_wire
from tests.helpers.running import run_server

REQUESTS = (
    HelloRequest,
    TrainRequest,
    LogitsRequest,
    CompactLogitsRequest,
    DistillRequest,
    CompactDistillRequest,
    RoundRequest,
    EvaluateRequest,
)
REPLIES = tuple(
    cls
    for cls in vars(message_types).values()
    if isinstance(cls, type) and issubclass(cls, Reply) and cls is not Reply
)
NUM_TEST_IMAGES = 60


class LinearBox:
    """The least black box: a linear model of NumPy, so that a message costs a millisecond."""

    image_shape = (1, 8, 8)
    num_classes = 10
    max_query_images = 0
    local_rounds = 0

    def __init__(self) -> None:
        self._weights = np.linspace(-1, 1, 640).reshape(64, 10)
        self._steps = np.array(0)

    def profile(self) -> ClientProfile:
        return ClientProfile(0, 3, 40, "cpu", 0.0)

    def fit(self, round_: int) -> FitReport:
        self._weights = self._weights * 0.9
        self._steps = self._steps + 1
        return FitReport(40, 1.0)

    def logits(self, images_NCHW: Any) -> Any:
        # What is finite may still overflow; that is the server's to refuse.
        with np.errstate(all="ignore"):
            return (images_NCHW.reshape(-1, 64) @ self._weights).astype(np.float32)

    def distill(self, round_: int, images: Any, teacher: Any, temperature: float) -> float:
        with np.errstate(all="ignore"):
            gap = teacher / temperature - self.logits(images)
            self._weights = self._weights + 1e-3 * images.reshape(-1, 64).T @ gap
            return float(np.mean(gap**2))

    def evaluate(self, split: str) -> ClientEvaluation:
        size = NUM_TEST_IMAGES if split == "test" else 0
        return ClientEvaluation(size, 0.5, 0.5, np.zeros((size, 10), np.float32))

    def state(self) -> Any:
        return {"weights": self._weights, "steps": self._steps}

    def load_state(self, state: Any) -> None:
        self._weights, self._steps = state["weights"], state["steps"]

    def close(self) -> None:
        pass


# -- real messages ----------------------------------------------------------------------------


@dataclasses.dataclass
class Pair:
    """A request and its reply as they were sent, and the reply's type."""

    action: str
    request: bytes
    reply: bytes
    request_type: str
    reply_type: str


def pack(content: RecordDict) -> bytes:
    return recorddict_to_proto(content).SerializeToString()


_PROTO = type(recorddict_to_proto(RecordDict()))


def unpack(data: bytes) -> RecordDict:
    return recorddict_from_proto(_PROTO.FromString(data))


def is_round(message: Message) -> bool:
    return message.metadata.message_type == RoundRequest.ACTION


def query_of(message: Message) -> RecordDict:
    """The query that a request for a whole round holds."""
    content, fields = message.content, fields_of(CompactLogitsRequest)
    scalars = {key: value for key, value in content["message"].items() if key in fields}
    arrays = {key: value for key, value in content["arrays"].items() if key in fields}
    known = {"wire-version": content["message"]["wire-version"], "type": "CompactLogitsRequest"}
    return RecordDict({"message": ConfigRecord(known | scalars), "arrays": ArrayRecord(arrays)})


@pytest.fixture
def pairs(make_grid: Any, tiny_config: dict[str, Any], efficient_config: dict[str, Any]) -> Any:
    """All exchanges of real runs, of every type of request and reply."""
    found: list[Pair] = []

    def note(request: Message, reply: Message) -> Message:
        assert reply.has_content(), reply.error
        contents = (request.content, reply.content)
        types = [str(content["message"]["type"]) for content in contents]
        found.append(Pair(request.metadata.message_type, *map(pack, contents), *types))
        return reply

    ways = (
        {**efficient_config, "transport": "compact", "run-name": "compact"},
        {**tiny_config, "transport": "dense", "run-name": "dense"},
    )
    for config in ways:
        # One client refuses; one forgets images: it must be sent them again.
        owner = {"partition-id": 2, "num-partitions": 3, "max-query-images": 1}
        grid = make_grid(config, node_configs={2: owner}, tamper=note)

        def forget(message: Message, grid: InProcessGrid = grid) -> bool:
            context = grid.contexts[message.metadata.dst_node_id]
            if min(grid.contexts) == message.metadata.dst_node_id:
                context.state.pop("fedzge-asked", None)
            return False

        grid.lose = forget
        run_server(grid, config)
        if config["transport"] == "compact":
            # This server asks compactly in whole rounds alone; clients take the query by itself.
            query = query_of(next(message for message in grid.sent if is_round(message)))
            grid.push_messages([Message(query, max(grid.contexts), CompactLogitsRequest.ACTION)])
            grid.push_messages([Message(query, min(grid.contexts), CompactLogitsRequest.ACTION)])
    assert {pair.request_type for pair in found} == {cls.__name__ for cls in REQUESTS}
    assert {pair.reply_type for pair in found} == {cls.__name__ for cls in REPLIES}
    # One of each kind of exchange: a few of those that differ in what they say.
    kept: dict[tuple[str, str], list[Pair]] = {}
    for pair in found:
        of_kind = kept.setdefault((pair.request_type, pair.reply_type), [])
        if len(of_kind) < 3 and (not of_kind or pair.request != of_kind[-1].request):
            of_kind.append(pair)
    return [pair for of_kind in kept.values() for pair in of_kind]


# -- mutation ---------------------------------------------------------------------------------

HEX = "0f" * 40
TEXTS: list[Any] = [
    "",
    "x" * 201,
    "x" * 50_000,
    "../../etc/passwd",
    "a\nb",
    "\x1b[2J",
    "\0",
    "\u2028",
    "é" * 50,
    "0F" * 16,
    "０" * 16,
    *(HEX[:digits] for digits in (15, 16, 17, 31, 32, 33, 63, 64, 65)),
    HEX[:16] + "\n",
]
NUMBERS: list[Any] = [0, 1, -1, 7, 256, 2**31, 2**62, 2**62 + 1, 2**63 - 1, -(2**63)]
FLOATS: list[Any] = [0.0, -0.0, 1.0, 1.5, -1.0, 5e-324, 1e-31, 1e-7, 1e39, 1e308, -1e308]
ODD: list[Any] = [float("nan"), float("inf"), float("-inf")]
OTHERS: list[Any] = [b"", b"\0" * 40, [], [1], [1.5], ["a"], [True], [b"a"]]
SCALARS: dict[type, list[Any]] = {
    int: [*NUMBERS, *NUMBERS, True, 1.0, *ODD, "1", *OTHERS],
    float: [*FLOATS, *ODD, *ODD, 1, 0, True, "1.0", *OTHERS],
    bool: [True, False, 0, 1, 1.0, "true", *OTHERS],
    str: [*TEXTS, *TEXTS, 1, 1.0, True, *OTHERS],
}


def mutate_array(array: Array, dims: int, rng: random.Random) -> Array:
    """Return an array spoilt in its type, shape or payload."""
    shape, data = tuple(array.shape), bytearray(array.data)
    new = {"dtype": array.dtype, "shape": shape, "stype": array.stype, "data": bytes(data)}
    values = array.numpy()
    way = rng.randrange(14)
    if way == 0:
        new["dtype"] = rng.choice(["float64", "uint8", "float32", "object", "|V9", "", "\x1b", "é"])
    elif way == 1:
        new["stype"] = rng.choice(["pickle", "", "numpy.ndarray ", "torch.Tensor", "\n" * 99])
    elif way == 2:
        at = rng.randrange(dims)
        size = rng.choice([-1, 0, shape[at] + 1, 2**31 - 1, -(2**31)])
        new["shape"] = (*shape[:at], size, *shape[at + 1 :])
    elif way == 3:
        new["shape"] = rng.choice([(), (*shape, 1), shape[::-1], shape[1:], (1,) * 5000])
    elif way == 4:
        new["data"] = bytes(data[: rng.randrange(len(data))])
    elif way == 5:
        new["data"] = bytes(data) + bytes(rng.choice([1, 4, 4096]))
    elif way == 6:
        # A byte of the header, which NumPy's parser would have to make something of.
        data[rng.randrange(min(128, len(data)))] ^= rng.randrange(1, 256)
        new["data"] = bytes(data)
    elif way == 7:
        data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
        new["data"] = bytes(data)
    elif way == 8:
        new["data"] = rng.randbytes(len(data))
    elif way == 9:
        return Array(np.concatenate((values, values[:1])) if len(values) else values.T.copy())
    elif way == 10:
        return Array(values[: len(values) // 2].copy())
    elif way == 11:
        return Array(np.zeros((shape[0], 0, *shape[2:]), values.dtype))
    elif way == 12 and values.dtype.kind == "f" and values.size:
        spoilt = values.copy()
        spoilt.flat[rng.randrange(values.size)] = rng.choice([*ODD, 3e38, -3e38])
        return Array(spoilt)
    else:
        return Array(values.astype(rng.choice(["float64", "int32", "complex64", "bool", "uint8"])))
    return Array(**new)


def mutate_envelope(content: RecordDict, rng: random.Random, others: list[str]) -> None:
    """Spoil what is around the fields."""
    message = content["message"]
    way = rng.randrange(10)
    if way == 0:
        message["wire-version"] = rng.choice([6, 8, "7", True, 2**63 - 1, "9" * 9999, [7], b"7"])
    elif way == 1:
        message["type"] = rng.choice([*others, "", "Reply", "x" * 9999, 5, b"x", "\x1b[2J"])
    elif way == 2:
        message[rng.choice(["more", "", "x" * 9999, "\n", "__class__"])] = 1
    elif way == 3:
        content[rng.choice(["more", "x" * 9999, "\x1b"])] = rng.choice(
            [MetricRecord({}), ConfigRecord({}), ArrayRecord()]
        )
    elif way == 4:
        del content[rng.choice(list(content))]
    elif way == 5:
        content[rng.choice(list(content))] = rng.choice([MetricRecord({"round": 1}), ArrayRecord()])
    elif way == 6:
        del message[rng.choice(["wire-version", "type"])]
    elif way == 7 and "arrays" in content:
        content["arrays"]["more"] = Array(np.zeros(3, np.float32))
    elif way == 8 and "arrays" in content:
        content["arrays"] = message
    else:
        for number in range(2000):
            message[f"more-{number}"] = number


def fields_of(cls: type[WireMessage]) -> dict[str, Any]:
    return {field.name: field.metadata["wire"] for field in dataclasses.fields(cls)}


def mutate_field(content: RecordDict, name: str, spec: Any, rng: random.Random) -> None:
    where = content["arrays" if isinstance(spec, ArraySpec) else "message"]
    if rng.random() < 0.03:
        del where[name]
    elif not isinstance(spec, ArraySpec):
        where[name] = rng.choice(SCALARS[spec.kind])
    elif rng.random() < 0.1:
        where[name] = where[rng.choice(list(where))]
    else:
        where[name] = mutate_array(where[name], len(spec.dims), rng)


Source = tuple[Pair, bytes, type[WireMessage]]


def mutants(
    sources: list[Source], count: int, seed: int, mutated: Counter[tuple[str, str]]
) -> Iterator[tuple[Pair, RecordDict, type[WireMessage]]]:
    """Yield mutated messages: fields in turn, so that each has had its share; an envelope at 10 %.

    ``mutated`` counts the fields' mutations.
    """
    rng = random.Random(seed)
    targets = [(*source, name) for source in sources for name in fields_of(source[2])]
    names = [cls.__name__ for cls in (*REQUESTS, *REPLIES)]
    rng.shuffle(targets)
    for number in range(count):
        pair, data, cls, name = targets[number % len(targets)]
        content = unpack(data)
        specs = fields_of(cls)
        if rng.random() < 0.1:
            mutate_envelope(content, rng, names)
        else:
            mutate_field(content, name, specs[name], rng)
            mutated[cls.__name__, name] += 1
            if rng.random() < 0.1:
                other = rng.choice([key for key in specs if key != name])
                mutate_field(content, other, specs[other], rng)
        yield pair, content, cls


# -- trying -----------------------------------------------------------------------------------


def try_requests(
    pairs: list[Pair],
    count: int,
    seed: int,
    app: ClientApp,
    make_grid: Any,
    config: dict[str, Any],
    folder: Path,
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Send mutated requests to a client with a state; count what has become of them."""
    owner = {
        "partition-id": 0,
        "num-partitions": 3,
        "state-dir": str(folder),
        "query-budget": 10**9,
    }
    grid = make_grid(config, app=app, node_configs={0: owner}, num_nodes=1)
    ((node_id, context),) = grid.contexts.items()
    by_name = {cls.__name__: cls for cls in REQUESTS}

    def deliver(action: str, content: RecordDict) -> RecordDict:
        message = Message(content, node_id, action)
        message.metadata.__dict__["_message_id"] = "x"
        return through_the_wire(app(through_the_wire(message), context)).content

    # The client is where a client of a run is: it has trained, answered, and keeps images.
    experiments = {}
    for pair in pairs:
        experiments.setdefault(unpack(pair.request)["message"]["experiment"], pair)
    experiment = next(iter(experiments))
    sources: list[Source] = []
    for pair in pairs:
        content = unpack(pair.request)
        # A Flower run has one experiment.
        content["message"]["experiment"] = experiment
        sources.append((pair, pack(content), by_name[pair.request_type]))
        assert deliver(pair.action, content)["message"]["type"] != "Refused"

    def kept() -> tuple[dict[str, bytes], bytes]:
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        return files, pack(context.state)

    before, state = kept(), unpack(pack(context.state))

    def undo() -> None:
        context.state = unpack(pack(state))
        for path in folder.rglob("*"):
            if path.is_file() and str(path.relative_to(folder)) not in before[0]:
                path.unlink()
        for name, data in before[0].items():
            path = folder / name
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    assert any(name.endswith("tally.json") for name in before[0])
    outcomes: Counter[str] = Counter()
    mutated: Counter[tuple[str, str]] = Counter()
    for pair, content, cls in mutants(sources, count, seed, mutated):
        outcomes["tried"] += 1
        sent = pack(content)
        problem: BaseException | None = None
        kind = ""
        try:
            kind = str(deliver(pair.action, content)["message"]["type"])
        except Exception as error:  # noqa: BLE001 - whatever it is, it is looked at
            problem = error
        if problem is None and kind != "Refused":
            # Still a request. What it has changed is undone.
            outcomes["answered"] += 1
            undo()
            continue
        if problem is None:
            outcomes["Refused"] += 1
        elif isinstance(problem, ProtocolError):
            own = problem.field in fields_of(cls)
            outcomes["field's own check" if own else "envelope"] += 1
        elif isinstance(problem, FedZGEError):
            outcomes[type(problem).__name__] += 1
        else:
            pytest.fail(f"{problem!r}: {pair.request_type} {sent[:2000]!r}")
        assert str(problem).isprintable()
        assert len(str(problem)) < 400
        assert kept() == before, f"{pair.request_type}: {sent[:2000]!r}"
    return outcomes, mutated


class Replay(InProcessGrid):
    """Nodes that reply what they are told to."""

    content = RecordDict()

    def deliver(self, message: Message) -> Message:
        return through_the_wire(Message(self.content, reply_to=message))


def try_replies(
    pairs: list[Pair], count: int, seed: int, make_grid: Any, config: dict[str, Any]
) -> tuple[Counter[str], Counter[tuple[str, str]]]:
    """Have the server's exchange receive mutated replies; count what has become of them."""
    grid = Replay(ClientApp(), config, 1)
    (node_id,) = grid.contexts
    exchange = GridExchange(grid, from_run_config(config).run, 9.0)
    by_name = {cls.__name__: cls for cls in REPLIES}
    outcomes: Counter[str] = Counter()
    mutated: Counter[tuple[str, str]] = Counter()

    def receive(pair: Pair, content: RecordDict) -> tuple[Any, str]:
        """Ask as the server does for the request of a pair."""
        answered, true = by_name[pair.reply_type], unpack(pair.reply)
        round_ = unpack(pair.request)["message"]["round"]
        request: Request = TrainRequest(round=round_)
        rows = {
            dim: size
            for name, spec in fields_of(answered).items()
            if isinstance(spec, ArraySpec)
            for dim, size in zip(spec.dims, true["arrays"][name].shape, strict=True)
        }
        expect = {"query": true["message"]["query"]} if "query" in true["message"] else None
        grid.content = content
        grid.sent.clear()
        grid.received.clear()
        types = (answered,) if answered in (Refused, ImagesNeeded) else (answered, ImagesNeeded)
        replies, failures = exchange.send(
            [(request, [node_id])], types, lambda _: Standing(), dims=rows, expect=expect
        )
        failure = failures.get(node_id)
        return replies.get(node_id), failure.reason if failure else ""

    sources: list[Source] = []
    for pair in pairs:
        reply, reason = receive(pair, unpack(pair.reply))
        assert reply is not None or reason.startswith("refused: ")
        sources.append((pair, pair.reply, by_name[pair.reply_type]))
    for pair, content, cls in mutants(sources, count, seed, mutated):
        outcomes["tried"] += 1
        reply, reason = receive(pair, content)
        field = re.match(r"node \d+: field '([^']*)': ", reason)
        if reply is not None or reason.startswith("refused: "):
            outcomes["answered"] += 1
        elif field is not None:
            outcomes["field's own check" if field[1] in fields_of(cls) else "envelope"] += 1
        else:
            pytest.fail(f"{pair.reply_type}: {reason}")
        assert reason.isprintable()
        assert len(reason) < 400
    return outcomes, mutated


@pytest.fixture
def linear_app(efficient_config: dict[str, Any]) -> ClientApp:
    settings = from_run_config(efficient_config)
    queries = settings.queries
    copies = copies_asked(queries.estimator, queries.q, queries.differences)
    most = copies * settings.images.synthetic_batch_size

    class Box(LinearBox):
        max_query_images = most

    app = ClientApp()
    register_endpoints(app, lambda _: Box())
    return app


@pytest.mark.parametrize(
    ("requests", "replies", "real"),
    [
        pytest.param(700, 500, 60, id="some"),
        pytest.param(12_000, 8_500, 500, id="many", marks=pytest.mark.faults),
    ],
)
def test_malformed_messages_are_typed_errors_and_change_nothing(
    pairs: list[Pair],
    linear_app: ClientApp,
    make_grid: Any,
    efficient_config: dict[str, Any],
    tmp_path: Path,
    record_property: Any,
    requests: int,
    replies: int,
    real: int,
) -> None:
    import client_app

    outcomes: Counter[str] = Counter()
    mutated: Counter[tuple[str, str]] = Counter()
    for number, (app, count) in enumerate(((linear_app, requests), (client_app.app, real))):
        got, fields = try_requests(
            pairs, count, number, app, make_grid, efficient_config, tmp_path / str(number)
        )
        outcomes += got
        mutated += fields
    of_requests = dict(outcomes)
    got, fields = try_replies(pairs, replies, 2, make_grid, efficient_config)
    mutated += fields
    outcomes += got
    told = f"requests {of_requests}, replies {dict(got)}, in all {dict(outcomes)}"
    print(told)
    record_property("outcomes", told)
    every_field = {(cls.__name__, name) for cls in (*REQUESTS, *REPLIES) for name in fields_of(cls)}
    assert set(mutated) == every_field, told
    assert outcomes["tried"] == requests + replies + real, told
    assert 2 * outcomes["field's own check"] >= outcomes["tried"], told
    record_property("fewest mutations of a field", min(mutated.values()))
    print(f"{len(mutated)} fields, each mutated {min(mutated.values())} times or more")
