"""What a client keeps between messages, in Flower's context and in its owner's folder."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from safetensors.numpy import load_file

from fedzge_flwr.client.account import Account, ContextAccount, FolderAccount
from fedzge_flwr.client.store import (
    ContextStore,
    FolderStore,
    Kept,
    Progress,
    StateStore,
    open_store,
)
from fedzge_flwr.common.errors import RefusedError, StateError
from fedzge_flwr.wire.messages import TrainReply, TrainRequest
from tests.helpers.node import Node

DTYPES = ("float16", "float32", "float64", "int64", "uint8", "bool")


def model(seed: int = 0) -> dict[str, Any]:
    """Return a state with every dtype and shape that a model may have."""
    random = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for dtype in DTYPES:
        values = random.normal(scale=9, size=(3, 4))
        whole = values.astype(dtype) if dtype != "uint8" else np.abs(values).astype(dtype)
        arrays[f"{dtype} matrix"] = whole
        arrays[f"{dtype} scalar"] = whole[0, 0].reshape(())
        arrays[f"{dtype} empty"] = whole[:0]
        arrays[f"{dtype} strided"] = whole[:, ::2]
        arrays[f"{dtype} fortran"] = np.asfortranarray(whole)
    return arrays


def same(kept: Kept, state: dict[str, Any]) -> bool:
    assert kept.model is not None
    assert kept.model.keys() == state.keys()
    for name, value in state.items():
        assert kept.model[name].dtype == value.dtype, name
        assert kept.model[name].shape == value.shape, name
    return all(np.array_equal(kept.model[name], value) for name, value in state.items())


@pytest.fixture(params=["context", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    if request.param == "folder":
        return FolderStore(tmp_path / "states")
    return ContextStore(RecordDict())


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- the contract -----------------------------------------------------------------------------


def test_a_state_comes_back_as_it_was(store: StateStore) -> None:
    assert store.load("") == Kept()
    assert store.load("0f" * 8) == Kept()
    name = store.keep(model(1), Progress(7, 3))
    assert len(name) == 16
    kept = store.load(name)
    assert same(kept, model(1))
    assert (kept.name, kept.progress.distilled, kept.progress.trained) == (name, 7, 3)


def test_an_unknown_name_is_taken_for_the_newest(store: StateStore) -> None:
    """The server never got the reply that named it: the client goes on, and says from where."""
    store.keep(model(1), Progress(1, 0))
    newest = store.keep(model(2), Progress(2, 0))
    kept = store.load("ab" * 8)
    assert (kept.name, kept.progress.distilled) == (newest, 2)
    assert same(kept, model(2))


def test_images_asked_about_are_kept_until_others_are(store: StateStore) -> None:
    images = np.random.default_rng(0).integers(256, size=(3, 1, 4, 4), dtype=np.uint8)
    assert store.load_asked() == {}
    for digest in ("one", "two"):
        store.keep_asked({digest: images})
        (found,) = store.load_asked().items()
        assert found[0] == digest
        assert np.array_equal(found[1], images)
    store.keep_asked({})
    assert store.load_asked() == {}


@pytest.mark.parametrize("kind", ["context", "folder"])
def test_a_tally_is_kept_if_all_goes_well(kind: str, tmp_path: Path) -> None:
    account: Account = (
        ContextAccount(RecordDict()) if kind == "context" else FolderAccount(tmp_path)
    )
    with account.tally() as tally:
        tally.images, tally.last = 5, 1.5

    def refuse() -> None:
        with account.tally() as tally:
            tally.images = 99
            raise RefusedError

    with pytest.raises(RefusedError):
        refuse()
    with account.tally() as tally:
        assert (tally.images, tally.last) == (5, 1.5)


# -- the folder -------------------------------------------------------------------------------


def test_every_state_of_a_folder_can_be_gone_back_to(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    names = [store.keep(model(number), Progress(number, 0)) for number in range(4)]
    for number, name in enumerate(names):
        assert same(store.load(name), model(number))
    # No name is the initial state, though there are others.
    assert store.load("") == Kept()
    # Going on from an older one does not hide what came after it until that is forgotten.
    other = store.keep(model(9), Progress(1, 0))
    assert same(FolderStore(tmp_path).load("ab" * 8), model(9))
    store.forget_before(names[2])
    assert same(store.load(names[2]), model(2))
    assert store.load(names[1]).name == other
    store.forget_before("ab" * 8)
    store.forget_before("")
    assert len([name for name in files(tmp_path) if name.startswith("0")]) == 3


def test_the_owners_file_is_the_newest_state(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    first = store.keep(model(1), Progress(1, 0))
    for seed in (2, 3):
        name = store.keep(model(seed), Progress(seed, 0))
        assert same(Kept("", dict(load_file(tmp_path / "client.safetensors"))), model(seed))
        # Without another copy's room on the disk.
        (path,) = tmp_path.glob(f"*-{name}.safetensors")
        assert path.samefile(tmp_path / "client.safetensors")
    store.load(first)
    assert same(Kept("", dict(load_file(tmp_path / "client.safetensors"))), model(3))


def test_the_owners_file_on_a_file_system_without_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    FolderStore(tmp_path).keep(model(1), Progress(1, 0))
    assert same(Kept("", dict(load_file(tmp_path / "client.safetensors"))), model(1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: b"\xff" * len(data),
        lambda data: data.replace(b'"distilled":"2"', b'"distilled":"x"'),
        lambda data: data.replace(b'"distilled":"2"', b'"distillex":"2"'),
        lambda data: data.replace(b'"trained":"0"', b'"trainex":"0"'),
    ],
    ids=["half", "a few bytes", "empty", "garbage", "no number", "no rounds", "no training"],
)
def test_a_bad_state_file_is_passed_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any
) -> None:
    store = FolderStore(tmp_path)
    first, second = (store.keep(model(number), Progress(number, 0)) for number in (1, 2))
    (path,) = tmp_path.glob(f"*-{second}.safetensors")
    data = path.read_bytes()
    assert spoil(data) != data
    path.write_bytes(spoil(data))
    kept = store.load(second)
    assert kept.name == first
    assert same(kept, model(1))
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert all(
        f"{path} cannot be read and is passed over" in record.getMessage()
        for record in caplog.records
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "5",
        "null",
        '{"images": 5, "last": 0.0, "more": 1}',
        '{"images": "5"}',
        '{"images": NaN}',
        '{"images": -5}',
        '{"images": 5.5}',
        '{"images": true}',
        '{"images": 5, "last": Infinity}',
        '{"images": 5, "last": "now"}',
        "\ufffd",
    ],
)
def test_a_tally_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tally.json"
    path.write_text(text, encoding="utf-16" if text == "\ufffd" else "utf-8")
    before = path.read_bytes()
    with pytest.raises(StateError) as caught, FolderAccount(tmp_path).tally():
        pytest.fail("given all the same")
    assert str(caught.value).startswith(f"{path} is not a tally (")
    assert "remove it to begin anew" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert path.read_bytes() == before


# -- what cannot be written -------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(
    make_grid: Any,
    tiny_config: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("in the way")
    for state_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        owner = {"partition-id": 0, "num-partitions": 3, "state-dir": str(state_dir)}
        node = Node(lambda config, o=owner: make_grid(config, node_configs={0: o}), tiny_config)
        reason = str(node.ask(TrainRequest(round=1)).error.reason)
        assert "its state cannot be kept where its owner wants it" in reason
        assert str(tmp_path) not in reason
        assert f"'state-dir': {state_dir}/" in caplog.text
        assert "cannot be written (Not a directory); free space, or name a folder" in caplog.text
        assert not node.state()


def test_a_folder_that_is_gone_is_told_of(tmp_path: Path) -> None:
    """A regular file has taken its place in mid-run."""
    store = FolderStore(tmp_path / "states")
    store.keep(model(1), Progress(1, 0))
    (tmp_path / "states").rename(tmp_path / "moved")
    (tmp_path / "states").write_text("in the way")
    line = rf"^'state-dir': {tmp_path}/states cannot be written \(Not a directory\); free space"
    for attempt in (
        lambda: store.keep(model(2), Progress(2, 0)),
        lambda: store.load("ab" * 8),
        lambda: store.keep_asked({"one": np.zeros((1, 1, 1, 1), np.uint8)}),
        lambda: store.work().__enter__(),
    ):
        with pytest.raises(StateError, match=line):
            attempt()
    (tmp_path / "states").unlink()
    (tmp_path / "moved").rename(tmp_path / "states")
    assert same(store.load("ab" * 8), model(1))


_WRITE = """
import json, os, pathlib, resource, signal, sys
import numpy as np
from fedzge_flwr.client.account import FolderAccount
from fedzge_flwr.client.store import FolderStore, Progress
from fedzge_flwr.common.errors import StateError
folder, how = pathlib.Path(sys.argv[1]), sys.argv[2]
store = FolderStore(folder)
small = {"w": np.arange(10.0)}
names = [store.keep(small, Progress(1, 0))]
store.keep_asked({"one": np.ones((2, 1, 4, 4), np.uint8)})
account = FolderAccount(folder)
with account.tally() as tally:
    tally.images = 5
