"""The launcher's own parts; whole launches are in test_e2e.py."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fedzge_flwr.common.errors import ConfigError, RunFolderError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.launch import session as session_module
from fedzge_flwr.launch import simulate as simulate_module
from fedzge_flwr.launch import submission
from fedzge_flwr.launch.engine import clients_at_once
from fedzge_flwr.launch.processes import ProcessFamily
from fedzge_flwr.launch.progress import Progress
from fedzge_flwr.launch.session import LaunchError, Session, session
from fedzge_flwr.launch.simulate import Resources, exposure, ray_config
from fedzge_flwr.launch.submission import submit
from fedzge_flwr.observers import naming
from fedzge_flwr.observers.round_row import RoundRow
from fedzge_flwr.observers.run_folder import RunFolder
from fedzge_flwr.wire.traffic import MissingReply
from tests.helpers.paths import ROOT

GRANDCHILD = """
import os, subprocess, sys, time
# A grandchild that leaves its parent, as Ray's daemons do.
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); "
                  "print('deaf', flush=True); time.sleep(100)"], start_new_session=True)
time.sleep({wait})
"""


@pytest.mark.parametrize("wait", [0.5, 100])
def test_a_family_is_ended_whole(tmp_path: Path, wait: float) -> None:
    import os

    family = ProcessFamily(os.environ, tmp_path)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        with (tmp_path / "log").open("wb") as output:
            child = family.start([sys.executable, "-c", GRANDCHILD.format(wait=wait)], output)
        while "deaf" not in (tmp_path / "log").read_text():
            time.sleep(0.05)
        if wait < 1:
            child.wait(10)
        else:
            assert len(family.alive()) == 2
        assert family.end(patience=0.5) == []
        child.wait(5)
        # The caller's other children are none of the family.
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_server_that_died_is_missed_and_one_that_was_waited_for_is_not(tmp_path: Path) -> None:
    """Flower's own processes do not ask at once how the ServerApp's has ended.

    Nor how another's has, whose run somebody else has submitted: while any runs, none is missed.
    """
    import os

    server = tmp_path / "flwr-simulation"
    server.symlink_to("/bin/sleep")
    family = ProcessFamily(os.environ, tmp_path)
    with (tmp_path / "log").open("wb") as output:
        # `exec`: a sleep in the place of the shell waits for no child.
        parent = family.start(
            ["/bin/bash", "-c", f"{server} 100 & {server} 100 & exec sleep 100"], output
        )
    children: list[psutil.Process] = []
    while [child.name() for child in children] != [server.name] * 2:
        children = psutil.Process(parent.pid).children()
    family.watch()
    assert not family.has_lost([server.name])
    for child in children:
        family.watch()
        assert not family.has_lost([server.name])
        child.kill()
        while child.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    family.watch()
    assert family.has_lost([server.name])
    assert not family.has_lost(["flwr-serverapp"])
    assert family.end() == []
    family.watch()
    assert not family.has_lost([server.name])


def test_following_a_run_leaves_the_processor_to_it(tmp_path: Path) -> None:
    with session({"output-dir": str(tmp_path)}, lambda _: {}) as launch:
        looked: list[float] = []
        watch = launch.family.watch
        launch.family.watch = lambda: (looked.append(time.monotonic()), watch())[1]  # type: ignore[method-assign]
        assert launch.follow(["/bin/sleep", "4"], "waiting").returncode == 0
        assert 1 <= len(looked) <= 3


def make_row(number: int, **more: Any) -> RoundRow:
    values: dict[str, Any] = {
        "round": number,
        "central_accuracy": 0.5,
        "central_loss": 1.0,
        "ensemble_accuracy": None,
        "mean_client_accuracy": 0.25,
        "client_accuracy": {0: 0.25},
        "sampled": (0, 1),
        "participants": (0,),
        "unmoved": (),
        "missing": (),
        "skipped": None,
        "queries_per_client": 3000,
        "queries": 3000,
        "bytes_down": 1_000_000,
        "bytes_up": 10,
        "bytes_down_total": 2_000_000,
        "bytes_up_total": 20,
        "evaluation_bytes_down": 0,
        "evaluation_bytes_up": 0,
        "seconds": 1.5,
    }
    return RoundRow(**{**values, **more})


def test_rows_are_shown_once_and_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rounds.jsonl"
    first = json.dumps(make_row(1).to_json()) + "\n"
    second = json.dumps(make_row(2, skipped="too few").to_json()) + "\n"
    with Progress(tmp_path, 3) as progress:
        progress.poll("starting")
        rows.write_text(first + second[:40])
        progress.poll("starting")
        progress.poll("starting")
        assert capsys.readouterr().out.count("1/3") == 1
        rows.write_text(first + second)
        progress.poll("starting")
    text = capsys.readouterr().out
    assert "2/3  50.0 %        –      25.0 %          3,000      2.0     0.0   1.5" in text
    assert "skipped: too few" in text


@pytest.mark.parametrize("damage", ["not JSON", "[1]", '{"round": 1}', "\0\0"])
def test_what_is_damaged_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    row = json.dumps(make_row(2).to_json())
    (tmp_path / "rounds.jsonl").write_text(f"{damage}\n{row}\n")
    (tmp_path / "progress.json").write_text(damage)
    with Progress(tmp_path, 3) as progress:
        progress.poll("starting")
    text = capsys.readouterr().out
    assert text.count("a row of rounds.jsonl is damaged and is not shown") == 1
    assert "2/3" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_says_who_has_replied_what_it_cost_and_how_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    rows = [make_row(number, seconds=100.0 * number) for number in (1, 2)]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(r.to_json()) + "\n" for r in rows))
    current = {"round": 3, "phase": "ask_clients", "since": 0.0}
    (tmp_path / "progress.json").write_text(json.dumps({**current, "answered": 4, "asked": 5}))
    with Progress(tmp_path, 6) as progress:
        progress.poll("starting")
        time.sleep(0.3)
    # Four rounds of 150 s are left.
    expected = (
        "round 3/6: ask clients (0 s), 4 of 5 clients, 3,000 queries a client, 2.0 MB, "
        "about 10 min left"
    )
    assert expected in screen.getvalue()


def test_warnings_are_shown_as_they_come_and_counted_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_two = [(1, "train.round"), (1, "evaluate.local"), (3, "train.round")]
    gone = tuple(MissingReply(*who, "gone") for who in of_two)
    rows = [make_row(n, missing=who) for n, who in enumerate((gone, (), gone[:1]), start=1)]
    log = tmp_path / "warnings.log"
    log.write_text("an old one\n")
    with Progress(tmp_path, 3) as progress:
        progress.poll("starting")
        progress.recap()
        assert capsys.readouterr().out == ""
        with log.open("a") as file:
            file.write("client 1 left out of train.round: gone\nhalf a li")
        progress.poll("starting")
        assert capsys.readouterr().out == "  warning: client 1 left out of train.round: gone\n"
        with log.open("a") as file:
            file.write("ne\n")
        text = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
        (tmp_path / "rounds.jsonl").write_text(text)
        progress.poll("starting")
        progress.recap()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  warning: half a line"
    assert lines[-2:] == [
        f"warnings: 2, see {log}",
        "rounds in which clients were left out: client 1: 2, client 3: 1",
    ]


def test_row_as_a_log_line() -> None:
    line = make_row(2, missing=(MissingReply(4, "a", "b"),)).to_line(9)
    assert line.startswith("round 2/9 | central 50.0 % | mean client 25.0 % | queries")
    assert line.endswith("left out: 4")


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedzge_flwr.cli", "run", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run-config", "q=0"], "error: run config: 'q' = 0: "),
        (["--run-config", "lr=1"], "error: run config: unknown key 'lr'"),
        (["--run-config", 'exchanges="one"'], "error: run config: 'exchanges' is no longer a "),
        (["--run-config", "q = 3"], "error: --run-config: 'q' is not KEY=VALUE"),
        (["--run-config", "q=three"], "error: --run-config: q=three: the value is no number"),
        (["--preset", "/nowhere.toml"], "error: preset '/nowhere.toml': no preset and no file"),
        (["--deployment", "--client-gpus", "0"], "error: --deployment: --client-… and"),
        (["--deployment", "--app", "/nowhere"], "error: /nowhere/deploy has no superlink.sh"),
    ],
)
def test_bad_arguments_end_at_once(arguments: list[str], message: str) -> None:
    started = time.monotonic()
    run = launch(*arguments)
    assert run.returncode == 1
    assert message in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert time.monotonic() - started < 20


def test_resources_reach_flower() -> None:
    more = "init-args-num-gpus=1 client-resources-num-cpus=2 init-args-logging-level='info'"
    assert ray_config(Resources(num_gpus=0.25, more=more)) == {
        "client_resources": {"num_cpus": 2, "num_gpus": 0.25},
        "init_args": {"include_dashboard": False, "num_gpus": 1, "logging_level": "info"},
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("num-supernodes=3", "'num-supernodes' is none of client-resources-num-cpus, "),
        ("init-args-num-gpus=0.5", "'init-args-num-gpus' = 0.5 is no int"),
        ("init-args-num-gpus=true", "'init-args-num-gpus' = True is no int"),
        ("init-args-num-gpus=x", "--federation-config: "),
    ],
)
def test_other_resources_are_refused(more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        ray_config(Resources(more=more))


def makespan(num_clients: int, at_once: int, cores: int) -> Fraction:
    """Time until equal jobs are done of which some run at a time and share the cores evenly."""
    waiting, now = num_clients, Fraction(0)
    running: list[Fraction] = []
    while waiting or running:
        joining = min(waiting, at_once - len(running))
        running += [Fraction(1)] * joining
        waiting -= joining
        speed = min(Fraction(cores, len(running)), Fraction(1))
        now += min(running) / speed
        running = [left - min(running) for left in running if left > min(running)]
    return now


@pytest.mark.parametrize("num_clients", [1, 2, 3, 5, 7, 10, 20, 100])
@pytest.mark.parametrize("cores", [1, 2, 4, 6, 16])
def test_as_many_clients_run_at_once_as_keep_the_cores_busy(num_clients: int, cores: int) -> None:
    found = clients_at_once(num_clients, cores)
    candidates = range(cores, max(cores, min(3 * cores // 2, num_clients)) + 1)
    times = {at_once: makespan(num_clients, at_once, cores) for at_once in candidates}
    assert times[found] == min(times.values())
    assert found == min(at_once for at_once in times if times[at_once] == times[found])


def test_five_clients_on_two_cores() -> None:
    assert clients_at_once(5, 2) == 3
    assert makespan(5, 3, 2) == Fraction(5, 2)
    assert makespan(5, 2, 2) == 3


@pytest.mark.parametrize(
    ("resources", "asked"),
    [
        (Resources(), 2),
        (Resources(num_cpus=2), 0),
        (Resources(num_gpus=0.5, more="init-args-num-gpus=1"), 0),
        (Resources(more="init-args-num-cpus=2"), 0),
        ("10.0.0.1:6379", 0),
    ],
)
def test_who_has_settled_how_many_run_at_once_is_heard(
    resources: Resources | str, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user, a GPU, or a cluster, whose address is here and which `make test-slow` has."""
    told: list[Any] = []
    if isinstance(resources, str):
        monkeypatch.setenv("RAY_ADDRESS", resources)
        monkeypatch.setattr(simulate_module, "check_cluster", lambda address: None)
        resources = Resources()

    def follow(launch: Session, command: Any, otherwise: str) -> Any:
        told.append(json.loads(Path(command[-1]).read_text()))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(Session, "follow", follow)
    config = {"output-dir": str(tmp_path), "num-clients": 5, "fraction-train": 0.4}
    simulate_module.simulate(ROOT, config, resources)
    assert [specification["share-cores-among"] for specification in told] == [asked]


