"""What only a GPU can show; without one, nothing here runs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.costs.gpu import GpuWatch, visible_gpu
from benchmarks.costs.simulated import Rows
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.learning.models.catalogue import build_model
from fedzge_flwr.learning.numerics import tensor_float32
from fedzge_flwr.learning.predict import predict
from tests.helpers.launching import ROOT
from tests.helpers.running import central_of, rows_of, run_server

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

CUDA = torch.device("cuda")
SHAPE = (3, 32, 32)


def held() -> tuple[int, int]:
    """Bytes that tensors of this process take on the GPU, and that torch holds in stock."""
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


@pytest.fixture(autouse=True)
def _all_memory() -> Iterator[None]:
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def images(num: int) -> torch.Tensor:
    return torch.rand(num, *SHAPE, generator=torch.Generator().manual_seed(num)) * 2 - 1


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_answers_are_those_of_a_cpu_but_for_the_last_bits(name: str) -> None:
    """TF32, which torch would take for convolutions, keeps three digits; the answers keep six."""
    torch.manual_seed(0)
    model = build_model(name, SHAPE, 10).eval()
    x_NCHW = images(64)
    there = predict(model, x_NCHW, 32)
    here = predict(model.to(CUDA), x_NCHW, 32)
    scale = float(there.abs().max())
    assert float((here - there).abs().max()) < 1e-4 * scale
    with torch.inference_mode(), tensor_float32(allowed=True):
        rough = model(x_NCHW.to(CUDA)).cpu()
    assert float((rough - there).abs().max()) > 3 * float((here - there).abs().max())


def test_a_query_goes_on_with_fewer_images_when_memory_runs_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 256, 3, padding=1), nn.Flatten(), nn.LazyLinear(10)).eval()
    x_NCHW = images(1024)
    there = predict(model, x_NCHW, 1024)
    model.to(CUDA)
    # 1,024 images become 1 GiB of activations; the model itself is small.
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(600 * 2**20 / total)
    with caplog.at_level(logging.WARNING, "flwr.fedzge"):
        here = predict(model, x_NCHW, 1024)
    assert "out of memory: 512 images at a time from here on" in caplog.text
    assert torch.allclose(here, there, atol=1e-4)


def test_a_client_takes_no_more_than_its_share() -> None:
    """In a process of its own, as Ray's workers are: the cap is a process's."""
    script = """
import torch
from fedzge_flwr.black_boxes.partition import cap_memory
_, total = torch.cuda.mem_get_info()
cap_memory(torch.device("cuda"), 0.1)
kept = torch.empty(int(total * 0.09), dtype=torch.uint8, device="cuda")
try:
    torch.empty(int(total * 0.02), dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    print("refused")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "refused", run.stderr


def test_nothing_is_left_on_the_device_between_messages() -> None:
    settings = from_run_config({"num-train-images": 400, "num-clients": 2, "local-epochs": 1})
    box = TorchBlackBox(settings, 0, 2)
    box.fit(1)
    x_NCHW = np.random.default_rng(0).uniform(-1, 1, (50, 1, 8, 8)).astype(np.float32)
    box.distill(1, x_NCHW, box.logits(x_NCHW), 1.5)
    state = box.state()
    assert held()[0] > 0
    box.close()
    del box
    # cuBLAS keeps a workspace for each thread that used it.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    assert held() == (0, 0)
    assert all(isinstance(array, np.ndarray) for array in state.values())


@pytest.mark.parametrize("recipe", ["paper", "efficient"])
def test_a_run_on_the_gpu(recipe: str, make_grid: Any, tiny_config: dict[str, Any]) -> None:
    """It ends, says where clients compute, and gives the same model again."""
    config = {
        **tiny_config,
        "recipe": recipe,
        "generator-share": 2.0,
        "server-device": "cuda",
        "client-device": "cuda",
    }
    folders = [
        run_server(make_grid(named), named)
        for named in ({**config, "run-name": name} for name in ("first", "second"))
    ]
    assert all(len(rows_of(folder)) == 2 for folder in folders)
    clients = json.loads((folders[0] / "config.json").read_text())["clients"]
    assert all("on cuda" in text for text in clients.values()), clients
    first, second = (central_of(folder) for folder in folders)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_clients_share_the_gpu_in_a_real_simulation(
    tiny_config: dict[str, Any], start: Any
) -> None:
    run = start(tiny_config, "--client-gpus", "0.25")
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, out + err
    folder = Path(tiny_config["output-dir"]) / tiny_config["run-name"]
    clients = json.loads((folder / "config.json").read_text())["clients"]
    assert len(clients) == 3
    assert all("on cuda (0.25 of a GPU)" in text for text in clients.values()), clients


def test_the_gpu_s_memory_is_watched(tmp_path: Path) -> None:
    rows = tmp_path / "rounds.jsonl"
    rows.write_text("{}\n")
    kept = torch.empty(2**30, dtype=torch.uint8, device=CUDA)
    with GpuWatch(Rows(rows)) as watch:
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000)
        torch.cuda.synchronize()
    assert kept.numel() == 2**30
    found = watch.figures()
    assert found["gpu_mb_peak"] > 1024
    assert torch.cuda.get_device_name() in visible_gpu()
