"""The real thing: the app on Flower's engine and real Ray, through the launcher."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedzge_flwr.launch.processes import ProcessFamily
from fedzge_flwr.launch.simulate import ENGINE
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.paths import ROOT
from tests.helpers.running import rows_of, run_server

pytestmark = pytest.mark.e2e


def payload_of(row: dict[str, Any]) -> dict[str, Any]:
    """A round's bytes by client and purpose, without the envelopes."""
    return {
        client: [
            {name: size for name, size in traffic[way].items() if name != "envelope"}
            for way in ("down", "up")
        ]
        for client, traffic in row["client_bytes"].items()
    }


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
    there, here = rows_of(folder.with_name("a")), rows_of(folder)
    assert [payload_of(row) for row in there] == [payload_of(row) for row in here]
    assert there[-1]["bytes_down_total"] == pytest.approx(here[-1]["bytes_down_total"], rel=2e-2)


@pytest.fixture
def two_nodes() -> Any:
    """A Ray cluster of two nodes with a CPU each: its address, and the ids of its raylets."""
    # Short, since Ray's sockets live below it.
    place = Path(tempfile.mkdtemp(prefix="ray-"))
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    ray = Path(sys.executable).with_name("ray")
    common = ["--num-cpus", "1", "--disable-usage-stats", "--block"]
    head = ["--head", "--port", address.split(":")[1], "--temp-dir", str(place)]
    head += ["--include-dashboard", "false"]
    processes = []

    def raylets() -> set[int]:
        return {
            process.pid
            for process in psutil.process_iter(["pid", "name", "cmdline"])
            if process.info["name"] == "raylet"
            and str(place) in " ".join(process.info["cmdline"] or ())
        }

    try:
        for number, options in enumerate((head, ["--address", address])):
            command = [str(ray), "start", *options, *common]
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            deadline = time.monotonic() + 90
            while len(raylets()) <= number:
                assert processes[-1].poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield address, raylets
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=30)
        left = [p for p in psutil.process_iter(["cmdline"]) if str(place) in str(p.info["cmdline"])]
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=10)
        shutil.rmtree(place)


@pytest.mark.slow
def test_clients_spread_over_a_ray_cluster_that_is_there_already(
    tmp_path: Path,
    efficient_config: dict[str, Any],
    start: Any,
    two_nodes: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, raylets = two_nodes
    nodes = raylets()
    assert len(nodes) == 2
    monkeypatch.setenv("RAY_ADDRESS", address)
    run = start(efficient_config)
    workers: dict[int, int] = {}
    while run.poll() is None:
        for process in psutil.process_iter(["pid", "ppid", "cmdline"]):
            if "ray::ClientAppActor" in " ".join(process.info["cmdline"] or ()):
                workers[process.info["pid"]] = process.info["ppid"]
        time.sleep(0.2)
    out, err = run.communicate()
    assert run.returncode == 0, out + err
    assert len(workers) == 2
    assert set(workers.values()) == nodes
    # The cluster is not this run's to end, and has no part in the numbers.
    assert raylets() == nodes
    folder = Path(efficient_config["output-dir"])
    central = (folder / "run" / "central.safetensors").read_bytes()

    import client_app

    config = {**efficient_config, "run-name": "in-process"}
    run_server(InProcessGrid(client_app.app, config, 3), config)
    assert (folder / "in-process" / "central.safetensors").read_bytes() == central


def test_a_name_that_nothing_has_begins_no_run_and_leaves_no_ray(tmp_path: Path) -> None:
    """Also in an app that registers parts of its own, which the launcher cannot know."""
    specification = tmp_path / "simulation.json"
    content = {
        "app": str(ROOT),
        "run-config": {"central-model": "cnm"},
        "num-supernodes": 2,
        "backend-config": {"init_args": {"include_dashboard": False}},
        "share-cores-among": 0,
        "verbose": False,
    }
    specification.write_text(json.dumps(content))
    own = {"RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": ""}
    family = ProcessFamily({**os.environ, **own}, tmp_path)
    try:
        with (tmp_path / "log").open("wb") as output:
            engine = family.start([sys.executable, "-P", ENGINE, specification], output)
        assert engine.wait(300) == 1
        log = (tmp_path / "log").read_text()
        assert "fedzge: no model named 'cnm'; known: cnn, cnn5, gabor-linear, resnet18" in log
        assert "run folder" not in log
        # Without being asked: Ray's processes go with the one that started them.
        _, left = psutil.wait_procs(family.alive(), timeout=30)
        assert left == []
    finally:
        family.end()


@pytest.mark.faults
def test_a_failing_server_app_is_told_in_one_line(tiny_config: dict[str, Any], start: Any) -> None:
    config = {**tiny_config, "num-clients": 100, "num-train-images": 50}
    out, err = (run := start(config)).communicate(timeout=300)
    assert run.returncode == 1, out + err
    assert "error: 'num-clients' = 100 is too many for the 50 training images" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "sign", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM]
)
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
from fedzge_flwr.black_boxes.node import torch_black_box
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.client.endpoints import register_endpoints
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.grid.channel import Channel

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
    clients = Channel(grid, settings, 280.0, "0" * 32, None)
    clients.gather()
    with open(os.path.join({folder!r}, "shares"), "w") as file:
        file.write(" ".join(str(m.hello.gpu_share) for m in clients.members.values()))
'''


@pytest.mark.slow
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