def test_a_ray_without_tokens_is_warned_of_in_one_line() -> None:
    assert exposure("2.55.1") == exposure("2.52.0") == exposure("3.0.0.dev0") == ""
    (line,) = exposure("2.51.2").splitlines()
    assert line.startswith("Ray 2.51.2 knows no tokens: while this runs, every user of")


def run_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]) -> Any:
    """Launch up to the submission, and return the settings that would be submitted."""
    submitted: list[Any] = []

    def run(launch: Any, app: Any, for_ray: Any) -> None:
        submitted.append(launch.overrides)

    monkeypatch.setattr(simulate_module, "_run", run)
    monkeypatch.chdir(tmp_path)
    folder = simulate_module.simulate(tmp_path, config, Resources())
    return folder, submitted[0]


def test_relative_paths_are_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"data-dir": "data", "output-dir": "out", "run-name": "a"}
    folder, submitted = run_launch(tmp_path, monkeypatch, config)
    assert folder == tmp_path / "out" / "a"
    assert submitted["data-dir"] == str(tmp_path / "data")
    assert submitted["output-dir"] == str(tmp_path / "out")


def test_a_taken_run_name_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = tmp_path / "out" / "a"
    taken.mkdir(parents=True)
    (taken / "config.json").write_text('{"status": "finished"}')
    with pytest.raises(RunFolderError, match=r"'run-name' = 'a': .* exists already"):
        run_launch(tmp_path, monkeypatch, {"output-dir": str(tmp_path / "out"), "run-name": "a"})
    assert (taken / "config.json").read_text() == '{"status": "finished"}'
    assert [path.name for path in taken.iterdir()] == ["config.json"]


