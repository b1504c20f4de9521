"""What another user of the machine can do to a run: nothing. Tried as ``nobody``."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedzge_flwr.launch.guarded import SIGN, owner_of
from fedzge_flwr.launch.session import free_ports
from tests.helpers.guided import PATIENCE_S, SETTINGS
from tests.helpers.nobody import nobody, python_as_nobody

__all__ = ["nobody"]

# A server of uvicorn as Flower starts one, without Flower: it serves whoever gets through.
SERVER = """
import sys
import uvicorn
from fedzge_flwr.launch.guarded import guard_servers

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})

guard_servers()
uvicorn.run(app, host=sys.argv[1], port=int(sys.argv[2]), log_level="warning", lifespan="off")
"""

# Asks for URLs; prints each status.
ASK_IMPORTS = "import http.client, json, ssl, urllib.error, urllib.request"
ASK = """
trust = ssl._create_unverified_context()
found = []
for url, headers in json.loads(sys.argv[1]):
    request = urllib.request.Request(url, data=b"", headers=headers)
    try:
        found.append(urllib.request.urlopen(request, timeout=20, context=trust).status)
    except urllib.error.HTTPError as error:
        found.append(error.code)
print(json.dumps(found))
"""

# Tries one call of each of Ray's services on each port; prints by port how it was answered.
CALL_IMPORTS = "import json, urllib.error, urllib.request, grpc, grpc._channel"
CALL = """
SERVICES = ["InternalKVGcsService/InternalKVKeys", "NodeManagerService/GetSystemConfig",
            "ObjectManagerService/FreeObjects", "CoreWorkerService/NumPendingTasks"]
token, *ports = sys.argv[1:]
headers = {"authorization": f"Bearer {token}"} if token else {}
found = {port: [] for port in ports}
for port in ports:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for service in SERVICES:
            try:
                channel.unary_unary(f"/ray.rpc.{service}")(
                    b"", timeout=20, metadata=list(headers.items()))
                found[port].append("served")
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                    found[port].append("refused")
    url = f"http://127.0.0.1:{port}/get_or_create_runtime_env"
    try:
        urllib.request.urlopen(urllib.request.Request(url, data=b"", headers=headers), timeout=20)
        found[port].append("served")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            found[port].append("refused")
    except Exception:
        pass
print(json.dumps(found))
"""

READ = """
for path in sys.argv[1:]:
    try:
        os.listdir(path) if os.path.isdir(path) else open(path).read(1)
        print("read", path)
    except PermissionError:
        pass
    except OSError as error:
        print(error)
"""

Asked = list[tuple[str, dict[str, str]]]


def as_nobody(imports: str, code: str, *arguments: str) -> Any:
    done = python_as_nobody(imports, code, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def as_owner(imports: str, code: str, *arguments: str) -> Any:
    script = f"import sys\n{imports}\n{code}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *arguments], capture_output=True, check=True
    )
    return json.loads(done.stdout)


def until(reached: Callable[[], bool], run: Any, patience: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience
    while not reached():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


# The guard, without Flower


@pytest.fixture(params=["127.0.0.1", "0.0.0.0", "::"])
def guarded(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a guarded server."""
    if request.param == "::" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    host = "::1" if request.param == "::" else "127.0.0.1"
    (port,) = free_ports(1)
    server = subprocess.Popen([sys.executable, "-c", SERVER, request.param, str(port)])

    def listens() -> bool:
        try:
            with socket.create_connection((host, port)):
                return True
        except OSError:
            return False

    try:
        until(listens, server, 30)
        yield f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    finally:
        server.terminate()
        server.wait(20)


def test_a_guarded_server_serves_its_user_and_nodes(guarded: str, nobody: int) -> None:
    paths = ["/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/v1/fleet", "/"]
    paths += ["//v1/fleet/x", "/v1/control/../fleet/x", "/health/x", "/v1/control/v1/fleet/"]
    # What a proxy would say of a client: nobody must be able to say it of itself.
    forwarded = {"X-Forwarded-For": "127.0.0.1", "Forwarded": "for=127.0.0.1"}
    closed: Asked = [(guarded + path, {}) for path in paths] + [(guarded + paths[0], forwarded)]
    opened: Asked = [(guarded + path, {}) for path in ("/v1/fleet/register-node", "/health")]
    assert as_nobody(ASK_IMPORTS, ASK, json.dumps(closed)) == [403] * len(closed)
    assert as_nobody(ASK_IMPORTS, ASK, json.dumps(opened)) == [200, 200]
    assert as_owner(ASK_IMPORTS, ASK, json.dumps(closed + opened)) == [200] * (len(closed) + 2)


def test_a_guarded_server_shows_that_it_is(guarded: str) -> None:
    with urllib.request.urlopen(f"{guarded}/health", timeout=5) as reply:
        assert reply.headers[SIGN] == "1"


