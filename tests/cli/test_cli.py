"""``fedzge``: presets, sweeps, doctor, and what Flower is given of an app."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedzge_flwr import __version__
from fedzge_flwr.cli import doctor
from fedzge_flwr.cli import run as run_module
from fedzge_flwr.cli.given import Given
from fedzge_flwr.cli.run import Launcher, run_seeds
from fedzge_flwr.common.errors import ConfigError, RunFolderError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import preset_names
from fedzge_flwr.launch.staging import stage
from fedzge_flwr.report.runs import load_run
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.launching import ROOT
from tests.helpers.running import run_server


def fedzge(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedzge_flwr.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


# The command


def test_help_has_examples_and_comes_at_once() -> None:
    code = "import sys; from fedzge_flwr.cli.app import app; print(set(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"'torch'", "'ray'", "'flwr'", "'pandas'"} & set(re.findall(r"'\w+'", loaded.stdout))
    for command in ("run", "doctor"):
        assert "Examples:" in fedzge(command, "--help").stdout
    assert fedzge("--version").stdout.strip() == __version__


def test_presets_are_listed_and_shown() -> None:
    assert fedzge("presets").stdout.split() == preset_names()
    assert len(preset_names()) == 8 + 1
    assert "paper" in preset_names()
    shown = fedzge("presets", "cifar10-homo-a1").stdout
    assert (
        shown == (ROOT / "fedzge_flwr" / "config" / "presets" / "cifar10-homo-a1.toml").read_text()
    )
    wrong = fedzge("presets", "cifar10-homo-1")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "no file has that name; did you mean 'cifar10-homo-a1'?" in wrong.stderr


def test_later_sources_overrule_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "resume.toml").write_text("seed = 5\nq = 2\n")
    given = Given("cifar10-homo-a1", tmp_path, ["q=3", "eps=0.5"], tmp_path / "out")
    config = given.run_config()
    assert (config["seed"], config["q"], config["eps"]) == (5, 3, 0.5)
    assert config["synthetic-batch-size"] == 500
    assert config["resume"] == str(tmp_path)
    assert config["output-dir"] == str(tmp_path / "out")


def test_the_option_overrules_the_presets_output_and_a_pair_the_option(tmp_path: Path) -> None:
    preset = tmp_path / "p.toml"
    preset.write_text('output-dir = "/theirs"\n')
    option = Given(str(preset), output_dir=tmp_path / "mine")
    assert option.run_config()["output-dir"] == str(tmp_path / "mine")
    pair = Given(str(preset), pairs=['output-dir="/paired"'], output_dir=tmp_path / "mine")
    assert pair.run_config()["output-dir"] == "/paired"
    assert Given(str(preset)).run_config()["output-dir"] == "/theirs"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Given(resume=Path("/nowhere")), "/nowhere: not the folder of a run"),
        (Given(preset=__file__), "test_cli.py: not TOML"),
        (Given(preset="vgg"), "preset 'vgg': no preset and no file has that name"),
        (Given(pairs=["q"]), "--run-config: 'q' is not KEY=VALUE"),
    ],
)
def test_sources_that_cannot_be_read(given: Given, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        given.run_config()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_an_app_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_module._app_here() == ROOT
    # As when the package is not in a checkout.
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(ConfigError, match=r"no FedZGE app here: .* --app"):
        Launcher(None, None)({})
    (tmp_path / "pyproject.toml").write_text("tool = 'x'\n")
    with pytest.raises(ConfigError, match=r"no FedZGE app here: .* --app"):
        run_module._app_here()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    assert run_module._app_here() == tmp_path


# Sweeps


class InProcess(Launcher):
    """Runs here, and counts."""

    def __init__(self) -> None:
        super().__init__(None, None)
        object.__setattr__(self, "started", [])

    def __call__(self, run_config: Any) -> Path:
        import client_app

        self.started.append(dict(run_config))  # type: ignore[attr-defined]
        # As every launch: what is relative is the user's.
        config = {**run_config, "data-dir": str(Path("data").absolute())}
        return run_server(InProcessGrid(client_app.app, config, 3), config)


def given_of(config: dict[str, Any]) -> Given:
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    return Given(pairs=[pairs])


@pytest.fixture
def launcher() -> Any:
    return InProcess()


def test_seeds_one_after_another_and_not_again(
    tiny_config: dict[str, Any],
    launcher: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "states"))
    given = given_of({**tiny_config, "run-name": "sweep", "client-evaluation": "off"})
    run_seeds("3,4", given, launcher)
    assert [config["seed"] for config in launcher.started] == [3, 4]
    names = [Path(config["output-dir"]) / config["run-name"] for config in launcher.started]
    assert [path.name for path in names] == ["sweep-s3", "sweep-s4"]
    first = capsys.readouterr().out
    last = [load_run(path).rows[-1] for path in names]
    assert last[0].mean_client_accuracy is None
    central = [100 * float(row.central_accuracy or 0) for row in last]
    mean, spread = sum(central) / 2, abs(central[0] - central[1]) / 2
    assert f"{mean:.1f} ± {spread:.1f} %" in first

    # Another seed, one that was stopped, one that is finished.
    content = json.loads((names[1] / "config.json").read_text())
    (names[1] / "config.json").write_text(json.dumps({**content, "status": "interrupted"}))
    run_seeds("3,4,5", given, launcher)
    assert [config["seed"] for config in launcher.started[2:]] == [4, 5]
    assert launcher.started[2]["resume"] == str(names[1])
    assert "resume" not in launcher.started[3]
    out = capsys.readouterr().out
    assert f"seed 3: finished already, in {names[0]}" in out
    assert load_run(names[1]).rows[-1] == last[1]


@pytest.mark.parametrize(
    ("seeds", "change", "message"),
    [
        ("1,", {}, "--seeds 1,: give whole numbers"),
        ("a", {}, "--seeds a: give whole numbers"),
        ("3", {"q": 4}, "of a run with 'q' = 2, not 4"),
        ("9", {}, "sweep-s9 exists and is not the folder of a run"),
        ("8", {}, "ended as 'failed: x' without a checkpoint"),
    ],
)
def test_sweeps_that_cannot_be(
    seeds: str, change: dict[str, Any], message: str, tiny_config: dict[str, Any], launcher: Any
) -> None:
    config = {**tiny_config, "run-name": "sweep"}
    parent = Path(config["output-dir"])
    for seed in (3, 8):
        settings = from_run_config({**config, "seed": seed}).to_run_config()
        (parent / f"sweep-s{seed}").mkdir(parents=True)
        (parent / f"sweep-s{seed}" / "config.json").write_text(
            json.dumps({"status": "finished" if seed == 3 else "failed: x", "settings": settings})
        )
    (parent / "sweep-s9").mkdir()
    with pytest.raises((ConfigError, RunFolderError)) as caught:
        run_seeds(seeds, given_of({**config, **change}), launcher)
    assert message in str(caught.value)
    assert launcher.started == []


def test_a_resumed_run_has_its_seed(launcher: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--seeds: without --resume"):
        run_seeds("1", Given(resume=Path("/x")), launcher)
    preset = tmp_path / "p.toml"
    preset.write_text('resume = "/x"\n')
    for given in (Given(pairs=['resume="/x"']), Given(str(preset))):
        with pytest.raises(ConfigError, match="--seeds: without 'resume'"):
            run_seeds("1", given, launcher)
    assert launcher.started == []


# What is wrong with a machine


def test_doctor_finds_nothing_wrong_here(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = fedzge("doctor", "--port", str(port), "--run-config", f'output-dir="{tmp_path}/a/b"')
    assert run.returncode == 0, run.stdout + run.stderr
    assert "nothing is wrong" in run.stdout
    assert "digits: 1,437 training and 360 test images for 10 clients" in run.stdout
    assert not (tmp_path / "a").exists()


def wrong_lines(run: subprocess.CompletedProcess[str]) -> list[str]:
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 to mend" in run.stdout
    lines = run.stdout.splitlines()
    return [line + lines[at + 1] for at, line in enumerate(lines) if line.startswith("WRONG")]


def test_doctor_finds_torch_and_torchvision_of_different_builds(tmp_path: Path) -> None:
    """What a torchvision for another torch says when it is imported."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    (tmp_path / "torchvision-0.1.0.dist-info").mkdir()
    (tmp_path / "torchvision-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1.0\n"
    )
    (line,) = wrong_lines(fedzge("doctor", PYTHONPATH=str(tmp_path)))
    assert "torchvision 0.1.0 cannot be imported together" in line
    assert "nms does not exist" in line
    assert "pip install --force-reinstall torch torchvision" in line


