"""Deployments: the guide's own commands on real processes, and the scripts' refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from fedzge_flwr.launch.processes import ProcessFamily
from fedzge_flwr.launch.session import free_ports
from tests.helpers.guided import PATIENCE_S, SETTINGS
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.launching import ROOT, toml_pairs
from tests.helpers.running import rows_of, run_server

DEPLOY = ROOT / "deploy"
GUIDE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path for path in DEPLOY.glob("*.sh") if path.name != "common.sh")
# Of a machine that others use too: a message to three nodes takes 10 to 60 seconds.
COMMAND_S = 3.0
"""Between two of Flower's commands, each of which takes 2 CPU-seconds from what it asks about."""
MESSAGE_ARRIVES_S = 5.0


def run_script(name: str, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DEPLOY / name), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": search_path(), **more},
    )


def search_path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def blocks_of(section: str) -> list[tuple[str, str]]:
    """The code blocks of a section of the guide: (what they are, text)."""
    text = GUIDE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```sh ?(\w*)\n(.*?)```", text, re.DOTALL)


# The scripts, without a federation


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_wrong_arguments_are_told_the_usage(script: Path) -> None:
    assert os.access(script, os.X_OK)
    run = run_script(script.name)
    assert run.returncode == 2
    assert run.stderr.startswith(f"usage: {script.name} ")
    assert len(run.stderr.splitlines()) > 2
    assert run.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("certificates.sh D host:8000", "'host:8000' is neither a host name nor an IP address"),
        ("certificates.sh D a,DNS:b", "'a,DNS:b' is neither a host name nor"),
        ("certificates.sh D 999.0.0.1", "(are the hosts right?)"),
        ("node-key.sh D ../a", "'../a' is no name of a key"),
        ("node-key.sh D -a", "'-a' is no name of a key"),
        ("superlink.sh D D 127.0.0.1 80000", "'80000' is not a port"),
        ("superlink.sh D D 127.0.0.1 8000", "D/ca.crt is not there: make it with certificates.sh"),
        ("connection.sh default a:1 D", "'default' is no name of a connection"),
        ("connection.sh here 127.0.0.1 D", "'127.0.0.1' is not HOST:PORT"),
        ("connection.sh here a:1 D/ca.crt", "D/ca.crt is not there: it is the ca.crt that"),
        ("register.sh here D/a.pub", "D/a.pub is not there: make it with node-key.sh"),
        ("supernode.sh 127.0.0.1 D D D 9094 x", "'127.0.0.1' is not HOST:PORT"),
        ("supernode.sh a:1 D/ca.crt D D 9094 x", "D/ca.crt is not there: it is the ca.crt that"),
        ("supernode.sh a:1 /dev/../etc/passwd D/k D 9094 x", "D/k is not there: make it with node"),
        ("supernode.sh a:1 /etc/passwd /etc/passwd D x x", "'x' is not a port"),
        ("supernode.sh a:1 /etc/passwd /etc/passwd D 1 q=1", "'q=1' has no partition-id: give"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path: Path, arguments: str, message: str) -> None:
    name, *rest = re.sub(r"\bD\b", str(tmp_path), arguments).split(" ")
    run = run_script(name, *rest)
    assert run.returncode == 1, run.stderr
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last.replace(str(tmp_path), "D")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_is_missing_is_named(tmp_path: Path) -> None:
    for command in ("bash", "dirname", "sed"):
        (tmp_path / command).symlink_to(shutil.which(command) or command)
    run = run_script("node-key.sh", tmp_path, "a", PATH=str(tmp_path))
    assert (run.returncode, run.stderr) == (
        1,
        "error: the command ssh-keygen is not there: install OpenSSH's client\n",
    )


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_certificates_verify_and_name_the_hosts(tmp_path: Path) -> None:
    folder = tmp_path / "certificates"
    assert run_script("certificates.sh", folder, "127.0.0.1", "node.example", "::1").returncode == 0
    openssl = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver"]
    for host in ("-verify_ip 127.0.0.1", "-verify_ip ::1", "-verify_hostname node.example"):
        command = [*openssl, "-CAfile", "ca.crt", *host.split(), "server.crt"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    for host in ("-verify_ip 127.0.0.2", "-verify_hostname other.example"):
        command = [*openssl, "-CAfile", "ca.crt", *host.split(), "server.crt"]
        assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode != 0
    assert {path.name: mode_of(path) for path in folder.iterdir()} == {
        "ca.crt": 0o644,
        "server.crt": 0o644,
        "ca.key": 0o600,
        "server.key": 0o600,
    }


def test_keys_are_their_owners_alone_and_nothing_is_overwritten(tmp_path: Path) -> None:
    assert run_script("certificates.sh", tmp_path / "c", "a.example").returncode == 0
    assert run_script("node-key.sh", tmp_path / "k", "one").returncode == 0
    assert mode_of(tmp_path / "k" / "one") == 0o600
    (tmp_path / "k" / "two.pub").write_text("kept")
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    for arguments in (
        ("certificates.sh", tmp_path / "c", "a.example"),
        ("node-key.sh", tmp_path / "k", "one"),
        ("node-key.sh", tmp_path / "k", "two"),
    ):
        run = run_script(*arguments)
        assert run.returncode == 1
        assert " exists already: choose another folder or name, or remove it" in run.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before


def test_a_connection_is_added_and_not_replaced(tmp_path: Path) -> None:
    import tomllib

    (tmp_path / "ca.crt").write_text("")
    home = tmp_path / "flwr"
    home.mkdir()
    (home / "config.toml").write_text('[superlink]\ndefault = "local"')
    arguments = ("connection.sh", "here", "127.0.0.1:8000", tmp_path / "ca.crt")
    assert run_script(*arguments, FLWR_HOME=str(home)).returncode == 0
    content = tomllib.loads((home / "config.toml").read_text())
    assert content["superlink"] == {
        "default": "local",
        "here": {"address": "127.0.0.1:8000", "root-certificates": str(tmp_path / "ca.crt")},
    }
    run = run_script(*arguments, FLWR_HOME=str(home))
    assert "has a connection 'here' already: choose another name" in run.stderr
    assert tomllib.loads((home / "config.toml").read_text()) == content


def test_registering_wants_a_public_key(tmp_path: Path) -> None:
    assert run_script("node-key.sh", tmp_path, "one").returncode == 0
    run = run_script("register.sh", "here", tmp_path / "one")
    assert run.returncode == 1
    assert "is no public key of node-key.sh (give the file that ends in .pub)" in run.stderr


def test_the_guide_names_scripts_that_are_there_and_all_of_them() -> None:
    named = set(re.findall(r"deploy/([\w-]+\.sh)", GUIDE)) | set(
        re.findall(r"`([\w-]+\.sh)", GUIDE)
    )
    assert named == {path.name for path in SCRIPTS}
    sections = [*blocks_of("One machine"), *blocks_of("Several machines")]
    code = "\n".join(text for _, text in sections)
    assert set(re.findall(r"deploy/([\w-]+\.sh)", code)) == named


# The guide's federation


@dataclass
class Guided:
    """A federation that the guide's own commands set up, in a folder of its own."""

    place: Path
    environment: dict[str, str]
    family: ProcessFamily
    terminals: list[subprocess.Popen[bytes]] = field(default_factory=list)
    run_id: str = ""

    def bash(self, text: str) -> str:
        """Run one block to its end, after the block of variables."""
        run = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\n{self.prefix()}\n{text}"],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert run.returncode == 0, f"{text}\n{run.stdout}\n{run.stderr}"
        return run.stdout

    def prefix(self) -> str:
        return f"RUN_ID='{self.run_id}'\n{blocks_of('One machine')[0][1]}"

    def terminal(self, text: str) -> None:
        """Start one block in the background and wait until its server is ready."""
        log = self.place / f"terminal-{len(self.terminals)}.log"
        with log.open("wb") as output:
            process = self.family.start(["bash", "-c", f"{self.prefix()}\n{text}"], output)
        self.terminals.append(process)
        ready = "SuperNode ID" if "supernode.sh" in text else "Uvicorn running"
        try:
            wait_for(lambda: ready in log.read_text(), process)
        except AssertionError as error:
            raise AssertionError(log.read_text()) from error

    def submit(self, num_rounds: int = 3) -> None:
        (block,) = (text for kind, text in blocks_of("One machine") if "submit.sh" in text)
        block = block.replace("num-server-rounds=3", f"num-server-rounds={num_rounds}")
        found = re.search(r"Successfully started run (\d+)", self.bash(block))
        assert found
        self.run_id = found.group(1)

    def superlink(self) -> tuple[str, Path]:
        """Its address, and the certificate to trust."""
        certificates = self.place / "federation" / "certificates"
        return f"127.0.0.1:{self.environment['PORT']}", certificates / "ca.crt"

    def status(self) -> str:
        listing = self.bash('flwr list here --run-id "$RUN_ID" --format json')
        return str(json.loads(listing[listing.index("{") :])["runs"][0]["status"])

    def wait_for_the_end(self, folder: Path) -> None:
        """Wait until a run has ended; its folder says so first, and costs nothing to ask."""
        config = folder / "config.json"
        wait_for(
            lambda: (
                config.is_file()
                and json.loads(config.read_text())["status"] not in ("starting", "running")
            )
        )
        wait_for(lambda: self.status().startswith("finished"), every=COMMAND_S)

    def node_ids(self) -> set[str]:
        listing = self.bash("flwr supernode list here --format json")
        nodes = json.loads(listing[listing.index("{") :])["nodes"]
        return {node["node-id"] for node in nodes if node["status"] == "online"}

    def kill_node_1(self) -> None:
        """``kill -9``, and wait until the SuperLink would take the node back."""
        # The SuperLink's terminal is the first, node 1's the third.
        victim = psutil.Process(self.terminals[2].pid)
        for process in (*victim.children(recursive=True), victim):
            process.kill()
        self.terminals[2].wait(60)
        wait_for(lambda: len(self.node_ids()) == 2, every=COMMAND_S)

    def start_node_1(self, node_config: str = "") -> None:
        """Start it by the guide's command, with more in the node's own config."""
        (block,) = (
            text for kind, text in blocks_of("One machine") if "keys/node-1" in text and kind
        )
        known = "partition-id=1 num-partitions=3"
        assert known in block
        self.terminal(block.replace(known, f"{known} {node_config}"))
        self.terminals[2] = self.terminals.pop()


def asks_from_round(first: int, folder: Path) -> bool:
    """Whether a run is asking its clients, in a round from ``first`` on."""
    now = folder / "progress.json"
    progress = json.loads(now.read_text()) if now.is_file() else {}
    return progress.get("phase") == "ask_clients" and progress.get("round", 0) >= first


def wait_for(
    ready: Callable[[], bool],
    process: subprocess.Popen[bytes] | None = None,
    every: float = 0.2,
) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(every)


def free_run_of_ports(number: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    listened = {c.laddr.port for c in psutil.net_connections("tcp") if c.laddr}
    while True:
        (first,) = free_ports(1)
        if first + number < 65536 and not listened & set(range(first, first + number)):
            return first


@pytest.fixture(scope="module")
def federation() -> Iterator[Guided]:
    place = Path(tempfile.mkdtemp(prefix="deploy-"))
    port, node_port = free_ports(1)[0], free_run_of_ports(3)
    config = {**SETTINGS, "run-name": "guided", "seed": 3}
    environment = {
        **os.environ,
        "PATH": search_path(),
        "HOME": str(place / "home"),
        "FEDERATION": str(place / "federation"),
        "PORT": str(port),
        "NODE_PORT": str(node_port),
        "FEDZGE_STATE_DIR": str(place / "states"),
        "RUN_CONFIG": toml_pairs(
            {k: v for k, v in config.items() if k not in ("num-clients", "num-server-rounds")}
        ),
    }
    environment.pop("FLWR_HOME", None)
    (place / "home").mkdir()
    guided = Guided(place, environment, ProcessFamily(environment, ROOT))
    ended: list[psutil.Process] = []
    try:
        for kind, text in blocks_of("One machine")[1:]:
            if kind == "terminal":
                guided.terminal(text)
            elif "submit.sh" in text:
                guided.submit()
                break
            else:
                guided.bash(text)
        yield guided
        # As the guide says: a signal in each terminal, nodes first.
        guided.family.watch()
        for process in reversed(guided.terminals):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)
        deadline = time.monotonic() + 60
        while (ended := guided.family.alive()) and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        left = guided.family.end()
        shutil.rmtree(place)
    assert ended == []
    assert left == []


def outcome_of(folder: Path, command: list[str | Path]) -> tuple[int, str]:
    """Run a SuperNode to its end.

    Its output goes to a file: the helper process that it leaves ends when the SuperNode has been
    waited for, and until then would hold a pipe open.
    """
    folder.mkdir()
    log = folder / "log"
    family = ProcessFamily(
        {**os.environ, "PATH": search_path(), "FLWR_HOME": str(folder / "flwr")}, folder
    )
    try:
        with log.open("wb") as output:
            code = family.start(command, output).wait(PATIENCE_S)
    finally:
        family.end()
    return code, log.read_text()


@pytest.mark.faults
def test_an_unregistered_key_is_refused(federation: Guided, tmp_path: Path) -> None:
    before = federation.node_ids()
    assert len(before) == 3
    assert run_script("node-key.sh", tmp_path, "stranger").returncode == 0
    superlink, authority = federation.superlink()
    node: list[str | Path] = [DEPLOY / "supernode.sh", superlink, authority, tmp_path / "stranger"]
    node += [tmp_path / "state", str(free_ports(1)[0]), "partition-id=0 num-partitions=3"]
    code, text = outcome_of(tmp_path / "node", node)
    assert code == 1, text
    assert "Failed to activate SuperNode" in text
    assert "SuperNode ID" not in text
    assert federation.node_ids() == before


@pytest.mark.faults
def test_a_node_without_a_key_is_refused(federation: Guided, tmp_path: Path) -> None:
    """Over TLS and over plain HTTP, at the same time."""
    before = federation.node_ids()
    superlink, authority = federation.superlink()
    # It would go on trying over plain HTTP for ever.
    node: list[str | Path] = ["flower-supernode", "--superlink", superlink, "--max-retries", "1"]
    commands = [
        [*node, *trust, "--port", str(port), "--node-config", "partition-id=0"]
        for trust, port in zip(
            (["--root-certificates", authority], ["--insecure"]), free_ports(2), strict=True
        )
    ]
    folders = [tmp_path / "encrypted", tmp_path / "plain"]
    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(outcome_of, folders, commands))
    for code, text in outcomes:
        assert code != 0, text
        assert "SuperNode ID" not in text
    assert federation.node_ids() == before


