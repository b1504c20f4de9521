"""The documentation's commands: each is run here or named with the test that runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.launching import ROOT, processes_below
from tests.helpers.pages import PAGES

TINY = (
    "num-server-rounds=1 num-clients=2 num-train-images=60 num-test-images=60 "
    "synthetic-batch-size=12 generator-width=4 local-epochs=1 min-local-steps=1 "
    "central-distill-steps=2 client-distill-steps=2"
)

# As documented, and as run here: with settings that take seconds, in folders of the test's.
RUN_HERE = {
    "make run": f"make run RUN_CONFIG='{TINY}'",
    "make run RUN_CONFIG='alpha=0.1 seed=1 num-server-rounds=10'": (
        f"make run RUN_CONFIG='alpha=10.0 seed=1 {TINY}'"
    ),
    "fedzge doctor": "fedzge doctor",
    "fedzge presets": "fedzge presets",
    "fedzge run --seeds 0,1,2 --run-config 'run-name=\"mine\" alpha=0.1'": (
        "fedzge run --output-dir runs --seeds 0,1,2 "
        f"--run-config 'run-name=\"mine\" {TINY}' --app {ROOT}"
    ),
    "fedzge report runs/mine-s0 runs/mine-s1 runs/mine-s2 -o report.html": (
        "fedzge report runs/mine-s0 runs/mine-s1 runs/mine-s2 -o report.html"
    ),
}
RUN_ELSEWHERE = {
    **dict.fromkeys(
        (
            r"C='.*'",
            r'C="\$C .*"',
            r'fedzge run (--preset paper )?--seeds 0,1,2 --run-config "\$C .*"',
            r"fedzge report .*\{0,1,2\}.*",
        ),
        "test_commands.py::test_a_comparison",
    ),
    r"make (test|test-slow|check|install|help)\b.*": "",  # this suite, and what runs it
    r"make run RESUME=.*": "test_kill.py::test_killed_on_ray_and_resumed",
    r"make run PRESET=.*": "test_app.py::test_preset_runs_a_tiny_round",
    r"FLWR_\S+ (FLWR_\S+ )+flwr run \. .*": "test_commands.py::test_plain_flower",
    r"FLWR_\S+ flwr run \. .*num-supernodes=5\"": "test_examples.py::test_quickstart_on_ray",
    r"FLWR_\S+ flwr run \. .*num-supernodes=4\"": "test_examples.py::test_mixed_black_boxes_on_ray",
    r"FLWR_\S+ flwr run \. .*table=.*": "test_examples.py::test_a_table_on_ray",
    r"FLWR_\S+ flwr run \. .*dataset=.*": "test_examples.py::test_your_data_on_ray",
    r"FLWR_\S+ flwr run \. .*num-supernodes=10\".*": "test_examples.py::test_comparison_on_ray",
    r"fedzge audit .*": "test_audit.py::test_the_command_fails_above_what_is_allowed",
    r"fedzge compare .*": "test_results.py::test_the_command_runs_side_by_side",
    r"python -m benchmarks\.central_accuracy .*": "test_benchmarks.py::test_central_accuracy",
    r"flower-supernode \.\.\. .*dp-epsilon=.*": (
        "test_private.py::test_a_run_and_the_next_one_with_private_clients"
    ),
    r"flower-supernode \.\.\. .*data-path=.*": (
        "test_own.py::test_a_federation_with_a_client_of_own_data"
    ),
    r"pip install \S+( [a-z-]+)*": "test_packaging.py::test_a_project_on_the_installed_library",
    r"pip install \S+\[.*\]\S*": "test_packaging.py::test_the_documented_extras_are_there",
    r"python make_onnx\.py .*": "test_examples.py::test_mixed_black_boxes_on_ray",
}


def blocks() -> list[list[str]]:
    """The commands of every shell block, continued lines joined and comments left out."""
    found = []
    # The deployment guide has tests of its own, which run its blocks as they are.
    for page in (page for page in PAGES if page.name != "deployment.md"):
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            lines = block.replace("\\\n", "").splitlines()
            commands = [re.sub(r"\s+", " ", re.sub(r"\s#\s.*", "", line)).strip() for line in lines]
            found.append([command for command in commands if command])
    return found


def documented() -> list[str]:
    return [command for block in blocks() for command in block]


def test_every_documented_command_is_run_somewhere() -> None:
    commands = documented()
    assert len(commands) > 15
    known = [re.compile(pattern) for pattern in RUN_ELSEWHERE]
    left = [c for c in commands if c not in RUN_HERE and not any(k.fullmatch(c) for k in known)]
    assert left == []
    assert set(RUN_HERE) <= set(commands)
    for where in filter(None, RUN_ELSEWHERE.values()):
        file, name = where.split("::")
        (path,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in path.read_text(), where
    unused = [p for p in RUN_ELSEWHERE if not any(re.fullmatch(p, c) for c in commands)]
    assert unused == []


@pytest.mark.parametrize("command", [c for c in documented() if c.startswith("make run ")])
def test_make_passes_on_what_is_documented(command: str) -> None:
    """Of a command whose run is elsewhere, what make would start: its settings arrive whole."""
    venv = Path(sys.executable).parent.parent
    words = ["make", "-n", "-o", f"{venv}/.installed", f"VENV={venv}", *shlex.split(command)[1:]]
    run = executed(words, ROOT)
    assert run.returncode == 0, run.stderr
    options = {"PRESET": "--preset", "RUN_CONFIG": "--run-config", "RESUME": "--resume"}
    started = shlex.split(run.stdout.replace("\\\n", " "))
    for given in shlex.split(command)[2:]:
        name, _, value = given.partition("=")
        option = options.get(name, "--client-gpus")
        assert started[started.index(option) + 1] == value


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="docs-"))
    yield folder
    assert processes_below(folder) == []
    shutil.rmtree(folder)


def executed(words: list[str], place: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The process of a command in the folder, with this environment's programs first."""
    environment = Path(sys.executable).parent
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        cwd=place,
        env={**os.environ, "PATH": f"{environment}{os.pathsep}{os.environ['PATH']}", **more},
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", list(RUN_HERE))
def test_it_runs(command: str, place: Path) -> None:
    environment = Path(sys.executable).parent
    words = RUN_HERE[command]
    if words.startswith("make "):
        # With this environment, as it is: make would bring it up to date first.
        words = words.replace(
            "make ",
            f"make -C {ROOT} VENV={environment.parent} -o {environment.parent}/.installed "
            f"OUTPUT_DIR={place / 'made'} ",
        )
    run = executed(shlex.split(words), place)
    assert run.returncode == 0, run.stdout + run.stderr
    if "--seeds" in command:
        assert "mean ± std" in run.stdout
    if "report" in command:
        assert (place / "report.html").stat().st_size > 1_000_000
    if command.startswith("make run"):
        (folder,) = re.findall(r"^run folder: (.+)$", run.stdout, re.MULTILINE)
        assert (Path(folder) / "central.safetensors").is_file()
    assert [child for child in psutil.Process().children() if child.status() != "zombie"] == []


