"""What ``fedzge doctor`` finds of user, terminal, network, folders and resources, one by one."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from fedzge_flwr.cli import doctor
from fedzge_flwr.cli.doctor import Finding
from fedzge_flwr.cli.given import Given
from fedzge_flwr.launch.simulate import Resources
from tests.helpers.fabricate import make_idx


@pytest.fixture(autouse=True)
def _nothing_of_this_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def only(findings: Iterable[Finding], state: str) -> Finding:
    (found,) = (finding for finding in findings if finding.state != "ok")
    assert found.state == state
    assert found.fix or found.state == "wrong"
    assert "\n" not in found.text + found.fix
    return found


def nothing(findings: Iterator[Finding]) -> bool:
    return all(finding.state == "ok" for finding in findings)


def test_it_looks_at_all_of_these() -> None:
    titles = [title for title, _ in doctor.checks(Given(), (), Resources())]
    assert len(titles) == len(set(titles)) == 9


def test_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert nothing(doctor.user_and_terminal())
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert "HOME is not set" in only(doctor.user_and_terminal(), "note").text
    wrong = only(doctor.settings_and_data(Given()), "wrong")
    assert wrong.text.startswith("'output-dir' = '~/fedzge-runs': there is no such home folder")
    # The digits need no folder, and what is computed is then not kept.
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nothing(doctor.settings_and_data(Given(output_dir=tmp_path)))


def test_an_empty_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    assert "HOME is not set, or empty" in only(doctor.user_and_terminal(), "note").text


def test_a_terminal_of_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    found = only(doctor.user_and_terminal(), "note")
    assert "ascii" in found.text
    assert "PYTHONIOENCODING=utf-8" in found.fix


@pytest.mark.parametrize("name", ["http_proxy", "HTTPS_PROXY", "all_proxy"])
def test_a_proxy_without_an_exception_for_loopback(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert nothing(doctor.proxies())
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", ".corp")
    found = only(doctor.proxies(), "note")
    assert name in found.text
    # What it says to do is enough.
    (value,) = re.findall(r"no_proxy=(\S+)", found.fix)
    assert value.startswith(".corp,")
    monkeypatch.setenv("no_proxy", value)
    assert nothing(doctor.proxies())


def test_a_ray_address_at_which_nobody_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nothing(doctor.simulation(Resources()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    text = only(doctor.simulation(Resources()), "wrong").text
    assert text.startswith(f"RAY_ADDRESS = '{address}': no Ray answers there (Connection refused)")
    assert "unset it" in text


def test_no_gpu_for_the_share_that_is_asked_for() -> None:
    wanted = Resources(1, 0.1, "init-args-num-gpus=0")
    text = only(doctor.simulation(wanted), "wrong").text
    assert text.startswith("--client-gpus 0.1: there is no GPU here for Ray; leave it out")
    assert nothing(doctor.simulation(Resources(1, 0.1, "init-args-num-gpus=1")))


def test_a_long_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert nothing(doctor.temporary())
    before = set(Path("/tmp").glob("fedzge-*"))
    long = tmp_path / "a-folder-of-a-batch-system-for-one-job"
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    found = only(doctor.temporary(), "note")
    assert f"{long} is too long for Ray's sockets" in found.text
    assert "/tmp is used" in found.text
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    assert "at most 22 bytes" in only(doctor.temporary(), "wrong").text
    # Of those that run beside this one there may be others; of this one nothing is left.
    left = set(Path("/tmp").glob("fedzge-*")) - before
    assert all(any(path.iterdir()) for path in left)


@pytest.mark.parametrize(
    ("server", "clients", "needed"),
    [
        ("off", "held-out", False),
        ("off", "off", False),
        ("test", "held-out", True),
        ("off", "test", True),
    ],
)
def test_a_test_set_is_looked_for_if_it_is_needed(
    server: str, clients: str, needed: bool, tmp_path: Path
) -> None:
    make_idx(tmp_path / "data", ("train", "t10k"), 10, 0, "")
    for file in (tmp_path / "data").glob("t10k*"):
        file.unlink()
    pairs = {
        "dataset": "mnist",
        "data-dir": str(tmp_path / "data"),
        "server-evaluation": server,
        "client-evaluation": clients,
        "partition": "iid",
        "num-clients": 2,
    }
    given = Given(pairs=[f"{key}={json.dumps(value)}" for key, value in pairs.items()])
    data, _ = doctor.settings_and_data(given)
    assert data.state == ("wrong" if needed else "ok")
    if not needed:
        assert data.text == "mnist: 60 training images for 2 clients"


def test_output_that_is_read_only() -> None:
    """Below /proc nobody may write, not even root."""
    text = only(doctor.settings_and_data(Given(output_dir=Path("/proc/sys"))), "wrong").text
    assert text.startswith("'output-dir': /proc/sys cannot be written (")
    assert "--output-dir DIR" in text
