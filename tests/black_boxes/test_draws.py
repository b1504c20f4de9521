"""A node that has a secret draws from it; the run's seed, which the server knows, says nothing."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedzge_flwr.black_boxes.draws import seed_of_draws
from fedzge_flwr.black_boxes.module import ModuleBlackBox
from fedzge_flwr.black_boxes.node import torch_black_box
from fedzge_flwr.common.errors import StateError
from tests.helpers.boxes import SHAPE, context_of, digits
from tests.helpers.small_models import mlp

CONFIG = {"num-clients": 3, "num-train-images": 120, "min-local-steps": 4}


def box(state_dir: Path | str = "", **config: Any) -> Any:
    node = {"partition-id": 0, "num-partitions": 3, "state-dir": str(state_dir)}
    return torch_black_box(
        Context(
            run_id=1,
            node_id=1,
            node_config=node,
            state=RecordDict(),
            run_config={**CONFIG, **config},
        )
    )


def first_values(of: Any) -> np.ndarray:
    return np.concatenate([np.ravel(value) for value in of.state().values()])


def test_the_first_values_of_a_model_are_the_nodes_own(tmp_path: Path) -> None:
    plain, own = first_values(box()), first_values(box(tmp_path / "a"))
    assert not np.allclose(plain, own)
    assert not np.allclose(own, first_values(box(tmp_path / "b")))
    # After a restart they are the same, and other ones for another seed.
    np.testing.assert_array_equal(own, first_values(box(tmp_path / "a")))
    assert not np.allclose(own, first_values(box(tmp_path / "a", seed=1)))
    key = tmp_path / "a" / "node" / "noise.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_batches_are_too(tmp_path: Path) -> None:
    """From the same values: what training and distillation draw."""
    start = box().state()
    trained, distilled = [], []
    for place in ("", tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        made = box(place)
        made.load_state({name: np.array(value) for name, value in start.items()})
        made.fit(1)
        trained.append(first_values(made))
        made.load_state({name: np.array(value) for name, value in start.items()})
        images = np.linspace(-1, 1, 200 * 64, dtype=np.float32).reshape(200, 1, 8, 8)
        made.distill(1, images, np.eye(10, dtype=np.float32)[np.arange(200) % 10], 1.0)
        distilled.append(first_values(made))
    for found in (trained, distilled):
        np.testing.assert_array_equal(found[1], found[2])
        assert not np.allclose(found[0], found[1])
        assert not np.allclose(found[1], found[3])


def test_so_is_what_a_users_own_model_draws(tmp_path: Path) -> None:
    drawn = []
    for place in ("", str(tmp_path / "a")):
        context = context_of()
        context.node_config["state-dir"] = place
        made = ModuleBlackBox(
            context,
            lambda: mlp(SHAPE, 10),
            None,
            SHAPE,
            10,
            50,
            own=digits("train").take(np.arange(60)),
        )
        made.fit(1)
        drawn.append(made._seed())
    assert drawn[0] == 0
    assert drawn[1] > 2**63


def test_a_simulations_folder_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = first_values(box())
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path))
    np.testing.assert_array_equal(plain, first_values(box()))


def test_no_folder_is_made_before_something_is_drawn(tmp_path: Path) -> None:
    made = box(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    made.fit(1)
    assert (tmp_path / "a" / "node" / "noise.key").exists()


def test_a_secret_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "noise.key").write_bytes(b"short")
    with pytest.raises(StateError, match=r"noise.key is not a key: .* restore it, or remove it"):
        seed_of_draws({"state-dir": str(tmp_path)}, 0)