def test_whose_a_connection_is_while_it_lasts(nobody: int) -> None:
    """A closed end is nobody's: the kernel says then that it were root's."""
    connect = (
        "import encodings.idna, os, socket, sys; os.setuid(int(sys.argv[1])); "
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[2]))); sys.stdin.read()"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        here = (ip_address("127.0.0.1"), int(server.getsockname()[1]))
        for user in (os.geteuid(), nobody):
            command = [sys.executable, "-P", "-c", connect, str(user), str(here[1])]
            client = subprocess.Popen(command, stdin=subprocess.PIPE)
            accepted, (address, port) = server.accept()
            there = (ip_address(address), int(port))
            assert owner_of(there, here) == user
            assert owner_of(here, there) == os.geteuid()
            client.communicate(b"")
            assert owner_of(there, here) is None
            accepted.close()
        assert owner_of((here[0], 1), here) is None


# Whole runs


def family_of(run: Any) -> list[psutil.Process]:
    return psutil.Process(run.pid).children(recursive=True)


def listening(run: Any) -> dict[tuple[str, int], str]:
    """The ports of a launch, and the names of the processes that listen there."""
    found = {}
    for process in family_of(run):
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[(connection.laddr.ip, connection.laddr.port)] = process.name()
        except psutil.Error:
            continue
    return found


def on_loopback(address: str) -> bool:
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


def command_lines(run: Any) -> list[str]:
    lines = []
    for process in family_of(run):
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return lines


@pytest.mark.faults
def test_nobody_gets_into_a_simulation(
    tiny_config: dict[str, Any], start: Any, nobody: int
) -> None:
    run = start({**tiny_config, "num-server-rounds": 1000})
    rows = Path(tiny_config["output-dir"]) / "run" / "rounds.jsonl"
    until(rows.is_file, run)
    ports = listening(run)
    assert len(ports) >= 7
    assert [address for address, _ in ports if not on_loopback(address)] == []
    (home,) = start.place.glob("fedzge-*")
    token = home / "ray-token"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    # Though what is above a home may be anybody's, as /tmp is.
    start.place.chmod(0o755)
    inside = [home, token, home / "simulation.json", *home.glob("ray/session_*/sockets")]
    done = python_as_nobody("", READ, *map(str, inside), f"/proc/{run.pid}/environ")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    secret = token.read_text()
    assert [line for line in command_lines(run) if secret in line or "--token" in line] == []
    numbers = [str(port) for _, port in ports]
    for guess in ("", "0" * 64):
        answers = as_nobody(CALL_IMPORTS, CALL, guess, *numbers)
        assert answers == {port: ["refused"] for port in numbers}
    # The calls are real ones: who knows the token is served at each port.
    answers = as_owner(CALL_IMPORTS, CALL, secret, *numbers)
    assert answers == {port: ["served"] for port in numbers}
    run.terminate()
    run.communicate(timeout=60)


@pytest.mark.faults
def test_nobody_gets_into_the_demo_of_a_deployment(tmp_path: Path, start: Any, nobody: int) -> None:
    config = {**SETTINGS, "output-dir": str(tmp_path), "run-name": "run", "num-clients": 1}
    run = start({**config, "num-server-rounds": 1000}, "--deployment")
    progress = tmp_path / "run" / "progress.json"
    until(lambda: progress.is_file() and "ask_clients" in progress.read_text(), run)
    ports = listening(run)
    assert [address for address, _ in ports if not on_loopback(address)] == []
    (home,) = start.place.glob("fedzge-*")
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    told = (home / "flwr" / "config.toml").read_text()
    (link,) = map(int, set(re.findall(r"127\.0\.0\.1:(\d+)", told)))
    nodes = [port for _, port in ports if port != link]
    assert (len(ports), len(nodes)) == (2, 1)
    paths = ["control/start-run", "control/list-runs", "control/register-node"]
    asked: Asked = [
        (f"https://127.0.0.1:{link}/v1/{path}", {}) for path in (*paths, "runtime/acquire-task")
    ]
    asked += [(f"http://127.0.0.1:{nodes[0]}/v1/runtime/acquire-task", {})]
    assert as_nobody(ASK_IMPORTS, ASK, json.dumps(asked)) == [403] * len(asked)
    assert 403 not in as_owner(ASK_IMPORTS, ASK, json.dumps(asked))
    # Flower gives its own processes tokens on their command lines; they are of no use to others.
    tokens = {found for line in command_lines(run) for found in re.findall(r"--token (\w+)", line)}
    stolen: Asked = [
        (f"https://127.0.0.1:{link}/v1/runtime/pull-task-input", {"authorization": f"Bearer {key}"})
        for key in tokens
    ]
    assert as_nobody(ASK_IMPORTS, ASK, json.dumps(stolen)) == [403] * len(stolen)
    run.terminate()
    run.communicate(timeout=60)
