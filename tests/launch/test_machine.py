"""What a launch looks at before it starts anything, and what it says and keeps of a failure."""

from __future__ import annotations

import re
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from fedzge_flwr.common.errors import ConfigError, RunFolderError
from fedzge_flwr.launch import deployment, machine, simulate
from fedzge_flwr.launch import session as session_module
from fedzge_flwr.launch.logs import first_error, keep
from fedzge_flwr.launch.session import LaunchError, session
from fedzge_flwr.launch.simulate import Resources, checked_ray_config
from fedzge_flwr.observers.lock import FolderLock

# Ray's address


@contextmanager
def answering(answer: bytes | None) -> Iterator[str]:
    """An address at which this is answered; None: nothing ever."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def serve() -> None:
            with suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    connection.recv(100)
                    if answer is not None:
                        connection.sendall(answer)
                    connection.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nowhere", "RAY_ADDRESS = 'nowhere' is no address; give HOST:PORT"),
        ("host:x", "RAY_ADDRESS = 'host:x' is no address"),
        ("127.0.0.1:99999", "RAY_ADDRESS = '127.0.0.1:99999': no Ray answers there"),
        (
            "ray://nobody.invalid:10001",
            "RAY_ADDRESS = 'ray://nobody.invalid:10001': no Ray answers",
        ),
    ],
)
def test_addresses_of_no_ray(address: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        machine.check_cluster(address)
    assert str(caught.value).startswith(message)


def test_what_answers_is_ray_or_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address at which something else answers would be waited for longer than five minutes."""
    monkeypatch.setattr(machine, "_ANSWER_S", 0.5)
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    settings = bytes.fromhex("000012040000000000") + bytes(18)
    with answering(settings) as address:
        machine.check_cluster(address)
    with answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        with pytest.raises(ConfigError, match="what answers there is no Ray"):
            machine.check_cluster(address)
        monkeypatch.setenv("RAY_USE_TLS", "1")
    with answering(None) as address, pytest.raises(ConfigError, match=r"no Ray answers there \(t"):
        machine.check_cluster(address)


@pytest.mark.parametrize("address", ["", " ", "local"])
def test_an_address_of_none_is_a_ray_of_ones_own_with_a_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    own = simulate.environment(tmp_path)
    assert (own["RAY_AUTH_MODE"], own["RAY_ADDRESS"]) == ("token", "")


# Shares


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        (Resources(0), "--client-cpus 0: give a whole number of CPUs, at least 1"),
        (Resources(-1), "--client-cpus -1"),
        (Resources(10**20), "--client-cpus 1e+20"),
        (Resources(1, -0.1), "--client-gpus -0.1: give a share"),
        (Resources(1, float("nan")), "--client-gpus nan"),
        (Resources(1, 1.5), "--client-gpus 1.5: give a share of a GPU such as 0.1, or a whole"),
        (Resources(1, 1e-9), "--client-gpus 1e-09: give at least 0.0001"),
        (Resources(1, 0, "init-args-num-cpus=99999999999"), "'init-args-num-cpus' = 1e+11"),
        (Resources(3, 0, "init-args-num-cpus=2"), "--client-cpus 3: there are 2 CPUs here"),
        (Resources(2, 0, "init-args-num-cpus=1"), "--client-cpus 2: there is 1 CPUs here"),
        (Resources(1, 2, "init-args-num-gpus=1"), "--client-gpus 2: there is 1 GPUs here"),
        (Resources(9999), "--client-cpus 9999: there"),
    ],
)
def test_shares_that_nobody_has(
    resources: Resources, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match=re.escape(message)):
        checked_ray_config(resources)


def test_a_cluster_has_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConfigError, match="not for a Ray cluster that runs already"):
        checked_ray_config(Resources(1, 0, "init-args-num-gpus=1"))


# Loopback


def test_past_proxies() -> None:
    assert machine.past_proxies({})["no_proxy"] == "127.0.0.1,localhost,::1"
    assert machine.past_proxies({"NO_PROXY": "*"})["no_proxy"] == "*"
    assert machine.proxies_of_loopback({"http_proxy": "x", "no_proxy": "localhost"}) == [
        "http_proxy"
    ]
    for value in ("*", "localhost, 127.0.0.1"):
        assert machine.proxies_of_loopback({"http_proxy": "x", "no_proxy": value}) == []


