"""What leaves a node when something of it fails: the kind, and no path and no value of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import nn

from fedzge_flwr import MODELS
from fedzge_flwr.black_boxes.classifier import ClassifierBlackBox
from fedzge_flwr.black_boxes.node import torch_black_box
from fedzge_flwr.client.endpoints import register_endpoints
from fedzge_flwr.common.errors import (
    BlackBoxError,
    ConfigError,
    DataError,
    DivergenceError,
    FedZGEError,
    MissingDataError,
    StateError,
)
from fedzge_flwr.wire.messages import (
    DistillRequest,
    EvaluateRequest,
    HelloRequest,
    LogitsRequest,
    Request,
    TrainRequest,
)
from tests.helpers.node import IMAGES, LOGITS, Node, compact
from tests.helpers.small_models import returning

SECRET = "s3cr3t-of-the-owner"
EXPERIMENT = "0f" * 16
REQUESTS: tuple[Request, ...] = (
    HelloRequest(round=0, version="x"),
    TrainRequest(round=1),
    LogitsRequest(round=1, images=IMAGES),
    compact(),
    DistillRequest(round=1, temperature=2.0, images=IMAGES, logits=LOGITS),
    EvaluateRequest(round=1, split="test", num_logits=60),
)


def sent(reply: Message) -> bytes:
    """Return all that is sent of a reply."""
    from flwr.common.serde import message_to_proto

    return bytes(message_to_proto(reply).SerializeToString())


class Failing:
    """A black box of which one method fails."""

    def __init__(self, box: Any, method: str, fail: Callable[[], object]) -> None:
        self._box, self._method, self._fail = box, method, fail

    def __getattr__(self, name: str) -> Any:
        if name == self._method:
            return lambda *_: self._fail()
        return getattr(self._box, name)


def raising(error: BaseException) -> Callable[[], object]:
    def fail() -> object:
        raise error

    return fail


FAILURES: dict[str, Callable[[], object]] = {
    "a path": lambda: Path(f"/{SECRET}/images.npz").read_bytes(),
    "a key": lambda: {}[SECRET],
    "an exit": lambda: sys.exit(SECRET),
    "lines": raising(ValueError(f"\n{SECRET}\n{SECRET}")),
    "a cause": raising(BlackBoxError(SECRET)),
    **{
        kind.__name__: raising(kind(f"/{SECRET}/x"))
        for kind in (
            *(ConfigError, DataError, DivergenceError, FedZGEError, MissingDataError, StateError),
            *(MemoryError, RuntimeError, UnicodeError),
        )
    },
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_black_box_tells_its_kind_alone(
    make_grid: Any, tiny_config: dict[str, Any], caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    """Whatever method fails, and whatever is asked."""
    told = 0
    methods = "profile fit logits distill own_correct evaluate state load_state close image_shape"
    for method in methods.split():
        app = ClientApp()

        def make(context: Context, method: str = method) -> Any:
            return Failing(torch_black_box(context), method, FAILURES[failure])

        register_endpoints(app, make)
        node = Node(lambda config, app=app: make_grid(config, app=app), tiny_config)
        for request in REQUESTS:
            caplog.clear()
            reply = node.ask(request)
            assert SECRET.encode() not in sent(reply)
            if reply.has_error() and method != "image_shape":
                told += 1
                assert SECRET in caplog.text
    assert told >= 10


def test_a_failing_factory_tells_its_kind_alone(
    make_grid: Any, tiny_config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    for fail in FAILURES.values():
        app = ClientApp()
        register_endpoints(app, lambda _, fail=fail: fail())  # type: ignore[misc]
        node = Node(lambda config, app=app: make_grid(config, app=app), tiny_config)
        caplog.clear()
        reply = node.ask(REQUESTS[0])
        assert reply.has_error()
        assert SECRET.encode() not in sent(reply)
        assert SECRET in caplog.text


@pytest.mark.parametrize(
    "owner",
    [
        {"data-path": f"/{SECRET}/images"},
        {"data-path": f"/tmp/{SECRET}.npz"},
        {"state-dir": f"/proc/{SECRET}"},
        {"state-dir": f"~{SECRET}/x"},
        {"state-dir": f"{SECRET}\0"},
        {"model": SECRET},
        {"rehearsal": SECRET},
        {"logit-noise": SECRET},
        {"max-states": -987654321},
        {"partition-id": SECRET},
        {"query-budget": 987654321},
        {"max-query-images": 5, "query-range": 0.0987654321},
        {f"max-staets-{SECRET}": 3},
    ],
    ids=lambda owner: next(iter(owner)),
)
def test_replies_name_no_value_of_the_nodes_config(
    make_grid: Any, tiny_config: dict[str, Any], owner: dict[str, Any]
) -> None:
    node_config = {"partition-id": 0, "num-partitions": 3, **owner}
    node = Node(
        lambda config: make_grid(config, node_configs={0: node_config}),
        {**tiny_config, "data-dir": f"/{SECRET}/data"},
    )
    for request in REQUESTS:
        everything = sent(node.ask(request))
        for part in (SECRET, "987654321", "/proc"):
            assert part.encode() not in everything


def test_files_that_cannot_be_read_are_not_named(
    make_grid: Any, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    """A state-dir in disorder: each file is one that cannot be used."""
    states = tmp_path / SECRET
    node_config = {"partition-id": 0, "num-partitions": 3, "state-dir": str(states)}
    node_config |= {"query-budget": 1000, "logit-noise": 0.1, "max-trainings": 9}

    def ask(request: Request) -> bytes:
        node = Node(lambda config: make_grid(config, node_configs={0: node_config}), tiny_config)
        return sent(node.ask(request))

    for request in REQUESTS:
        assert SECRET.encode() not in ask(request)
    for path in [p for p in states.rglob("*") if p.is_file()]:
        whole = path.read_bytes()
        path.write_bytes(b"rubbish")
        for request in REQUESTS:
            assert SECRET.encode() not in ask(request)
        path.unlink(missing_ok=True)
        path.mkdir()
        for request in REQUESTS:
            assert SECRET.encode() not in ask(request)
        path.rmdir()
        path.write_bytes(whole)


def secrets_of(node_config: dict[str, Any], folder: Path) -> list[bytes]:
    """Every path, and every value of a node's config that could not be there by chance."""
    texts = {SECRET, str(folder), folder.name}
    for value in node_config.values():
        text = str(value)
        texts |= {text, *Path(text).parts} if isinstance(value, str) else {text}
    return [text.encode() for text in texts if len(text) > 3 and text not in ("True", "False")]


