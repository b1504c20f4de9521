"""``kill -9`` in every phase of a round, of real processes; resumed, the run ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.launching import ROOT, app_with_server, toml_pairs
from tests.helpers.resuming import PHASES, assert_same_results, unbroken

# A launch takes 40 CPU-seconds: a death of each, where clients are at work and before a checkpoint;
# the rest of the plans, a death of each in every phase, is slow. Below, without Ray, it is quick.
WHOM = ("serverapp", "everything")
PLANS = {
    "where it matters": [
        ("ask_clients", "everything"),
        ("save_checkpoint", "serverapp"),
    ],
    **{f"every phase, {whom}": [(phase, whom) for phase in PHASES] for whom in WHOM},
}

# The app itself, whose run folder, which hears of every phase, kills as the plan says.
DEADLY = """
import os, signal
from pathlib import Path

import psutil

import real_server_app
from fedzge_flwr.launch.processes import MARKER


class Deadly(real_server_app.RunFolder):
    def on_phase(self, round_, phase):
        super().on_phase(round_, phase)
        plan = Path(os.environ["PLAN_OF_DEATHS"])
        first, *others = plan.read_text().splitlines() or [""]
        at, name, whom = (first.split() + [""] * 3)[:3]
        if (at, name) == (str(round_), phase):
            plan.write_text("\\n".join(others))
            if whom == "everything":
                mine = os.environ[MARKER]
                for process in psutil.process_iter():
                    try:
                        if process.pid != os.getpid() and process.environ().get(MARKER) == mine:
                            process.kill()
                    except psutil.Error:
                        pass
            os.kill(os.getpid(), signal.SIGKILL)


real_server_app.RunFolder = Deadly
app = real_server_app.app
"""


@pytest.fixture
def config(efficient_config: dict[str, Any]) -> dict[str, Any]:
    return {
        **efficient_config,
        "num-server-rounds": 3,
        "fraction-train": 0.6,
        "client-distill-rounds": 0,
    }


@pytest.mark.parametrize(
    "transport",
    [
        pytest.param("compact", marks=pytest.mark.faults),
        pytest.param("dense", marks=pytest.mark.slow),
    ],
)
def test_killed_in_every_phase_and_resumed(
    tmp_path: Path, config: dict[str, Any], transport: str
) -> None:
    """One process for the server and all clients, each time another."""
    config["transport"] = transport
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, "-m", "tests.helpers.dying", str(file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "FEDZGE_STATE_DIR": str(tmp_path / "states")},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert_same_results(Path(config["output-dir"]) / "run", unbroken(config))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if "every" in name else pytest.mark.faults)
        for name in PLANS
    ],
)
def test_killed_on_ray_and_resumed(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    """The server's process, or the SuperLink with all that it started, in the second round."""
    deaths_due = PLANS[name]
    app = app_with_server(tmp_path / "app", DEADLY)
    plan = tmp_path / "plan"
    plan.write_text("\n".join(f"2 {phase} {whom}" for phase, whom in deaths_due))
    environment = {**os.environ, "PLAN_OF_DEATHS": str(plan)}
    environment.pop("FEDZGE_STATE_DIR", None)
    folder = Path(config["output-dir"]) / "run"
    command = [sys.executable, "-m", "fedzge_flwr.cli", "run", "--app", str(app)]
    # One worker for all clients: another costs its start, and these clients have little to do.
    workers = ["--client-cpus", str(os.cpu_count())]
    options = ["--run-config", toml_pairs(config), *workers]
    deaths = 0
    while True:
        run = subprocess.run(
            [*command, *options],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
            cwd=tmp_path,
            env=environment,
        )
        if run.returncode == 0:
            break
        deaths += 1
        assert deaths <= len(deaths_due), run.stdout + run.stderr
        assert f"make run RESUME='{folder}'" in run.stdout, run.stdout + run.stderr
        options = ["--resume", str(folder), *workers]
    assert deaths == len(deaths_due)
    assert plan.read_text() == ""
    assert "3/3" in run.stdout

    assert_same_results(folder, unbroken(config))
    # Of the clients' states there is left what is their owners' to use.
    left = {path.name for path in (folder / "clients").glob("*/*/*")}
    assert left == {"client.safetensors"}