@pytest.mark.faults
def test_submitting_over_plain_http_is_refused(federation: Guided, tmp_path: Path) -> None:
    superlink, _ = federation.superlink()
    config = f'[superlink.plain]\naddress = "{superlink}"\ninsecure = true\n'
    (tmp_path / "config.toml").write_text(config)
    before = federation.bash("flwr list here --format json").count('"run-id"')
    run = run_script("submit.sh", "plain", "seed=1", FLWR_HOME=str(tmp_path))
    assert run.returncode == 1
    assert "Connection to the SuperLink is unavailable" in run.stdout + run.stderr
    assert federation.bash("flwr list here --format json").count('"run-id"') == before > 0


@pytest.mark.faults
def test_the_guides_run_completes_and_is_bit_identical_to_one_in_process(
    federation: Guided, tmp_path: Path
) -> None:
    (follow,) = (text for _, text in blocks_of("One machine") if "flwr log" in text)
    assert "round 3/3" in federation.bash(follow)
    folder = federation.place / "federation" / "runs" / "guided"
    federation.wait_for_the_end(folder)
    assert federation.status() == "finished:completed"
    (verdict,) = (text for _, text in blocks_of("One machine") if "flwr list" in text)
    federation.bash(verdict)
    assert [row["round"] for row in rows_of(folder)] == [1, 2, 3]
    assert all(row["participants"] == [0, 1, 2] for row in rows_of(folder))
    assert mode_of(folder / "central.safetensors") == 0o600

    import client_app

    config = {**SETTINGS, "output-dir": str(tmp_path), "run-name": "here", "seed": 3}
    here = run_server(InProcessGrid(client_app.app, config, 3), config)
    there = folder / "central.safetensors"
    assert there.read_bytes() == (here / "central.safetensors").read_bytes()