def test_own_probes_ask_no_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The SuperLink's health is asked of the SuperLink: a proxy here would be answered itself."""
    import ssl

    asked = threading.Event()
    with closing(socket.create_server(("127.0.0.1", 0))) as proxy:

        def listen() -> None:
            with suppress(OSError):
                proxy.accept()[0].close()
                asked.set()

        threading.Thread(target=listen, daemon=True).start()
        for name in ("https_proxy", "HTTPS_PROXY", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert not deployment._healthy(9, ssl.create_default_context())
        assert not asked.wait(0.3)


def test_children_ask_no_proxy_have_a_home_and_write_utf_8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("HOME", "")
    code = (
        "import os, urllib.request as u; from pathlib import Path; print('é', Path.home());"
        "assert u.proxy_bypass('127.0.0.1') and u.proxy_bypass('localhost')"
    )
    with session({"output-dir": str(tmp_path)}, lambda _: {}) as launch:
        said = launch.finish("child", [sys.executable, "-c", code])
        assert said == f"é {launch.home}\n"


# Folders


def test_a_home_below_a_relative_folder_is_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir("/")
    home = machine.make_home({"RAY_TMPDIR": "tmp"})
    home.rmdir()
    assert home.parent == Path("/tmp")


def test_without_any_folder_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SHORT_PLACES", ("/proc/sys",))
    with pytest.raises(ConfigError, match=r"none of /proc/bus, /proc/sys can be written.*RAY_TMPD"):
        machine.make_home({"TMPDIR": "/proc/bus"})


def test_output_is_looked_at_before_anything_starts() -> None:
    config = {"output-dir": "/proc/sys/runs"}
    with (
        pytest.raises(RunFolderError, match=r"'output-dir': /proc/sys/runs/\S+ cannot be written"),
        session(config, lambda _: {}),
    ):
        raise AssertionError("it has started")


def test_the_digits_need_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "")
    with session({"output-dir": str(tmp_path)}, lambda _: {}) as launch:
        assert "data-dir" not in launch.overrides
    other = {"output-dir": str(tmp_path), "dataset": "mnist"}
    with (
        pytest.raises(ConfigError, match="'data-dir' = '~/fedzge-data': there is no such home"),
        session(other, lambda _: {}),
    ):
        raise AssertionError("it has started")


# Logs