print(json.dumps(names), flush=True)
big = {"w": np.zeros(1_000_000)}
"""

_FULL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (0 if how == "all" else 4096, resource.RLIM_INFINITY))
def count():
    with account.tally() as tally:
        tally.images += 7
asked = {"two": np.zeros((9000, 1, 1, 1), np.uint8)}
attempts = [lambda: store.keep(big, Progress(2, 0)), lambda: store.keep_asked(asked)]
for attempt in attempts + [count] * (how == "all"):
    try:
        attempt()
    except StateError as error:
        print(json.dumps(str(error)), flush=True)
"""

# Dead in the middle of the write: of the state, or of what comes after it.
_KILLED = """
import safetensors.numpy
write, link = safetensors.numpy.save_file, os.link
def half(arrays, path, metadata=None):
    write(arrays, path, metadata=metadata)
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)
def whole(arrays, path, metadata=None):
    write(arrays, path, metadata=metadata)
    os.kill(os.getpid(), signal.SIGKILL)
def linked(source, target):
    link(source, target)
    os.kill(os.getpid(), signal.SIGKILL)
if how == "linked":
    os.link = linked
elif how == "rlimit":
    # The kernel's signal for a file that grows too large, in its default disposition.
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
else:
    safetensors.numpy.save_file = {"half": half, "whole": whole}[how]
store.keep(big, Progress(2, 0))
"""


