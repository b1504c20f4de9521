"""The real thing: ``flwr run`` on a real SuperLink and real Ray, through the launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.inprocess import InProcessGrid
from tests.running import rows_of, run_server

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parent.parent


def processes_below(folder: Path) -> list[str]:
    """Processes that work in a folder: a launch and all that it starts, whatever their titles."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(folder) and process.status() != "zombie":
                found.append(f"{process.pid} {process.cmdline()}")
        except psutil.Error:
            continue
    return found


def toml_pairs(config: dict[str, Any]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())


@pytest.fixture
def start() -> Any:
    """Start launches; afterwards nothing of them may be left, neither processes nor files."""
    # Short, since Ray's sockets are to live below it.
    place = Path(tempfile.mkdtemp(prefix="e2e-"))
    (place / "cwd").mkdir()

    def begin(config: dict[str, Any], *options: str) -> subprocess.Popen[str]:
        arguments = ["--app", str(ROOT), "--run-config", toml_pairs(config), *options]
        return subprocess.Popen(
            [sys.executable, "-m", "fedzge_flwr.launch", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A user's own working directory must not matter.
            cwd=place / "cwd",
            env={**os.environ, "TMPDIR": str(place)},
        )

    yield begin
    assert processes_below(place) == []
    assert [path.name for path in place.iterdir()] == ["cwd"]
    assert list((place / "cwd").iterdir()) == []
    shutil.rmtree(place)


def test_the_same_command_twice_and_in_process_are_bit_identical(
    efficient_config: dict[str, Any], start: Any
) -> None:
    # At the same time: two launches on one machine do not get in each other's way.
    configs = [{**efficient_config, "run-name": name, "fraction-train": 0.6} for name in ("a", "b")]
    # Ray is told of a logical GPU, of which each client gets a tenth; torch finds none.
    options = ["--client-gpus", "0.1", "--federation-config", "init-args-num-gpus=1"]
    runs = [start(config, *options) for config in configs]
    models = []
    for run, config in zip(runs, configs, strict=True):
        out, err = run.communicate(timeout=300)
        folder = Path(config["output-dir"]) / config["run-name"]
        assert run.returncode == 0, out + err
        assert out.strip().splitlines()[-1] == f"run folder: {folder}"
        assert "2/2" in out
        models.append((folder / "central.safetensors").read_bytes())
    assert models[0] == models[1]
    clients = json.loads((folder / "config.json").read_text())["clients"]
    assert len(clients) == 3
    assert all("examples on cpu (0.1 of a GPU)" in text for text in clients.values()), clients

    import client_app

    config = {**configs[0], "run-name": "in-process"}
    grid = InProcessGrid(client_app.app, config, 3)
    folder = run_server(grid, config)
    assert (folder / "central.safetensors").read_bytes() == models[0]
    # Bytes are counted the same over Flower's own grid, but for the digits of node ids and times.
    there = rows_of(folder.with_name("a"))[-1]["bytes_down_total"]
    here = rows_of(folder)[-1]["bytes_down_total"]
    assert there == pytest.approx(here, rel=1e-2)


def test_a_failing_server_app_is_told_in_one_line(tiny_config: dict[str, Any], start: Any) -> None:
    config = {**tiny_config, "num-clients": 100, "num-train-images": 50}
    out, err = (run := start(config)).communicate(timeout=300)
    assert run.returncode == 1, out + err
    assert "error: 'num-clients' = 100 is too many for the 50 training images" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_stops_and_cleans_up(
    tiny_config: dict[str, Any], start: Any, sign: int
) -> None:
    config = {**tiny_config, "num-server-rounds": 1000}
    run = start(config)
    rows = Path(config["output-dir"]) / "run" / "rounds.jsonl"
    deadline = time.monotonic() + 180
    # SIGTERM comes early, while Ray starts; SIGINT in the middle of a round.
    wanted = rows if sign == signal.SIGINT else rows.with_name("config.json")
    while not wanted.is_file():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(run.pid, sign)
    interrupted = time.monotonic()
    time.sleep(0.5)
    os.kill(run.pid, sign)  # impatience must not stop the clean-up
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert time.monotonic() - interrupted < 15
    assert "interrupted" in err
    assert json.loads((rows.with_name("config.json")).read_text())["status"] == "interrupted"


GPU_APP = '''
import os, time
from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from fedzge_flwr.client import register_endpoints
from fedzge_flwr.config import from_run_config
from fedzge_flwr.grid_clients import GridClients
from fedzge_flwr.torch_blackbox import TorchBlackBox, torch_black_box

def slow_black_box(context: Context) -> TorchBlackBox:
    """The PyTorch black box, that notes when it was at work."""
    started = time.time()
    open(os.path.join({folder!r}, f"{{context.node_id}}.in"), "w").close()
    # The first two wait for one another: they do run together, however slowly workers start.
    while sum(name.endswith(".in") for name in os.listdir({folder!r})) < 2:
        assert time.time() < started + 60
        time.sleep(0.05)
    time.sleep(0.5)
    with open(os.path.join({folder!r}, f"{{context.node_id}}.span"), "w") as file:
        file.write(f"{{started}} {{time.time()}}")
    return torch_black_box(context)

client = ClientApp()
register_endpoints(client, slow_black_box)
server = ServerApp()

@server.main()
def main(grid: Grid, context: Context) -> None:
    settings = from_run_config({{"num-clients": 4, "num-train-images": 200}})
    clients = GridClients(grid, settings, 280.0)
    clients.gather()
    with open(os.path.join({folder!r}, "shares"), "w") as file:
        file.write(" ".join(str(m.hello.gpu_share) for m in clients.members.values()))
'''


def test_gpu_shares_bound_how_many_clients_run_at_once(tmp_path: Path) -> None:
    """Of four CPUs and one logical GPU, half of that each lets two of four clients run at once."""
    folder = tmp_path / "notes"
    folder.mkdir()
    (tmp_path / "gpu_app.py").write_text(GPU_APP.format(folder=str(folder)))
    script = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from flwr.simulation import run_simulation\n"
        "import gpu_app\n"
        "run_simulation(gpu_app.server, gpu_app.client, 4, backend_config={\n"
        "  'init_args': {'num_cpus': 4, 'num_gpus': 1, 'log_to_driver': False},\n"
        "  'client_resources': {'num_cpus': 1, 'num_gpus': 0.5}})\n"
    )
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert (folder / "shares").is_file(), run.stdout + run.stderr
    assert (folder / "shares").read_text().split() == ["0.5"] * 4
    spans = [tuple(map(float, path.read_text().split())) for path in folder.glob("*.span")]
    assert len(spans) == 4
    together = max(sum(a <= start < b for a, b in spans) for start, _ in spans)
    assert together == 2
