"""A run that was stopped goes on as if it had not been, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import load_file

import fedzge_flwr.server.checkpoints as checkpoints_module
from fedzge_flwr.common.errors import CheckpointError, RosterError, RunFolderError
from fedzge_flwr.common.version import __version__
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.observers.run_folder import RunFolder
from fedzge_flwr.server.checkpoints import Checkpoint, CheckpointFolder
from fedzge_flwr.strategy import _Run
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.resuming import PHASES, client_models, results, resume
from tests.helpers.running import folder_of, rows_of, run_server

ROUNDS = 3


class Stop(BaseException):
    """As sudden as a signal."""


@pytest.fixture
def config(efficient_config: dict[str, Any]) -> dict[str, Any]:
    return {
        **efficient_config,
        "num-server-rounds": ROUNDS,
        "fraction-train": 0.6,
        # Some clients take part a second time: how often they have trained must not be forgotten.
        "local-rounds": 1,
        "client-distill-rounds": 0,
        "client-evaluation": "off",
    }


@pytest.fixture
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "states"))
    return tmp_path / "states"


def stop_at(monkeypatch: pytest.MonkeyPatch, round_: int, phase: str) -> None:
    """Have the run folder, which hears of every phase, stop the run when one begins."""
    whole = RunFolder.on_phase

    def on_phase(self: RunFolder, at: int, name: str) -> None:
        whole(self, at, name)
        if (at, name) == (round_, phase):
            raise Stop

    # Whoever is killed does not close; the kernel lets go of what is locked.
    monkeypatch.setattr(RunFolder, "on_phase", on_phase)
    monkeypatch.setattr(RunFolder, "on_end", lambda folder, *_: folder._let_go())


@pytest.mark.faults
@pytest.mark.parametrize("transport", ["compact", "dense"])
def test_stopped_in_any_phase_and_resumed(
    make_grid: Any,
    config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    transport: str,
) -> None:
    config = {**config, "transport": transport}
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "unbroken"))
    run_server(make_grid(config), config)
    wanted, clients = results(config), client_models(tmp_path / "unbroken")
    assert len(clients) == 3
    for phase in PHASES:
        stopped = {**config, "run-name": f"stopped-{phase}"}
        monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / phase))
        with monkeypatch.context() as patched:
            stop_at(patched, 2, phase)
            with pytest.raises(Stop):
                run_server(make_grid(stopped), stopped)
        resume(make_grid, stopped)
        assert results(stopped) == wanted, phase
        assert client_models(tmp_path / phase) == clients, phase


def test_stopped_in_the_first_round_and_again_and_again(
    make_grid: Any, config: dict[str, Any], state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**config, "checkpoint-every": 2}
    unbroken = {**config, "run-name": "unbroken"}
    run_server(make_grid(unbroken), unbroken)
    with monkeypatch.context() as patched:
        stop_at(patched, 1, "distill_clients")
        with pytest.raises(Stop):
            run_server(make_grid(config), config)
    for round_, phase in ((2, "remember"), (3, "distill_clients"), (3, "evaluate_central")):
        with monkeypatch.context() as patched:
            stop_at(patched, round_, phase)
            with pytest.raises(Stop):
                resume(make_grid, config)
    resume(make_grid, config)
    assert results(config) == results(unbroken)
    told = json.loads((folder_of(config) / "config.json").read_text())
    assert told["resumed_after"] == [0, 0, 2, 2]
    assert told["status"] == "finished"


def test_a_finished_run_is_resumed_to_the_same_end(
    make_grid: Any, config: dict[str, Any], state_dir: Path
) -> None:
    run_server(make_grid(config), config)
    before = results(config)
    grid = resume(make_grid, config)
    assert results(config) == before
    assert {message.metadata.message_type for message in grid.sent} == {"query.hello"}


def test_clients_without_a_state_dir_begin_anew_and_the_log_says_so(
    make_grid: Any,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {**config, "fraction-train": 1.0}
    with monkeypatch.context() as patched:
        stop_at(patched, 3, "ask_clients")
        with pytest.raises(Stop):
            run_server(make_grid(config), config)
    resume(make_grid, config)
    lines = [r.getMessage() for r in caplog.records if "began anew" in r.getMessage()]
    assert len(lines) == 3
    assert lines[0].startswith("round 3: client 0 no longer has its model and began anew; a 'state")


def test_a_reply_lost_after_the_work_is_undone(
    make_grid: Any, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a state-dir the client is as the server knows it: as if it had not been reached."""
    config = {**config, "fraction-train": 1.0}
    outcomes = []
    for number, lost in enumerate(("request", "reply")):
        monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / str(number)))
        more = {**config, "run-name": lost}
        grid = make_grid(more)

        def unlucky(message: Message, grid: InProcessGrid = grid) -> bool:
            return (
                message.metadata.message_type == "train.round"
                and message.content["message"]["round"] == 2
                and message.metadata.dst_node_id == min(grid.contexts)
            )

        if lost == "request":
            grid.lose = unlucky
        else:
            grid.tamper = lambda request, reply, is_it=unlucky: None if is_it(request) else reply
        run_server(grid, more)
        outcomes.append((results(more), client_models(tmp_path / str(number))))
    assert outcomes[0] == outcomes[1]