def in_a_process(script: str, folder: Path, how: str) -> tuple[int, list[Any]]:
    done = subprocess.run(
        [sys.executable, "-c", _WRITE + script, str(folder), how],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("how", ["states", "all"])
def test_a_full_disk_leaves_the_states_before(tmp_path: Path, how: str) -> None:
    code, (names, *errors) = in_a_process(_FULL, tmp_path, how)
    assert code == 0
    assert len(errors) == (3 if how == "all" else 2)
    for line in errors:
        assert line.startswith(f"'state-dir': {tmp_path} cannot be written (")
        assert "File too large" in line
        assert line.endswith("; free space, or name a folder that the node may write to")
    store = FolderStore(tmp_path)
    assert files(tmp_path) == [
        f"00000001-{names[0]}.safetensors",
        "asked.safetensors",
        "client.safetensors",
        "tally.json",
        "tally.lock",
    ]
    for name in (names[0], "ab" * 8):
        assert same(store.load(name), {"w": np.arange(10.0)})
    assert list(store.load_asked()) == ["one"]
    with FolderAccount(tmp_path).tally() as tally:
        assert tally.images == 5
    # With room again it goes on.
    assert same(store.load(store.keep(model(3), Progress(3, 0))), model(3))


@pytest.mark.parametrize("how", ["half", "whole", "linked", "rlimit"])
def test_a_client_that_is_killed_while_it_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    code, (names,) = in_a_process(_KILLED, tmp_path, how)
    assert code == -(signal.SIGXFSZ if how == "rlimit" else signal.SIGKILL)
    store = FolderStore(tmp_path)
    small = {"w": np.arange(10.0)}
    assert same(store.load(names[0]), small)
    newest = store.load("ab" * 8)
    if how == "linked":
        # The state was whole; only the owner's file is still that before.
        assert same(newest, {"w": np.zeros(1_000_000)})
    else:
        assert newest.name == names[0]
    assert same(Kept("", dict(load_file(tmp_path / "client.safetensors"))), small)
    name = store.keep(model(2), Progress(2, 0))
    assert same(store.load(name), model(2))
    assert same(Kept("", dict(load_file(tmp_path / "client.safetensors"))), model(2))
    assert not caplog.records


def test_limits_are_this_processs_own() -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["../x", "a/b", "/etc", "", "..", "\0", "ß" * 300, 1.5, b"../x"])
@pytest.mark.parametrize("experiment", ["0f" * 16, "../../x", "/etc/x", "\0", "~"])
def test_no_name_becomes_a_path(tmp_path: Path, client: object, experiment: str) -> None:
    store = open_store(RecordDict(), str(tmp_path / "states"), client, experiment)
    store.keep({"w": np.arange(3)}, Progress(0, 0))
    assert files(tmp_path) == ["states"]
    (of_experiment,) = (p for p in (tmp_path / "states").iterdir() if p.name != "node")
    (of_client,) = of_experiment.iterdir()
    for path in (of_experiment, of_client):
        assert path.name.removeprefix("client-").isalnum()
        assert len(path.name) <= 23
    assert of_client.stat().st_mode & 0o077 == 0


