"""The device that a setting names, and one that is not there."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from fedzge_flwr import FedZGE, make_settings
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.learning.numerics import select_device
from tests.helpers.boxes import SHAPE, TINY, digits
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.small_models import mlp

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0


def test_what_is_there() -> None:
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type == ("cuda" if GPUS else "cpu")


@pytest.mark.parametrize("name", [f"cuda:{GPUS}", "cuda:99999999999999999999"])
def test_a_gpu_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"= '{name}': PyTorch finds {GPUS} GPUs here") as caught:
        select_device(name)
    assert "\n" not in str(caught.value)


def test_a_run_says_so_before_anything_is_asked() -> None:
    settings = make_settings(**{**TINY, "server_device": f"cuda:{GPUS}"})
    central: nn.Module = mlp(SHAPE, 10)
    grid = InProcessGrid(None, {}, 2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="PyTorch finds"):
        FedZGE(settings, central).start(grid, ArrayRecord(central.state_dict()))
    assert not grid.sent


def test_a_client_says_so_when_it_is_made() -> None:
    config = {"num-clients": 2, "num-train-images": len(digits()), "client-device": f"cuda:{GPUS}"}
    with pytest.raises(ConfigError, match="PyTorch finds"):
        TorchBlackBox(from_run_config(config), 0, 2).profile()