@pytest.mark.faults
def test_a_run_is_stopped_as_the_guide_says(federation: Guided) -> None:
    federation.environment["RUN_CONFIG"] = 'run-name="stopped" num-train-images=120'
    federation.submit()
    # Not while a message is on its way to a node: Flower's SuperNode (1.42) drops it, yet starts a
    # process for it, which takes the next run's message and never answers.
    progress = federation.place / "federation" / "runs" / "stopped" / "progress.json"
    wait_for(lambda: progress.is_file() and "ask_clients" in progress.read_text())
    time.sleep(MESSAGE_ARRIVES_S)
    ((_, stop),) = (block for block in blocks_of("One machine") if block[0] == "stop")
    federation.bash(stop)
    assert federation.status() == "finished:stopped"
    assert len(federation.node_ids()) == 3


@pytest.mark.faults
def test_a_killed_supernode_goes_on_with_its_model(federation: Guided) -> None:
    """``kill -9`` while it works, then started again by the guide's command."""
    config = {**SETTINGS, "run-name": "killed", "eval-every": 100, "client-evaluation": "off"}
    del config["num-clients"], config["num-server-rounds"]
    federation.environment["RUN_CONFIG"] = toml_pairs(config)
    federation.submit(num_rounds=5)
    folder = federation.place / "federation" / "runs" / "killed"
    wait_for(lambda: asks_from_round(2, folder))
    federation.kill_node_1()
    federation.start_node_1()
    federation.wait_for_the_end(folder)
    assert federation.status() == "finished:completed"
    rows = rows_of(folder)
    assert [row["round"] for row in rows] == list(range(1, 6))
    assert [1 in row["participants"] for row in rows[:2]] == [True, False]
    assert 1 in rows[-1]["participants"]
    # Its model of the first round, not an initial one: the server would have said so.
    assert "no longer has its model" not in federation.bash('flwr log "$RUN_ID" here --show')
    assert list(federation.place.glob("states/*/client-1/client.safetensors"))