def test_clients_and_experiments_are_kept_apart(tmp_path: Path) -> None:
    kept: dict[str, tuple[object, str]] = {}
    for client in (0, 1, "0", "../0", True):
        for experiment in ("0f" * 16, "1f" * 16):
            store = open_store(RecordDict(), str(tmp_path), client, experiment)
            assert store.load("ab" * 8) == Kept()
            kept[store.keep({"w": np.arange(3)}, Progress(0, 0))] = (client, experiment)
    for name, (client, experiment) in kept.items():
        assert open_store(RecordDict(), str(tmp_path), client, experiment).load(name).name == name


def test_a_name_in_a_request_is_only_compared(
    make_grid: Any, tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    outside = FolderStore(tmp_path / "outside")
    outside.keep({"w": np.arange(3)}, Progress(0, 0))
    store = FolderStore(tmp_path / "inside")
    mine = store.keep(model(1), Progress(1, 0))
    for name in ("../outside/client", str(tmp_path / "outside" / "client"), "*", "client"):
        assert store.load(name).name == mine
        store.forget_before(name)
    assert store.load(mine).name == mine


def test_a_node_whose_partition_is_a_path_answers_nothing(
    make_grid: Any,
    tiny_config: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for partition in ("../x", "../../../tmp/x", 0):
        owner = {
            "partition-id": partition,
            "num-partitions": 3,
            "state-dir": str(tmp_path / "states"),
        }
        node = Node(lambda config, o=owner: make_grid(config, node_configs={0: o}), tiny_config)
        if partition == 0:
            node.answer(TrainRequest(round=1), TrainReply)
        else:
            reason = str(node.ask(TrainRequest(round=1)).error.reason)
            assert "its config, or the run's settings, cannot be used" in reason
            assert f"'partition-id' = {partition!r}: give this node a number" in caplog.text
            assert files(tmp_path) == []
    (folder,) = (tmp_path / "states").glob("*/client-*")
    assert folder.name == "client-0"


def test_what_killed_writers_left_is_removed_in_time(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    old, new = (tmp_path / f".{name}-12345678.safetensors" for name in ("00000001-a", "00000002-b"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    store.forget_before("")
    assert (old.exists(), new.exists()) == (False, True)
