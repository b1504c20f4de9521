"""What others reported of machines, terminals and limits, tried here: right, or one clear line.

Each row names the report (project and number on GitHub), what was given, and what is right here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from fedzge_flwr import DATASETS
from fedzge_flwr.cli import doctor
from fedzge_flwr.cli.given import Given
from fedzge_flwr.cli.run import Launcher, run_seeds
from fedzge_flwr.common.errors import FedZGEError
from fedzge_flwr.common.reading import place
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.images.spec import DatasetSpec
from fedzge_flwr.launch import machine
from fedzge_flwr.launch.simulate import Resources, checked_ray_config
from fedzge_flwr.observers.naming import free_run_folder

Patch = pytest.MonkeyPatch


def one_line(act: Callable[[], object], *parts: str) -> None:
    """It is refused in one line that names all of this."""
    with pytest.raises(FedZGEError) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "fedzge_flwr.cli", *words],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )


# Homes


def no_home(tmp_path: Path, patch: Patch) -> None:
    """Built in a container as a user without a home."""
    patch.delenv("HOME")
    patch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    one_line(lambda: free_run_folder(from_run_config({})), "'output-dir' = '~/fedzge-runs'", "HOME")
    assert free_run_folder(from_run_config({"output-dir": str(tmp_path)})).parent == tmp_path


def home_that_is_no_path(tmp_path: Path, patch: Patch) -> None:
    """HOME is set and empty: Python makes the root folder of it."""
    patch.setenv("HOME", "")
    one_line(lambda: place("~/x", "data-dir"), "'data-dir' = '~/x'", "give an absolute path")


# Folders for sockets


def slurm_job_folder(tmp_path: Path, patch: Patch) -> None:
    long = tmp_path / "slurm_jobdir" / "1355700" / "tmp.t0016"
    long.mkdir(parents=True)
    patch.setenv("TMPDIR", str(long))
    patch.delenv("RAY_TMPDIR", raising=False)
    home = machine.make_home(os.environ)
    home.rmdir()
    assert home.parent == Path("/tmp")


def chosen_folder_too_long(tmp_path: Path, patch: Patch) -> None:
    chosen = "/tmp/long_path_name_that_exceeds_45_characters"
    patch.setenv("RAY_TMPDIR", chosen)
    one_line(lambda: machine.make_home(os.environ), f"RAY_TMPDIR = '{chosen}' has 46 bytes", "22")
    assert not Path(chosen).exists()


def bytes_not_characters(tmp_path: Path, patch: Patch) -> None:
    """A folder of 20 characters whose name in UTF-8 is longer than the limit."""
    patch.setenv("RAY_TMPDIR", "/tmp/" + 15 * "æ")
    one_line(lambda: machine.make_home(os.environ), "has 35 bytes")


# Ray's resources


def too_many_cpus(tmp_path: Path, patch: Patch) -> None:
    patch.delenv("RAY_ADDRESS", raising=False)
    one_line(lambda: checked_ray_config(Resources(9_999)), "--client-cpus 9999: there", "for Ray")


def gpu_not_known_to_ray(tmp_path: Path, patch: Patch) -> None:
    patch.delenv("RAY_ADDRESS", raising=False)
    resources = Resources(1, 0.5, "init-args-num-gpus=0")
    one_line(lambda: checked_ray_config(resources), "--client-gpus 0.5: there is no GPU here")


# Proxies


def exceptions_are_kept(tmp_path: Path, patch: Patch) -> None:
    kept = machine.past_proxies({"https_proxy": "http://p:1", "no_proxy": "ray-head, .corp"})
    assert kept["NO_PROXY"] == kept["no_proxy"] == "ray-head,.corp,127.0.0.1,localhost,::1"


def loopback_without_exception(tmp_path: Path, patch: Patch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        patch.delenv(name, raising=False)
    patch.setenv("http_proxy", "http://proxy.example:3128")
    (finding,) = doctor.proxies()
    assert (finding.what, finding.state) == ("proxy", "note")
    assert "http_proxy" in finding.text
    assert "NO_PROXY=127.0.0.1,localhost" in finding.fix


# Output


def ascii_output(tmp_path: Path, patch: Patch) -> None:
    run = command("presets", "mod\u00e8le…", PYTHONIOENCODING="ascii")
    assert (run.returncode, run.stdout) == (1, b"")
    assert run.stderr.startswith(rb"error: preset 'mod\xe8le...': no preset and no file")


def latin_1_output(tmp_path: Path, patch: Patch) -> None:
    run = command("presets", "–", PYTHONIOENCODING="latin-1")
    assert run.returncode == 1
    assert run.stderr.startswith(b"error: preset '-': no preset and no file")


def help_in_ascii(tmp_path: Path, patch: Patch) -> None:
    run = command("run", "--help", PYTHONIOENCODING="ascii")
    assert run.returncode == 0
    assert b"--run-config 'KEY=VALUE" in run.stdout


def reader_that_has_enough(tmp_path: Path, patch: Patch) -> None:
    words = [sys.executable, "-m", "fedzge_flwr.cli", "presets", "paper"]
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (0, b"")


# Seeds


def seed_beyond_32_bits(tmp_path: Path, patch: Patch) -> None:
    assert from_run_config({"seed": 2**32}).run.seed == 2**32


def seed_of_ten_digits(tmp_path: Path, patch: Patch) -> None:
    given = Given(pairs=["seed=9287349087"]).run_config()
    assert from_run_config(given).run.seed == 9287349087


def seed_out_of_bounds(tmp_path: Path, patch: Patch) -> None:
    """Refused, and not replaced in silence."""
    assert from_run_config({"seed": 2**63 - 1}).run.seed == 2**63 - 1
    one_line(lambda: from_run_config({"seed": 2**63}), "'seed'", "64 bits")


# Names of folders


def parameters_in_the_name(tmp_path: Path, patch: Patch) -> None:
    name = "-".join(f"parameter_{number}=x".replace("=", "_") for number in range(20))
    one_line(lambda: from_run_config({"run-name": name}), "'run-name'", "at most 200 bytes")


def file_system_of_shorter_names(tmp_path: Path, patch: Patch) -> None:
    """Encrypted homes take 143 bytes; here, a name that no file system takes."""
    one_line(lambda: machine.check_output(tmp_path / (300 * "a")), "'output-dir'", "too long")


def slash_in_a_given_name(tmp_path: Path, patch: Patch) -> None:
    one_line(lambda: from_run_config({"run-name": "trees/random"}), "'run-name' = 'trees/random'")


def slash_in_an_automatic_name(tmp_path: Path, patch: Patch) -> None:
    patch.setitem(DATASETS, "my/own data", DatasetSpec(10, (1, 8, 8)))
    settings = from_run_config({"dataset": "my/own data", "output-dir": str(tmp_path)})
    folder = free_run_folder(settings)
    assert folder.parent == tmp_path
    assert folder.name.endswith("-my_own_data-efficient-s0")
    from_run_config({"run-name": folder.name})


def name_made_longer(tmp_path: Path, patch: Patch) -> None:
    """The launcher itself appends to it; the last of the sweep is looked at before the first."""
    given = Given(pairs=[f'run-name="{"a" * 190}"'], output_dir=tmp_path)
    one_line(
        lambda: run_seeds("1,123456789", given, Launcher(None, None)), "'run-name'", "-s123456789"
    )


# Other limits


def timeout_beyond_a_lock(tmp_path: Path, patch: Patch) -> None:
    for key in ("exchange-timeout", "grace-period", "node-timeout"):
        one_line(lambda key=key: from_run_config({key: 1e12}), f"'{key}' = 10000", "at most 1e+09")  # type: ignore[misc]


# Unicode


def folder_copied_from_a_mac(tmp_path: Path, patch: Patch) -> None:
    there = tmp_path / unicodedata.normalize("NFD", "données")
    (there / unicodedata.normalize("NFD", "été")).mkdir(parents=True)
    named = tmp_path / "données" / "été"
    assert not named.exists()
    assert place(named).is_dir()
    assert place(named / "new") == there / unicodedata.normalize("NFD", "été") / "new"


def name_typed_on_a_mac(tmp_path: Path, patch: Patch) -> None:
    """Japanese letters with marks of their own, which are no letters to Python."""
    typed = unicodedata.normalize("NFD", "パピプ")
    assert not re.fullmatch(r"\w*", typed)
    assert from_run_config({"run-name": typed}).run.run_name == "パピプ"


REPORTS: dict[str, Callable[[Path, Patch], None]] = {
    "pypa/hatch#544": no_home,
    "spyder-ide/spyder#7287": home_that_is_no_path,
    "verl-project/verl#1120": slurm_job_folder,
    "ray-project/ray#7945": chosen_folder_too_long,
    "python/cpython#93852": bytes_not_characters,
    "flwrlabs/flower#2758": too_many_cpus,
    "flwrlabs/flower#5455": gpu_not_known_to_ray,
    "ray-project/ray#37757": exceptions_are_kept,
    "bastienwirtz/homer#394": loopback_without_exception,
    "Textualize/rich#212": ascii_output,
    "Rockhopper-Technologies/enlighten#13": latin_1_output,
    "Backblaze/B2_Command_Line_Tool#914": help_in_ascii,
    "Backblaze/B2_Command_Line_Tool#1071": reader_that_has_enough,
    "kijai/ComfyUI-Florence2#49": seed_beyond_32_bits,
    "partofthething/ace#4": seed_of_ten_digits,
    "Lightning-AI/pytorch-lightning#21029": seed_out_of_bounds,
    "QUVA-Lab/artemis#113": parameters_in_the_name,
    "ray-project/ray#1463": file_system_of_shorter_names,
    "hu-macsy/simexpal#124": slash_in_a_given_name,
    "Ericsson/codechecker#1753": slash_in_an_automatic_name,
    "itsapi/pycraft#73": name_made_longer,
    "houtianze/bypy#374": timeout_beyond_a_lock,
    "renpy/renpy#2327": folder_copied_from_a_mac,
    "microsoft/winfile#86": name_typed_on_a_mac,
}


@pytest.mark.parametrize("report", list(REPORTS))
def test_what_others_reported(report: str, tmp_path: Path, monkeypatch: Patch) -> None:
    REPORTS[report](tmp_path, monkeypatch)
