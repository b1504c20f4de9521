"""A run goes on with the images that it began with, or says that they are others."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedzge_flwr.common.errors import CheckpointError, RosterError, RunFolderError
from fedzge_flwr.data import loading, own, partition
from fedzge_flwr.wire.codec import decode, encode
from fedzge_flwr.wire.messages import HelloReply, HelloRequest
from tests.helpers.fabricate import images_for, labels_for, write_idx
from tests.helpers.resuming import resume
from tests.helpers.running import folder_of, run_server

EXPERIMENT = "a" * 32


@pytest.fixture
def config(efficient_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    more = {"num-clients": 2, "num-train-images": 0, "num-test-images": 0, "min-local-steps": 1}
    return {**efficient_config, **more, "data-dir": str(tmp_path / "data"), "dataset": "mnist"}


def write_mnist(folder: Path, number: int, shift: int) -> None:
    folder.mkdir(exist_ok=True)
    for name, many in (("train", number), ("t10k", 30)):
        labels = labels_for(many, 10)
        write_idx(folder / f"{name}-images-idx3-ubyte", images_for(labels, (28, 28)))
        shifted = (labels + shift * (name == "train")) % 10
        write_idx(folder / f"{name}-labels-idx1-ubyte", shifted.astype(np.uint8))
    loading._load_all.cache_clear()
    partition._partition_indices.cache_clear()


def test_a_simulation_with_other_images(
    make_grid: Any, config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many images of other classes; nothing of the run folder is touched."""
    write_mnist(tmp_path / "data", 60, 0)
    run_server(make_grid(config), config)
    (folder_of(config) / "checkpoints" / "round-000002.checkpoint").unlink()
    before = {p: p.read_bytes() for p in folder_of(config).rglob("*.json*")}
    write_mnist(tmp_path / "data", 60, 3)
    with pytest.raises(CheckpointError, match=r"began with \(client 0, client 1\): bring those"):
        resume(make_grid, config)
    assert {p: p.read_bytes() for p in folder_of(config).rglob("*.json*")} == before
    logging.getLogger("flwr").propagate = True
    resume(make_grid, {**config, "data-changes": "warn"})
    assert "goes on with other images than it began with: client 0, client 1" in caplog.text
    # That is what it goes on with from now on.
    write_mnist(tmp_path / "data", 60, 0)
    with pytest.raises(CheckpointError, match="client 0, client 1"):
        resume(make_grid, config)


def own_images(path: Path, number: int, grey: int) -> Path:
    labels = np.arange(number) % 10
    images = np.full((number, 8, 8), grey, np.uint8) + labels[:, None, None].astype(np.uint8)
    np.savez(path, images=images, labels=labels)
    own.load_own.cache_clear()
    return path


@pytest.fixture
def owners(tmp_path: Path) -> dict[int, dict[str, Any]]:
    """Two nodes with images and a state-dir of their owners'."""
    return {
        n: {
            "partition-id": n,
            "num-partitions": 2,
            "data-path": str(own_images(tmp_path / f"{n}.npz", 30, 10 * n)),
            "state-dir": str(tmp_path / f"state-{n}"),
        }
        for n in range(2)
    }


@pytest.mark.parametrize(("number", "said"), [(30, "other images than before"), (20, "20 images")])
def test_a_client_with_other_images_of_its_own(
    number: int,
    said: str,
    make_grid: Any,
    config: dict[str, Any],
    owners: dict[int, dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {**config, "dataset": "own", "image-shape": "1,8,8", "num-classes": 10}
    config |= {"client-evaluation": "off", "server-evaluation": "off"}
    run_server(make_grid(config, node_configs=owners), config)
    (folder_of(config) / "checkpoints" / "round-000002.checkpoint").unlink()
    own_images(tmp_path / "1.npz", number, 99)
    with pytest.raises(RosterError, match=f"^client 1 has {said}.*'data-changes' = \"warn\"$"):
        resume(make_grid, config, node_configs=owners)
    logging.getLogger("flwr").propagate = True
    resume(make_grid, {**config, "data-changes": "warn"}, node_configs=owners)
    assert f"client 1 has {said}" in caplog.text


def hello(make_grid: Any, config: dict[str, Any], node: dict[str, Any], experiment: str) -> str:
    grid = make_grid(config, num_nodes=1, node_configs={0: node})
    request = HelloRequest(round=0, version="x", experiment=experiment)
    (reply,) = grid.send_and_receive(
        [Message(encode(request), next(iter(grid.contexts)), request.ACTION)]
    )
    assert reply.has_content(), reply.error
    return decode([HelloReply], reply.content, sender="node", dims={}, limits={}).data


def test_what_a_server_is_told_of_images_tells_it_nothing_else(
    make_grid: Any,
    tiny_config: dict[str, Any],
    owners: dict[int, dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Neither which they are, nor that another client or experiment has the same."""
    node = owners[0]
    first = hello(make_grid, tiny_config, node, EXPERIMENT)
    assert len(first) == 48
    assert hello(make_grid, tiny_config, node, EXPERIMENT) == first
    assert hello(make_grid, tiny_config, node, "b" * 32)[16:] != first[16:]
    other = {**node, "state-dir": str(tmp_path / "other")}
    assert hello(make_grid, tiny_config, other, EXPERIMENT)[:16] != first[:16]
    # Images in another order are the same.
    path = tmp_path / "0.npz"
    with np.load(path) as arrays:
        images, labels = arrays["images"][::-1], arrays["labels"][::-1]
    np.savez(path, images=images, labels=labels)
    own.load_own.cache_clear()
    assert hello(make_grid, tiny_config, node, EXPERIMENT) == first
    # Without a folder nothing would last until a run is resumed.
    assert hello(make_grid, tiny_config, {**node, "state-dir": ""}, EXPERIMENT) == ""


# -- where the run folder is ------------------------------------------------------------------


def test_a_run_folder_that_was_moved_and_renamed_goes_on(
    make_grid: Any, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"dataset": "digits", "num-train-images": 60, "num-test-images": 20}
    # As the launcher has it.
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(folder_of(config) / "clients"))
    run_server(make_grid(config), config)
    old, new = folder_of(config), tmp_path / "elsewhere" / "my run (1)"
    wanted = (old / "central.safetensors").read_bytes()
    (old / "checkpoints" / "round-000002.checkpoint").unlink()
    (old / "central.safetensors").unlink()
    new.parent.mkdir()
    shutil.move(old, new)
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(new / "clients"))
    again = {**config, "resume": str(new), "node-changes": "warn"}
    with pytest.raises(RunFolderError, match="if it was moved, name where it is now"):
        resume(make_grid, config)
    from flwr.app import Context, RecordDict

    import server_app

    server_app.app(make_grid(again, shuffle=5), Context(7, 0, {}, RecordDict(), again))
    assert not old.exists()
    assert (new / "central.safetensors").read_bytes() == wanted
    assert json.loads((new / "config.json").read_text())["status"] == "finished"
    assert f'resume = "{new}"' in (new / "resume.toml").read_text()