def test_what_a_client_owes_lives_through_a_restart(
    make_grid: Any, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clients of three miss the second round, and the server dies in the third."""
    config = {**config, "fraction-train": 1.0, "num-server-rounds": 4, "local-rounds": 0}

    def missed(message: Message) -> bool:
        return (
            message.metadata.message_type == "train.round"
            and message.content["message"]["round"] == 2
            and message.metadata.dst_node_id % 2 == 0
        )

    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "unbroken"))
    run_server(make_grid(config, lose=missed), config)
    wanted = results(config)
    assert len(rows_of(folder_of(config))[1]["missing"]) == 2
    stopped = {**config, "run-name": "stopped"}
    monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path / "stopped"))
    with monkeypatch.context() as patched:
        stop_at(patched, 3, "ask_clients")
        with pytest.raises(Stop):
            run_server(make_grid(stopped, lose=missed), stopped)
    resume(make_grid, stopped)
    assert results(stopped) == wanted


def test_clients_keep_the_states_that_a_checkpoint_may_need_and_no_more(
    make_grid: Any, config: dict[str, Any], state_dir: Path
) -> None:
    config = {**config, "fraction-train": 1.0, "num-server-rounds": 6}
    counts = []

    def look(request: Message, reply: Message) -> Message:
        counts.append(len(list(state_dir.glob("*/client-0/0*.safetensors"))))
        return reply

    run_server(make_grid(config, tamper=look), config)
    # Two checkpoints are kept, and what has been done since.
    assert max(counts) == 4
    never = {**config, "checkpoint-every": 0, "run-name": "never"}
    before = counts[-1]
    counts.clear()
    run_server(make_grid(never, tamper=look), never)
    assert not (folder_of(never) / "checkpoints").exists()
    # The state before the round, and those after training and after the last distillation.
    assert max(counts) == before + 3


def test_the_final_private_model_is_the_owners(
    make_grid: Any, config: dict[str, Any], state_dir: Path
) -> None:
    grid = make_grid({**config, "fraction-train": 1.0})
    run_server(grid, config)
    models = list(state_dir.glob("*/client-*/client.safetensors"))
    assert sorted(path.parent.name for path in models) == ["client-0", "client-1", "client-2"]
    import torch

    from fedzge_flwr.learning.models.catalogue import rebuild_model

    arrays = {name: torch.from_numpy(value) for name, value in load_file(models[0]).items()}
    rebuild_model("cnn", (1, 8, 8), 10, arrays)
    # Nothing of the model is in Flower's hands.
    assert all(not context.state.array_records for context in grid.contexts.values())
    assert not (state_dir.stat().st_mode & 0o077) or not (models[0].parent.stat().st_mode & 0o077)


# -- checkpoints ------------------------------------------------------------------------------


def tiny(round_: int, **settings: Any) -> Checkpoint:
    values = np.arange(round_ + 3, dtype=np.float64)
    return Checkpoint(round_, settings, {"x": values}, {"y": [(1, 2.5)], 7: None}, {"s": "ß"})


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    assert folder.save(tiny(4, alpha=0.5)) == [4]
    found = folder.newest()
    assert (found.round, found.settings, found.clients) == (4, {"alpha": 0.5}, tiny(4).clients)
    assert found.strategy == {"s": "ß"}
    assert found.server["x"].dtype == np.float64
    assert np.array_equal(found.server["x"], np.arange(7))


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert [folder.save(tiny(number)) for number in (0, 2, 4, 6)] == [[0], [0, 2], [2, 4], [4, 6]]
    # Going on from an older one takes the place of the newer.
    assert folder.save(tiny(5)) == [4, 5]
    assert folder.newest().round == 5


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda data: data[: len(data) // 2], "is truncated or damaged"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is truncated or damaged"),
        (lambda data: b"", "is not a checkpoint"),
        (lambda data: b"PK\x03\x04" + data, "is not a checkpoint"),
    ],
)
def test_a_bad_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Any, complaint: str
) -> None:
    folder = CheckpointFolder(tmp_path)
    for number in (1, 2):
        folder.save(tiny(number))
    newest = tmp_path / "round-000002.checkpoint"
    newest.write_bytes(spoil(newest.read_bytes()))
    assert folder.newest().round == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert complaint in line
    assert str(newest) in line
    (tmp_path / "round-000001.checkpoint").unlink()
    with pytest.raises(CheckpointError, match=r"no whole checkpoint in .*: there is nothing"):
        folder.newest()


def head_of(path: Path) -> list[bytes]:
    return path.read_bytes().partition(b"\n")[0].split(b" ")


def with_head(path: Path, *head: bytes) -> None:
    _, _, data = path.read_bytes().partition(b"\n")
    path.write_bytes(b" ".join(head) + b"\n" + data)


def test_a_checkpoint_names_the_version_that_wrote_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = CheckpointFolder(tmp_path)
    folder.save(tiny(1))
    path = tmp_path / "round-000001.checkpoint"
    what, number, version, digest = head_of(path)
    assert version.decode() == __version__
    folder.newest()
    assert not caplog.records
    with_head(path, what, number, b"0.0.7", digest)
    assert folder.newest().round == 1
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        f"checkpoint {path} was written by fedzge-flwr 0.0.7, and fedzge-flwr {__version__} goes "
        "on from it: what follows may differ from a run by one version"
    )


@pytest.mark.parametrize(
    ("middle", "who"),
    [
        ([b"1"], "an earlier version"),
        ([b"%d" % (checkpoints_module.FORMAT + 1), b"9.9.9"], "version 9.9.9"),
    ],
)
def test_another_format_is_refused_and_not_passed_over(
    tmp_path: Path, middle: list[bytes], who: str
) -> None:
    folder = CheckpointFolder(tmp_path)
    for number in (1, 2):
        folder.save(tiny(number))
    path = tmp_path / "round-000002.checkpoint"
    what, *_, digest = head_of(path)
    with_head(path, what, *middle, digest)
    with pytest.raises(CheckpointError) as caught:
        folder.newest()
    assert str(caught.value) == (
        f"checkpoint {path} is of format {int(middle[0])}, written by {who} of fedzge-flwr; this "
        f"is version {__version__}, which reads format {checkpoints_module.FORMAT}: resume with "
        "the version that wrote it"
    )


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    import hashlib
    import io

    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    payload = io.BytesIO()
    torch.save({"round": 1, "settings": Evil()}, payload)
    digest = hashlib.sha256(payload.getvalue()).hexdigest().encode()
    path = tmp_path / "round-000001.checkpoint"
    head = b"fedzge-checkpoint %d 0 %s\n" % (checkpoints_module.FORMAT, digest)
    path.write_bytes(head + payload.getvalue())
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        CheckpointFolder(tmp_path).newest()
    assert not (tmp_path / "ran").exists()


def test_other_settings_are_refused_by_name(
    make_grid: Any, config: dict[str, Any], state_dir: Path
) -> None:
    run_server(make_grid(config), config)
    before = (folder_of(config) / "rounds.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"'alpha' = 1\.0, this one 0\.5: go on with its"):
        resume(make_grid, {**config, "alpha": 0.5})
    assert (folder_of(config) / "rounds.jsonl").read_bytes() == before
    resume(make_grid, {**config, "query-timeout": 9.0})


def test_all_files_are_of_the_rounds_that_are_gone_on_from(
    make_grid: Any, config: dict[str, Any], state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a stop has left: what is derived from rows follows them."""
    with monkeypatch.context() as patched:
        stop_at(patched, 3, "save_checkpoint")
        with pytest.raises(Stop):
            run_server(make_grid(config), config)
    folder = folder_of(config)
    table = (folder / "accuracy.csv").read_bytes()
    assert len(table.splitlines()) == 1 + 3
    (folder / "accuracy.csv").write_bytes(table[:-7])
    (folder / "warnings.log").write_bytes(b"round 1: a whole one\nround 2: half a o")
    (folder / "progress.json").write_bytes(b"")
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    rows = (folder / "rounds.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "rounds.jsonl").write_bytes(rows[0])
    pictures = folder / "generated"
    assert len(list(pictures.iterdir())) == 3
    taken_up = RunFolder(from_run_config({**config, "resume": str(folder)}))
    assert taken_up.resumed_from is not None
    assert taken_up.resumed_from.round == 1
    assert (folder / "accuracy.csv").read_bytes() == b"".join(table.splitlines(keepends=True)[:2])
    assert [path.name for path in pictures.iterdir()] == ["round-000001.png"]
    assert not (folder / "progress.json").exists()
    # `fedzge run` shows what is in this file.
    assert (folder / "warnings.log").read_text().splitlines() == [
        "round 1: a whole one",
        f"checkpoint {newest} is truncated or damaged and is passed over",
    ]
    taken_up._let_go()
    resume(make_grid, config)
    assert (folder / "accuracy.csv").read_bytes() == table
    assert json.loads((folder / "config.json").read_text())["resumed_after"] == [1, 1]


def test_a_resumed_run_that_does_not_begin_replaces_no_model(
    make_grid: Any, config: dict[str, Any], state_dir: Path
) -> None:
    run_server(make_grid(config), config)
    models = {path.name: path.read_bytes() for path in folder_of(config).glob("*.safetensors")}
    assert len(models) == 2
    with pytest.raises(RosterError):
        resume(make_grid, {**config, "node-timeout": 0.6}, num_nodes=4)
    for name, data in models.items():
        path = folder_of(config) / name
        assert path.read_bytes() == data
        path.unlink()
    with pytest.raises(RosterError):
        resume(make_grid, {**config, "node-timeout": 0.6}, num_nodes=4)
    assert not list(folder_of(config).glob("*.safetensors"))


def test_resume_names_a_run(make_grid: Any, config: dict[str, Any], tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        again = {**config, "resume": str(folder)}
        with pytest.raises(RunFolderError, match="is not the folder of a run"):
            run_server(make_grid(again), again)


def test_resume_toml_is_the_run_config_to_go_on_with(
    make_grid: Any, config: dict[str, Any], state_dir: Path
) -> None:
    import tomllib

    run_server(make_grid(config), config)
    again = tomllib.loads((folder_of(config) / "resume.toml").read_text())
    assert again["resume"] == str(folder_of(config))
    grid = make_grid(again)
    run_server(grid, again)
    assert len(rows_of(folder_of(config))) == ROUNDS


def test_states_are_kept_of_the_checkpoints_that_are_kept(
    make_grid: Any, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rounds there are."""
    kept: list[int] = []
    whole = _Run._save

    def save(self: _Run, round_: int) -> None:
        whole(self, round_)
        kept.append(len(self._kept_states))

    monkeypatch.setattr(_Run, "_save", save)
    run_server(make_grid(config), {**config, "num-server-rounds": 6})
    assert kept == [1, 2, 2, 2, 2, 2, 2]