TRACEBACK = """\
INFO :      Starting
\x1b[33mWARNING\x1b[0m :   no ERROR yet, of course
Traceback (most recent call last):
  File "x.py", line 1, in <module>
    import missing
ModuleNotFoundError: No module named 'missing'

The above exception was the direct cause of the following exception:

RuntimeError: Simulation Runtime crashed.
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (TRACEBACK.replace("no ERROR yet", "none yet"), "ModuleNotFoundError: No module named"),
        (
            "INFO : a\n\x1b[91mERROR\x1b[0m :     An exception !! x\nERROR : y\n",
            "An exception !! x",
        ),
        ("Error: no superlink.sh\nlast\n", "Error: no superlink.sh"),
        ("│ Error: flwr says │\n", "Error: flwr says"),
        ("[2026-01-01 10:00:00,123 E 12 34] (raylet) a.cc:3: full\n", "a.cc:3: full"),
        ("all is well\n\nand ended\n\n", "and ended"),
        ("", "its log is empty"),
        ("ray.exceptions.RaySystemError: System error\n", "ray.exceptions.RaySystemError: System"),
        ("torch.cuda.OutOfMemoryError: CUDA\n", "torch.cuda.OutOfMemoryError: CUDA"),
    ],
)
def test_the_first_error_of_a_log(tmp_path: Path, log: str, said: str) -> None:
    path = tmp_path / "x.log"
    path.write_text(log)
    assert first_error(path).startswith(said)


def test_logs_are_kept_whatever_is_there(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "out" / "run"
    (home / "ray" / "session_latest" / "logs").mkdir(parents=True)
    (home / "flower.log").write_text("why")
    (home / "ray" / "session_latest" / "logs" / "raylet.err").write_text("ray's")
    # No run folder, and its name stays free.
    kept = keep(home, folder)
    assert kept == tmp_path / "out" / "run-logs"
    assert (kept / "flower.log").read_text() == "why"
    assert (kept / "ray-logs" / "raylet.err").read_text() == "ray's"
    assert not folder.exists()
    # Nor is one that is only reserved yet.
    folder.mkdir()
    assert keep(home, folder) == kept
    assert list(folder.iterdir()) == []
    (folder / "config.json").write_text("{}")
    assert keep(home, folder, whole=False) == folder
    assert {path.name for path in folder.iterdir()} == {"config.json", "flower.log", "run.lock"}
    # What another process writes stays as it is.
    (home / "flower.log").write_text("mine")
    with FolderLock(folder):
        assert keep(home, folder) == kept
    assert [(place / "flower.log").read_text() for place in (folder, kept)] == ["why", "mine"]
    # Nor can anything be written there.
    elsewhere = keep(home, Path("/proc/sys/run"))
    assert elsewhere.name.startswith("fedzge-logs-")
    assert (elsewhere / "flower.log").read_text() == "mine"


def failing(tmp_path: Path, script: str, act: str = "finish") -> LaunchError:
    """What is said of a process of a launch that fails; its log is kept where that says."""

    def run() -> None:
        with session({"output-dir": str(tmp_path), "run-name": "r"}, lambda _: {}) as launch:
            if act == "finish":
                launch.finish("part", ["bash", "-c", script])
            else:
                part = launch.start("part", ["bash", "-c", script])
                launch.wait(part, "part", lambda: False, 5)

    with pytest.raises(LaunchError) as caught:
        run()
    text = str(caught.value)
    assert "\n" not in text
    (path,) = re.findall(r"\(log: (.+)\)$", text)
    assert path == str(tmp_path / "r-logs" / "part.log")
    assert "cause" in Path(path).read_text()
    return caught.value


def test_a_failure_is_told_by_its_first_cause(tmp_path: Path) -> None:
    said = failing(tmp_path, "echo 'error: the cause'; echo 'error: its effect'; exit 3")
    assert str(said).startswith("bash failed: error: the cause (log: ")


def test_how_it_ended_is_told(tmp_path: Path) -> None:
    said = failing(tmp_path, "echo 'some cause'; kill -SEGV $$", "wait")
    assert str(said).startswith("part ended (by SIGSEGV) before it was ready: some cause (log: ")
    said = failing(tmp_path, "echo 'some cause'; exec sleep 50", "wait")
    assert str(said).startswith("part was not ready within 5 s: some cause (log: ")


@pytest.mark.faults
@pytest.mark.parametrize("how", ["slow", "killed"])
def test_a_slow_start_is_waited_for_and_a_death_is_told(
    tiny_config: dict[str, Any], start: Any, how: str
) -> None:
    """The engine is held as a first import of PyTorch from a slow disk would hold it."""
    import psutil

    config = {**tiny_config, "num-server-rounds": 1}
    run = start(config)
    engine = None
    while engine is None:
        assert run.poll() is None, run.communicate()
        with suppress(psutil.Error):
            for child in psutil.Process(run.pid).children():
                if any(part.endswith("engine.py") for part in child.cmdline()):
                    engine = child
    engine.send_signal(signal.SIGSTOP)
    if how == "killed":
        engine.send_signal(signal.SIGKILL)
    else:
        line = run.stdout.readline()
        while "importing PyTorch" not in line:
            assert line, run.communicate()
            line = run.stdout.readline()
        engine.send_signal(signal.SIGCONT)
    out, err = run.communicate(timeout=300)
    log = Path(config["output-dir"])
    if how == "slow":
        assert run.returncode == 0, out + err
        assert (log / "run" / "flower.log").is_file()
    else:
        assert run.returncode == 1, out + err
        assert "error: the server's process ended (by SIGKILL)" in err
        assert (log / "run-logs" / "flower.log").is_file()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a b", "make run RESUME='{0}/a b', or fedzge run --resume '{0}/a b'"),
        ("plain", "make run RESUME={0}/plain, or fedzge run --resume {0}/plain"),
        # What make would take apart is left to the other.
        ("it's", "fedzge run --resume '{0}/it'\"'\"'s'"),
        ("a$b", "fedzge run --resume '{0}/a$b'"),
    ],
)
def test_a_shell_takes_what_is_told_of_resuming(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, told: str
) -> None:
    (tmp_path / name / "checkpoints" / "round-000001.checkpoint").mkdir(parents=True)
    session_module._tell_how_to_resume(tmp_path / name)
    said = capsys.readouterr().out.strip()
    assert said == f"to go on from the last checkpoint: {told.format(tmp_path)}"


def test_more_ports_than_files_may_be_open_are_one_line() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        with pytest.raises(LaunchError, match=r"300 free ports: Too many open files; .*ulimit -n"):
            session_module.free_ports(300)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
