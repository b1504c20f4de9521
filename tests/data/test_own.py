"""A node's owner points at images of their own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from PIL import Image

from fedzge_flwr.common.errors import ConfigError, DataError
from fedzge_flwr.config.node import from_node_config
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.data.own import load_own, own_data
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.images.spec import DATASETS, DatasetSpec
from fedzge_flwr.wire.codec import decode, encode
from fedzge_flwr.wire.messages import (
    EvaluateReply,
    EvaluateRequest,
    HelloReply,
    HelloRequest,
    LogitsReply,
    LogitsRequest,
    Reply,
    Request,
    TrainReply,
    TrainRequest,
)
from tests.helpers.running import run_server

GREY, RGB = DatasetSpec(3, (1, 8, 8)), DatasetSpec(3, (3, 8, 8))


def some_images(spec: DatasetSpec, num: int = 7) -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(num, *spec.image_shape), dtype=np.uint8)
    return ImageSet(images, np.sort(rng.integers(spec.num_classes, size=num)))


def picture(pixels_CHW: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels_CHW[0] if len(pixels_CHW) == 1 else pixels_CHW.transpose(1, 2, 0))


def write_folder(images: ImageSet, folder: Path, names: list[str]) -> Path:
    for number, (pixels, label) in enumerate(zip(images.images_NCHW, images.labels_N, strict=True)):
        (folder / names[label]).mkdir(parents=True, exist_ok=True)
        picture(pixels).save(folder / names[label] / f"{number:03}.png")
    return folder


def write_npz(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    np.savez(path, images=images, labels=labels)
    return path


def same(first: ImageSet, second: ImageSet) -> bool:
    return np.array_equal(first.images_NCHW, second.images_NCHW) and np.array_equal(
        first.labels_N, second.labels_N
    )


@pytest.mark.parametrize("spec", [GREY, RGB], ids=["grey", "rgb"])
def test_a_folder_is_the_images_that_it_was_made_from(spec: DatasetSpec, tmp_path: Path) -> None:
    images = some_images(spec)
    folder = write_folder(images, tmp_path / "own", ["0", "1", "2"])
    (folder / "0" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    found = load_own(str(folder), spec)
    assert same(found, images)
    assert (found.images_NCHW.dtype, found.labels_N.dtype) == (np.uint8, np.int64)


@pytest.mark.parametrize(
    ("spec", "layout"),
    [(GREY, "first"), (GREY, "last"), (GREY, "none"), (RGB, "first"), (RGB, "last")],
)
def test_an_npz_is_the_images_that_it_was_made_from(
    spec: DatasetSpec, layout: str, tmp_path: Path
) -> None:
    images = some_images(spec)
    arrays = {
        "first": images.images_NCHW,
        "last": images.images_NCHW.transpose(0, 2, 3, 1),
        "none": images.images_NCHW[:, 0],
    }
    path = write_npz(tmp_path / "own.npz", arrays[layout], images.labels_N.astype(np.uint8))
    found = load_own(str(path), spec)
    assert same(found, images)
    with pytest.raises(ValueError, match="read-only"):
        found.images_NCHW[0] = 0


def test_pictures_are_made_grey_or_coloured_upright_and_of_the_runs_size(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    red = np.zeros((3, 16, 32), np.uint8)
    red[0] = 255
    red[:, :, 16:] = 0
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180°
    picture(red).save(tmp_path / "1" / "a.png", exif=exif)
    picture(red).convert("P").save(tmp_path / "1" / "b.PNG")
    grey, coloured = (load_own(str(tmp_path), spec).images_NCHW for spec in (GREY, RGB))
    assert grey.shape == (2, 1, 8, 8)
    assert coloured.shape == (2, 3, 8, 8)
    # ITU-R 601: red is 0.299 of white. Left half red, and turned the right one.
    assert (grey[1, 0, :, :3] == 76).all()
    assert (grey[1, 0, :, 5:] == 0).all()
    assert (grey[0, 0, :, 5:] == 76).all()
    assert (coloured[1, 0, :, :3] == 255).all()
    assert (coloured[1, 1:] == 0).all()


@pytest.mark.parametrize(
    ("names", "listed", "numbers"),
    [
        (["2", "00"], None, [2, 0]),
        (["cat", "ant", "bee"], None, [2, 0, 1]),
        (["bee", "cat"], "cat\nant\nbee\n", [2, 0]),
        (["2", "0"], "2\r\n1\r\n0\r\n", [0, 2]),
    ],
)
def test_class_numbers(
    names: list[str], listed: str | None, numbers: list[int], tmp_path: Path
) -> None:
    wanted = {}
    for grey, (name, number) in enumerate(zip(names, numbers, strict=True)):
        (tmp_path / name).mkdir()
        picture(np.full((1, 8, 8), 50 * grey, np.uint8)).save(tmp_path / name / "image.png")
        wanted[50 * grey] = number
    if listed is not None:
        (tmp_path / "classes.txt").write_text(listed, newline="")
    found = load_own(str(tmp_path), GREY)
    pixels = found.images_NCHW[:, 0, 0, 0].tolist()
    assert dict(zip(pixels, found.labels_N.tolist(), strict=True)) == wanted


PIXELS, LABELS = np.zeros((4, 8, 8), np.uint8), np.arange(4) % 3

BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "no labels": ({"images": PIXELS}, r"lacks labels; it has \['images'\]"),
    "nothing": ({"x": PIXELS}, "lacks images and labels"),
    "floats": ({"images": PIXELS / 2, "labels": LABELS}, "'images' is float64; save uint8"),
    "names": (
        {"images": PIXELS, "labels": np.array(list("abca"))},
        r"'labels' is <U1 of shape \(4,\); save integers",
    ),
    "one-hot": ({"images": PIXELS, "labels": np.eye(4, dtype=int)}, r"of shape \(4, 4\)"),
    "objects": ({"images": PIXELS, "labels": LABELS.astype(object)}, "not a readable .npz"),
    "size": (
        {"images": PIXELS[:, :7], "labels": LABELS},
        r"'images' has shape \(4, 7, 8\); make it \(N, 1, 8, 8\) or",
    ),
    "channels": (
        {"images": np.zeros((4, 3, 8, 8), np.uint8), "labels": LABELS},
        r"shape \(4, 3, 8, 8\)",
    ),
    "count": ({"images": PIXELS, "labels": LABELS[:3]}, "4 images but 3 labels"),
    "none": ({"images": PIXELS[:0], "labels": LABELS[:0]}, "holds no images"),
    "high": ({"images": PIXELS, "labels": LABELS + 1}, "labels run from 1 to 3; .* 0 to 2"),
    "low": ({"images": PIXELS, "labels": LABELS - 1}, "labels run from -1 to 1"),
}


@pytest.mark.parametrize("kind", BAD_ARRAYS)
def test_bad_npz(kind: str, tmp_path: Path) -> None:
    arrays, message = BAD_ARRAYS[kind]
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    refused(path, message)


def refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_own(str(path), GREY)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_bad_paths(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such folder or file; correct 'data-path'")
    text = tmp_path / "images.csv"
    text.write_text("1,2,3")
    refused(text, "neither a folder nor an .npz file")
    text.rename(tmp_path / "text.npz")
    refused(tmp_path / "text.npz", "not a readable .npz")
    np.save(tmp_path / "array.npy", PIXELS)
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    refused(tmp_path / "array.npz", "not a readable .npz")


@pytest.mark.parametrize(
    ("names", "listed", "message"),
    [
        ([], None, "has no subfolders; put the images of each class into its own"),
        (["0", "3"], None, "3: no such class, they are 0 to 2; rename it"),
        (["ant", "bee"], None, "2 subfolders for 3 classes; name all classes in classes.txt"),
        (["ant", "1"], None, "2 subfolders for 3 classes"),
        (["ant"], "bee\ncat\ndog\n", "ant: classes.txt names no class 'ant'; add it"),
        (["ant"], "ant\nbee\n", "classes.txt: 2 lines, 2 of them different; name each of the 3"),
        (["ant"], "ant\nbee\nant\n", "classes.txt: 3 lines, 2 of them different"),
        (["ant"], "ant\nb\xe4r\ncat\n", "classes.txt: cannot be read"),
        (["0", "1"], None, "no images in its subfolders"),
    ],
)
def test_bad_folders(names: list[str], listed: str | None, message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    if listed is not None:
        (tmp_path / "classes.txt").write_bytes(listed.encode("latin-1"))
    refused(tmp_path, message)


@pytest.mark.parametrize("kind", ["text", "cut short", "16 bits"])
def test_bad_images(kind: str, tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    file = tmp_path / "0" / "image.png"
    picture(some_images(GREY, 1).images_NCHW[0]).save(file)
    if kind == "16 bits":
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(file)
        message = "image.png: more than 8 bits a channel; save it with 8"
    else:
        file.write_bytes(b"<html>" if kind == "text" else file.read_bytes()[:60])
        message = "image.png: not a readable image .*; mend or remove it"
        if kind == "text":
            message = "image.png: not a readable image: it is an HTML page; fetch the file again"
    refused(tmp_path, message)


def test_held_out_images_are_kept_from_training(tmp_path: Path) -> None:
    images = some_images(GREY, 40)
    path = write_npz(tmp_path / "own.npz", images.images_NCHW, images.labels_N % 3)
    settings = from_run_config({"holdout-fraction": 0.25}).data
    spec = DATASETS["digits"]
    whole = own_data(str(path), settings, 0, 1, hold_out=False)
    assert same(whole.train, load_own(str(path), spec))
    assert len(whole.held_out) == 0
    split, other = (own_data(str(path), settings, seed, 1, hold_out=True) for seed in (0, 1))
    assert (len(split.train), len(split.held_out)) == (30, 10)
    parts = np.concatenate([split.train.images_NCHW, split.held_out.images_NCHW])
    assert {part.tobytes() for part in parts} == {p.tobytes() for p in images.images_NCHW}
    assert not same(split.held_out, other.held_out)


@pytest.mark.parametrize(
    ("node_config", "message"),
    [
        ({"num-partitions": 3}, r"'partition-id' = None: give this node a number from 0 \(flower"),
        ({"partition-id": -1}, "'partition-id' = -1: give this node a number from 0"),
        ({"partition-id": True}, "'partition-id' = True: give this node"),
        ({"partition-id": 0, "num-partitions": 2.0}, "'num-partitions' = 2.0: give a number"),
        ({"partition-id": 0, "data-path": 7}, "'data-path' = 7: give a folder of images by class"),
        ({"partition-id": 0, "data-path": ""}, "'data-path' = '': give a folder"),
        ({"partition-id": 0, "datapath": "/x"}, "unknown key 'datapath': did you mean 'data-path'"),
        ({"partition-id": 0, "data_path": "/x"}, "'data_path': did you mean 'data-path'"),
        ({"partition-id": 0, "model": ""}, "'model' = '': give the name of a model, for the run's"),
    ],
)
def test_bad_node_configs(node_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^node config: .*{message}") as caught:
        from_node_config(node_config, from_run_config({}))
    assert "\n" not in str(caught.value)


def test_keys_of_other_apps_are_left_alone() -> None:
    settings = from_run_config({"num-clients": 4})
    given = {"partition-id": 2, "dataset": "x", "gpu": True, "model": "cnn", "models": "y"}
    node = from_node_config(given, settings)
    assert (node.partition_id, node.num_partitions, node.model) == (2, 4, "cnn")
    assert node.data_path is None


OWNER = 1


@pytest.fixture
def owners_config(tmp_path: Path) -> dict[str, Any]:
    """The config of a node with 33 images of two kinds: dark ones are 2, bright ones are 5."""
    labels = np.where(np.arange(33) % 2, 2, 5)
    noise = np.random.default_rng(0).integers(50, size=(33, 8, 8))
    images = (noise + 200 * (labels == 5)[:, None, None]).astype(np.uint8)
    path = write_npz(tmp_path / "own.npz", images, labels)
    return {"partition-id": OWNER, "num-partitions": 3, "data-path": str(path)}


def ask(grid: Any, request: Request, reply_type: type[Reply]) -> Any:
    node_id = sorted(grid.contexts)[OWNER]
    (reply,) = grid.send_and_receive([Message(encode(request), node_id, request.ACTION)])
    assert reply.has_content(), reply.error
    return decode([reply_type], reply.content, sender="node", dims={"K": 10}, limits={"B": 9})


def test_a_client_of_own_data(
    make_grid: Any, tiny_config: dict[str, Any], owners_config: dict[str, Any]
) -> None:
    config = {**tiny_config, "local-epochs": 30}
    grid = make_grid(config, node_configs={OWNER: owners_config})
    assert ask(grid, HelloRequest(round=0, version="x"), HelloReply).num_examples == 33
    assert ask(grid, TrainRequest(round=1), TrainReply).num_examples == 33
    dark_and_bright = np.repeat([-0.9, 0.9], 64).reshape(2, 1, 8, 8).astype("f4")
    query = LogitsRequest(round=1, images=dark_and_bright)
    logits_NK = ask(grid, query, LogitsReply).logits
    assert logits_NK.argmax(axis=1).tolist() == [2, 5]


def test_a_federation_with_a_client_of_own_data(
    make_grid: Any, tiny_config: dict[str, Any], owners_config: dict[str, Any]
) -> None:
    grid = make_grid(tiny_config, node_configs={OWNER: owners_config})
    folder = run_server(grid, tiny_config)
    clients = json.loads((folder / "config.json").read_text())["clients"]
    assert clients[str(OWNER)].startswith("33 examples")
    assert not any(text.startswith("33 examples") for n, text in clients.items() if n != "1")
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert all(row["participants"] == [0, 1, 2] and not row["missing"] for row in rows)


def test_own_data_are_evaluated_on_their_held_out_part(
    make_grid: Any, tiny_config: dict[str, Any], owners_config: dict[str, Any]
) -> None:
    config = {**tiny_config, "client-evaluation": "held-out", "holdout-fraction": 0.3}
    grid = make_grid(config, node_configs={OWNER: owners_config})
    assert ask(grid, HelloRequest(round=0, version="x"), HelloReply).num_examples == 23
    request = EvaluateRequest(round=1, split="held-out", num_logits=0)
    node_id = sorted(grid.contexts)[OWNER]
    (reply,) = grid.send_and_receive([Message(encode(request), node_id, request.ACTION)])
    outcome = decode(
        [EvaluateReply], reply.content, sender="node", dims={"K": 10, "M": 0}, limits={}
    )
    assert outcome.num_examples == 10


def test_the_server_learns_no_file_names(
    make_grid: Any,
    tiny_config: dict[str, Any],
    owners_config: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("flwr").propagate = True
    owners_config["data-path"] = "/home/alice/secret"
    grid = make_grid(tiny_config, node_configs={OWNER: owners_config})
    request = HelloRequest(round=0, version="x")
    node_id = sorted(grid.contexts)[OWNER]
    with caplog.at_level(logging.ERROR):
        (reply,) = grid.send_and_receive([Message(encode(request), node_id, request.ACTION)])
    assert "cannot be used; the node's own log says why" in str(reply.error.reason)
    assert "alice" not in str(reply.error.reason)
    assert "DataError: /home/alice/secret: no such folder or file" in caplog.text