@pytest.mark.slow
def test_plain_flower(place: Path) -> None:
    """The documented ``flwr run .``, which starts a SuperLink and leaves it."""
    (command,) = (command for command in documented() if re.match(r"FLWR_\S+ FLWR_", command))
    small = f'output-dir="{place}" run-name="plain" {TINY}'
    command = re.sub(r"--run-config '[^']*'", f"--run-config '{small}'", command)
    command = command.replace("num-supernodes=10", "num-supernodes=2")
    try:
        run = executed(["env", "-C", str(ROOT), "bash", "-c", command], place, FLWR_HOME=str(place))
        assert run.returncode == 0, run.stdout + run.stderr
        config = json.loads((place / "plain" / "config.json").read_text())
        assert config["status"] == "finished", run.stdout
    finally:
        left = list(with_flower_home(place))
        for process in left:
            process.terminate()
        psutil.wait_procs(left, timeout=20)
    assert left, "Flower leaves its SuperLink running, says the page"


def with_flower_home(place: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(place):
                yield process


@pytest.mark.slow
def test_a_comparison(place: Path) -> None:
    """The block for a report of both recipes over seeds: one script, with tiny settings."""
    (block,) = (block for block in blocks() if block[0].startswith("C="))
    settings, more, *commands = block
    assert re.fullmatch(r"C='[^']*'", settings)
    assert re.fullmatch(r'C="\$C [^"]*"', more)
    script = "\n".join(["set -eu", f"C='{TINY} server-threads=1'", *commands])
    script = script.replace("0,1,2", "0,1").replace("num-server-rounds=9", "")
    script = script.replace("fedzge run", f"fedzge run --app {ROOT} --output-dir runs")
    run = executed(["bash", "-c", script], place)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("mean ± std") == 2
    page = (place / "report.html").read_text()
    for recipe in ("paper", "efficient"):
        for seed in (0, 1):
            assert f"fashionmnist-{recipe}-s{seed}" in page
            folder = place / "runs" / f"fashionmnist-{recipe}-s{seed}"
            assert json.loads((folder / "config.json").read_text())["settings"]["recipe"] == recipe