@pytest.mark.faults
def test_a_private_node_tells_once_whatever_happens_to_it(federation: Guided) -> None:
    """Killed and restarted, its run stopped and resumed, another run, a smaller budget."""
    state = federation.place / "private"

    def submitted(name: str, num_rounds: int, **more: object) -> Path:
        config = {**SETTINGS, "run-name": name, "eval-every": 100, "client-evaluation": "off"}
        del config["num-clients"], config["num-server-rounds"]
        federation.environment["RUN_CONFIG"] = toml_pairs({**config, **more})
        federation.submit(num_rounds)
        return federation.place / "federation" / "runs" / name

    def completed(folder: Path) -> list[bool]:
        federation.wait_for_the_end(folder)
        assert federation.status() == "finished:completed"
        return takes_part(folder)

    def takes_part(folder: Path) -> list[bool]:
        return [1 in row["participants"] for row in rows_of(folder)]

    def told() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in state.glob("node/private/*.safetensors")}

    def private(epsilon: float) -> str:
        return f'dp-epsilon={epsilon} state-dir="{state}"'

    federation.kill_node_1()
    federation.start_node_1(private(8.0))
    folder = submitted("private", 14)
    wait_for(lambda: asks_from_round(2, folder))
    once = told()
    assert len(once) == 1
    assert takes_part(folder) == [True], rows_of(folder)[0]["missing"]

    federation.kill_node_1()
    federation.start_node_1(private(8.0))
    wait_for(lambda: takes_part(folder)[1:][-1:] == [True] and asks_from_round(3, folder))
    time.sleep(MESSAGE_ARRIVES_S)
    ((_, stop),) = (block for block in blocks_of("One machine") if block[0] == "stop")
    federation.bash(stop)
    assert federation.status() == "finished:stopped"
    done = len(takes_part(folder))
    assert done < 14
    assert told() == once

    submitted("private", 14, resume=str(folder))
    assert all(completed(folder)[done:])
    assert told() == once

    assert completed(submitted("private-again", 2, **{"local-epochs": 3})) == [True, True]
    assert told() == once

    # Another seed divides the images otherwise: the client's are not those that were looked at.
    assert completed(submitted("other-images", 2, seed=5)) == [False, False]
    assert told() == once

    # What was told has cost more than this owner allows from now on.
    federation.kill_node_1()
    federation.start_node_1(private(2.0))
    assert completed(submitted("refused", 2)) == [False, False]
    assert told() == once
