"""No picture ends a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedzge_flwr.images.pixels import shown
from fedzge_flwr.observers.asked import AskedPictures
from tests.helpers.running import run_server


@pytest.fixture
def config(efficient_config: dict[str, Any]) -> dict[str, Any]:
    return {
        **efficient_config,
        "num-clients": 2,
        "dataset": "own",
        "num-classes": 2,
        "num-train-images": 0,
        "num-test-images": 0,
        "server-evaluation": "off",
        "client-evaluation": "off",
    }


def nodes(folder: Path, channels: int) -> dict[int, dict[str, Any]]:
    labels = np.arange(20) % 2
    images = np.full((20, channels, 8, 8), 50, np.uint8)
    np.savez(folder / "own.npz", images=images, labels=labels)
    given = {"num-partitions": 2, "data-path": str(folder / "own.npz")}
    return {number: {"partition-id": number, **given} for number in range(2)}


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_images_of_any_number_of_channels_are_drawn(
    channels: int, make_grid: Any, config: dict[str, Any], tmp_path: Path
) -> None:
    config["image-shape"] = f"{channels},8,8"
    folder = run_server(make_grid(config, node_configs=nodes(tmp_path, channels)), config)
    with Image.open(folder / "generated" / "round-000001.png") as strip:
        assert (strip.mode, strip.height) == ("L", 8)
    assert (folder / "synthetic.png").is_file()
    assert not (folder / "warnings.log").exists()


def test_pictures_are_of_the_images_whose_class_the_ensemble_is_surest_of(tmp_path: Path) -> None:
    """By its margin over the second class; classes in order, none that was never answered."""
    greys = np.array([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=np.float32)
    images = np.broadcast_to(greys[:, None, None, None], (5, 1, 4, 4)).copy()
    logits = np.array([[5, 4.9, 0], [3, 0, 0], [0, 0, 1], [9, 0, 8.5], [0, 0, 4]], dtype=np.float32)
    pictures = AskedPictures(tmp_path / "generated")
    pictures.draw(3, images, logits)
    with Image.open(tmp_path / "generated" / "round-000003.png") as strip:
        found = np.asarray(strip)
    assert found.shape == (4, 8)
    assert found[0, ::4].tolist() == [64, 255]
    assert pictures.samples is not None
    shades, classes = pictures.samples
    assert classes.tolist() == [0, 0, 0, 2, 2]
    assert shades[:, 0, 0, 0].tolist() == [64, 191, 0, 255, 128]


def test_what_is_shown_of_channels() -> None:
    images = np.random.default_rng(0).integers(256, size=(2, 13, 3, 4), dtype=np.uint8)
    assert (shown(images)[:, 0] == np.rint(images.mean(axis=1))).all()
    for channels in (1, 3):
        assert shown(images[:, :channels]) is not None
        assert (shown(images[:, :channels]) == images[:, :channels]).all()


def test_libraries_that_cannot_draw(
    make_grid: Any,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever they raise is one warning for each kind of picture, of all rounds together."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr("PIL.Image.fromarray", fail)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    logging.getLogger("flwr").propagate = True
    config["image-shape"] = "1,8,8"
    folder = run_server(make_grid(config, node_configs=nodes(tmp_path, 1)), config)
    lines = (folder / "warnings.log").read_text().splitlines()
    assert sorted(lines) == [
        f"{folder / name} cannot be drawn (no fonts): the run goes on without; all figures are in "
        "rounds.jsonl"
        for name in ("accuracy.png", "bytes.png", "generated", "synthetic.png")
    ]
    assert (folder / "central.safetensors").is_file()
    assert not list(folder.glob(".*"))