def test_automatic_names_avoid_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "automatic_run_name", lambda settings: "auto")
    (tmp_path / "auto").mkdir()
    folder, _ = run_launch(tmp_path, monkeypatch, {"output-dir": str(tmp_path)})
    assert folder.name == "auto-2"


def test_launches_of_one_second_have_a_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks before the first one's server has made anything."""
    monkeypatch.setattr(naming, "automatic_run_name", lambda settings: "auto")
    given = {"output-dir": str(tmp_path)}
    with session(given, lambda _: {}) as one, session(given, lambda _: {}) as two:
        assert (one.folder.name, two.folder.name) == ("auto", "auto-2")
        for launch in (one, two):
            assert RunFolder(from_run_config(launch.overrides)).path == launch.folder
    assert {path.name for path in tmp_path.iterdir()} >= {"auto", "auto-2"}


def test_a_folder_that_another_launch_has_just_made_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "automatic_run_name", lambda settings: "auto")
    look = naming.free_run_folder

    def look_slowly(settings: Any) -> Path:
        folder = look(settings)
        if not folder.exists() and folder.name == "auto":
            folder.mkdir()
        return folder

    monkeypatch.setattr(session_module, "free_run_folder", look_slowly)
    with session({"output-dir": str(tmp_path)}, lambda _: {}) as launch:
        assert launch.folder.name == "auto-2"
    assert (tmp_path / "auto").is_dir()
    assert not (tmp_path / "auto-2").exists()


