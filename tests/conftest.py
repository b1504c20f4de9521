from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedzge_flwr.common.notices import warned_of
from fedzge_flwr.config.presets.catalogue import PAPER, preset_file, read_settings
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.launching import start
from tests.helpers.small_models import mlp, models
from tests.helpers.snippets import registries

__all__ = ["models", "registries", "start"]


@pytest.fixture(autouse=True, scope="session")
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that an earlier version of the code worked out is read."""
    place = tmp_path_factory.getbasetemp()
    with pytest.MonkeyPatch.context() as patch:
        # The parent is common to the processes of one test run.
        several = "PYTEST_XDIST_WORKER" in os.environ
        patch.setenv("XDG_CACHE_HOME", str(place.parent if several else place))
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_said_before() -> None:
    warned_of.cache_clear()


@pytest.fixture
def small_config(tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that takes a second, of any recipe: real digits, few of everything."""
    return {
        "output-dir": str(tmp_path / "runs"),
        "run-name": "run",
        "num-clients": 3,
        "num-server-rounds": 2,
        "num-train-images": 120,
        "num-test-images": 60,
        "local-epochs": 1,
        "synthetic-batch-size": 12,
        "latent-dim": 8,
        "generator-width": 4,
        "q": 2,
        "central-distill-steps": 2,
        "client-distill-steps": 2,
        "client-distill-lr": 0.001,
        "server-threads": 1,
    }


@pytest.fixture
def tiny_config(small_config: dict[str, Any]) -> dict[str, Any]:
    """The paper's round, small."""
    return {**read_settings(preset_file(PAPER)), **small_config}


@pytest.fixture
def efficient_config(small_config: dict[str, Any]) -> dict[str, Any]:
    """The default recipe, small, all of its parts in use."""
    return {
        **small_config,
        "synthetic-batch-size": 20,
        "generator-share": 1.0,
        "generator-steps": 1,
        "memory-size": 30,
        "min-local-steps": 4,
        "distill-batch-size": 8,
    }


@pytest.fixture
def make_grid() -> Any:
    def make(config: dict[str, Any], **options: Any) -> InProcessGrid:
        import client_app

        app = options.pop("app", client_app.app)
        return InProcessGrid(
            app, config, options.pop("num_nodes", config["num-clients"]), **options
        )

    return make


@pytest.fixture(scope="session")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained model in ONNX format, and its state beside it."""
    from fedzge_flwr import export_onnx
    from tests.helpers.boxes import SHAPE, train_a_little

    torch.manual_seed(0)
    model = mlp(SHAPE, 10)
    train_a_little(model)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, path, SHAPE)
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    return path