def told_off(*_: object) -> Any:
    raise RuntimeError(f"/{SECRET}/weights.pt")


MODELS_OF_OWNERS: dict[str, Any] = {
    "is not built": told_off,
    "does not answer": returning(told_off),
    "is not trained": returning(lambda model, y: told_off() if model.training else y),
    "returns a tuple": returning(lambda _, y: (y, SECRET)),
    "returns another tuple in training": returning(lambda m, y: (y,) if m.training else y),
    "diverges": returning(lambda m, y: y * (1e30 if m.training else 1)),
    "has too few classes": returning(lambda _, y: y[:, :3]),
    "has no parameters": lambda *_: nn.Flatten(),
    "is no module": lambda *_: SECRET,
}
OWNERS: dict[str, dict[str, Any]] = {
    "no data": {"data-path": f"/{SECRET}/of-mine"},
    "damaged data": {"data-path": "FOLDER/damaged.npz"},
    "data of another shape": {"data-path": "FOLDER/wide.npz"},
    "no folders of classes": {"data-path": "FOLDER"},
    "no model": {"model": f"{SECRET}-x"},
    "no folder for states": {"state-dir": f"/proc/{SECRET}"},
    "a file for states": {"state-dir": "FOLDER/damaged.npz"},
    "a range": {"query-range": 0.0987654321},
    "an interval": {"min-query-interval": 98765.4321, "state-dir": "FOLDER/a"},
    "a budget": {"query-budget": 5, "state-dir": "FOLDER/b"},
    "a limit": {"max-query-images": 11},
    "no evaluation": {"allow-evaluation": "held-out"},
    "no distillation": {"allow-distillation": False, "logit-noise": 0.000987654},
    **{f"a model that {kind}": {"model": f"{SECRET}-{kind}"} for kind in MODELS_OF_OWNERS},
}


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("kind", OWNERS)
def test_no_reply_holds_a_path_or_a_value_of_the_nodes_config(
    make_grid: Any, tiny_config: dict[str, Any], tmp_path: Path, kind: str
) -> None:
    """Of failures with data, model, state, training, distillation and evaluation; of refusals."""
    folder = tmp_path / SECRET
    folder.mkdir()
    (folder / "damaged.npz").write_bytes(b"PK rubbish")
    np.savez(folder / "wide.npz", images=np.zeros((4, 9, 9), np.uint8), labels=np.arange(4))
    for name, build in MODELS_OF_OWNERS.items():
        MODELS[f"{SECRET}-{name}"] = build
    owner = {
        key: value.replace("FOLDER", str(folder)) if isinstance(value, str) else value
        for key, value in OWNERS[kind].items()
    }
    node_config = {"partition-id": 0, "num-partitions": 3, **owner}
    node = Node(lambda config: make_grid(config, node_configs={0: node_config}), tiny_config)
    bad = 0
    for request in (*REQUESTS, *REQUESTS):
        reply = node.ask(request)
        everything = sent(reply)
        bad += reply.has_error() or b"Refused" in everything or b"problem" in everything
        for secret in secrets_of(owner, folder):
            assert secret not in everything, (request, reply)
    assert bad


def test_what_the_server_can_mend_is_told_whole(
    make_grid: Any, tiny_config: dict[str, Any]
) -> None:
    class Narrow(ClassifierBlackBox):
        def logits(self, images: Any) -> Any:
            return np.zeros((len(images), 9), np.float32)

    app = ClientApp()
    register_endpoints(app, lambda context: Narrow(context, (1, 8, 8), 10, 5))
    node = Node(lambda config: make_grid(config, app=app), tiny_config)
    assert "Narrow.logits returned logits of shape (12, 9) for 12 images and 10 classes" in str(
        node.ask(REQUESTS[2]).error.reason
    )
    assert "has no common test set" in str(node.ask(REQUESTS[5]).error.reason)