def test_doctor_finds_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (found,) = doctor.free([port])
    assert found.state == "wrong"
    assert f"{port} cannot be had (Address already in use)" in found.text
    assert f"process {os.getpid()} (" in found.text
    assert "start the SuperLink on another port" in found.fix


def test_doctor_finds_data_missing(tmp_path: Path) -> None:
    config = ('dataset="mnist"', f'data-dir="{tmp_path}"')
    data, _ = doctor.settings_and_data(Given(pairs=config))
    assert data.state == "wrong"
    assert "train-images-idx3-ubyte" in data.text
    assert str(tmp_path) in data.text
    later, _ = doctor.settings_and_data(Given(pairs=(*config, "download=true")))
    assert later.state == "note"
    assert "mnist is not there; the run will fetch it" in later.text
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_no_permission_to_write() -> None:
    """Below /proc nobody may, not even root."""
    *_, output = doctor.settings_and_data(Given(pairs=('output-dir="/proc/fedzge"',)))
    assert output.state == "wrong"
    assert "/proc/fedzge cannot be written" in output.text
    assert "output-dir" in output.fix


def test_doctor_finds_wrong_settings() -> None:
    run = fedzge("doctor", "--run-config", "q=0")
    assert run.returncode == 1
    assert "WRONG settings: run config: 'q' = 0" in run.stdout