def test_a_name_that_another_launch_has_is_refused(tmp_path: Path) -> None:
    given = {"output-dir": str(tmp_path), "run-name": "a"}
    with session(given, lambda _: {}) as launch:
        with (
            pytest.raises(RunFolderError, match=r"'run-name' = 'a': .* exists already"),
            session(given, lambda _: {}),
        ):
            pytest.fail("both have started")
        assert launch.folder.is_dir()


@pytest.mark.parametrize("where", ["home", "launch"])
def test_of_a_run_that_never_begins_no_folder_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "home":
        monkeypatch.setenv("RAY_TMPDIR", "/proc/sys")
    output = tmp_path / "new" / "runs"

    def run() -> None:
        with session({"output-dir": str(output), "run-name": "a"}, lambda _: {}) as launch:
            launch.log("flower").write_text("why")
            raise launch.failed("it failed")

    with pytest.raises((ConfigError, LaunchError)):
        run()
    # Logs lie beside it, so that the name stays free.
    assert not (output / "a").exists()
    assert output.exists() == (where == "launch")


def test_a_verdict_is_of_this_run_not_of_the_one_resumed(tmp_path: Path) -> None:
    """A finished run that is resumed with other settings ends before its folder is touched."""
    config = tmp_path / "run" / "config.json"
    config.parent.mkdir()
    config.write_text('{"status": "finished"}')
    started = "echo 'Successfully started run 5'"
    with session({"resume": str(config.parent)}, lambda _: {}) as launch:
        refused = f"{started}; echo 'fedzge: the run to resume has another q'"
        with pytest.raises(LaunchError, match="the run to resume has another q"):
            submit(launch, ["bash", "-c", refused], "running")
        done = f"{started}; sleep 0.1; touch '{config}'"
        submit(launch, ["bash", "-c", done], "running")


@pytest.mark.parametrize(
    ("states", "dead"),
    [
        (("running", "finished:completed"), None),
        (("running", "running"), "the server's process is gone, and Flower says 'running'"),
        (("pending", "running", "pending", "finished:completed"), None),
    ],
)
def test_a_server_that_is_gone_is_asked_about_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: tuple[str, ...], dead: str | None
) -> None:
    """Under load Flower may take seconds to say that the run has ended well."""
    server = tmp_path / "flwr-serverapp"
    server.symlink_to("/bin/sleep")
    told = [*states]
    monkeypatch.setattr(submission, "_LAST_WORDS_S", 0.1)
    monkeypatch.setattr(submission, "_status", lambda *_: told.pop(0) if len(told) > 1 else told[0])
    # It stays after its server, as `flwr run --stream` does; `exec`: and waits for no child.
    ends = f"echo 'Successfully started run 5'; {server} 2 & exec sleep 60"
    with session({"output-dir": str(tmp_path / "out")}, lambda _: {}) as launch:
        if dead is None:
            submit(launch, ["bash", "-c", ends], "running")
        else:
            with pytest.raises(LaunchError, match=dead):
                submit(launch, ["bash", "-c", ends], "running")
    assert len(told) == 1