@pytest.mark.parametrize("key", ["central-model", "local-models", "ensemble", "dataset"])
def test_doctor_finds_a_part_that_is_not_there(key: str) -> None:
    settings = doctor.settings_and_data(Given(pairs=(f'{key}="vgg"',)))
    (finding,) = settings
    assert (finding.what, finding.state) == ("settings", "wrong")
    assert "named 'vgg'; known: " in finding.text


# What Flower is given of an app


def test_what_is_staged_packs_to_the_same(tmp_path: Path) -> None:
    flwr = Path(sys.executable).with_name("flwr")
    hashes = []
    checkout = tmp_path / "checkout"
    for name in ("fedzge_flwr", "tests"):
        shutil.copytree(ROOT / name, checkout / name)
    for name in ("server_app.py", "client_app.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, checkout)
    staged = stage(checkout, tmp_path / "staged")
    assert staged == tmp_path / "staged"
    for number, app in enumerate((checkout, staged)):
        out = tmp_path / str(number)
        out.mkdir()
        subprocess.run([flwr, "build", "--app", app], check=True, cwd=out, capture_output=True)
        (fab,) = out.glob("*.fab")
        hashes.append((fab.name, fab.read_bytes()))
    assert hashes[0] == hashes[1]


def test_only_regular_files_are_staged(tmp_path: Path) -> None:
    """Emacs marks a file that is being edited by a link to nowhere; a pipe would never end."""
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text("[tool.flwr.app]\nfab-include = ['/*.py']\n")
    (app / "client_app.py").write_text("x = 1\n")
    (app / "linked.py").symlink_to(app / "client_app.py")
    (app / ".#client_app.py").symlink_to("me@host.123:1")
    os.mkfifo(app / "pipe.py")
    found = {path.name for path in stage(app, tmp_path / "staged").iterdir()}
    assert found == {"client_app.py", "linked.py", "pyproject.toml"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.flwr.app]\nfab-include = 5\n", "'fab-include' = 5: give a list of patterns"),
        ("[tool.flwr.app]\nfab-include = [1]\n", "'fab-include' = [1]: give a list of patterns"),
        ("[tool.flwr.app]\nfab-include = 'a'\n", "'fab-include' = 'a': give a list of patterns"),
        ("[tool.flwr]\napp = 'x'\n", "'tool.flwr.app' is no table"),
        ("[tool]\nflwr = 1\n", "'tool.flwr' is no table"),
        ("tool = 'x'\n", "'tool' is no table"),
    ],
)
def test_an_app_that_says_nonsense_is_told_of_in_one_line(
    text: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / 'pyproject.toml'}: {said}")):
        stage(tmp_path, tmp_path / "staged")
    module = "fedzge_flwr.launch.staging"
    run = subprocess.run(
        [sys.executable, "-m", module, str(tmp_path), str(tmp_path / "staged")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert run.stderr.startswith("error: ")


def test_environments_and_hidden_folders_are_not_looked_at(tmp_path: Path) -> None:
    app = tmp_path / "app"
    for folder in ("", "sub", ".hidden", "env", "env/lib"):
        (app / folder).mkdir(exist_ok=True, parents=True)
        (app / folder / "code.py").write_text("")
        (app / folder / "data.bin").write_bytes(b"")
    (app / "env" / "pyvenv.cfg").write_text("")
    (app / ".gitignore").write_text("*.pyc")
    (app / "pyproject.toml").write_text("[tool.flwr.app]\nfab-include = ['/**/*.py']\n")
    staged = stage(app, tmp_path / "staged")
    found = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    assert found == {"code.py", "sub/code.py", "pyproject.toml", ".gitignore"}


@pytest.mark.parametrize("text", [None, "", "[tool.flwr.app]\npublisher = 'x'\n", "not toml"])
def test_an_app_that_does_not_say_is_given_as_it_is(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    assert stage(tmp_path, tmp_path / "staged") == tmp_path
    assert not (tmp_path / "staged").exists()
