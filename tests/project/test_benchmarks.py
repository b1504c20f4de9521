from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    central_accuracy,
    gradient_fidelity,
    liars,
    run_table,
    single_teacher,
    zeroth_order_value,
)
from benchmarks.costs.memory import memory_rows
from benchmarks.costs.memory_watch import MemoryWatch
from benchmarks.costs.parallel_clients import parallel_clients
from benchmarks.costs.simulated import overhead_rows, scale_row
from benchmarks.costs.wire import byte_rows
from benchmarks.fixed_clients import FixedClients
from benchmarks.local_clients import LocalClients
from benchmarks.round_cost import markdown
from benchmarks.steered_patterns import Steered
from benchmarks.told import kept_in, told
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import preset_file, read_settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.query.question import Question
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.server.build import build_central, build_generator, build_server
from fedzge_flwr.server.phases import generate
from fedzge_flwr.server.state import ServerState
from fedzge_flwr.synthesis.memory import Memories
from tests.helpers.paths import ROOT
from tests.helpers.running import run_server

TINY = (
    "--dataset digits --clients 2 --train-images 120 --test-images 60 --local-epochs 1 "
    "--eval-every 1 --set synthetic-batch-size=20 central-distill-steps=2 client-distill-steps=2 "
    "min-local-steps=1 generator-width=4 generator-steps=1"
)


@pytest.mark.slow
def test_run_table(make_grid: Any, tiny_config: dict[str, Any]) -> None:
    folder = run_server(make_grid(tiny_config), tiny_config)
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.run_table", str(folder), "--rounds", "2"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    *_, last = run.stdout.strip().splitlines()
    assert len(run.stdout.strip().splitlines()) == 3
    assert last.startswith("| 2 | ")
    assert " | 72 | " in last


@pytest.mark.slow
def test_gradient_fidelity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a tiny setting: all rows, and a second call that only reads what the first one kept."""
    arguments = (
        "--dataset digits --draws 1 --clients 2 --train-images 200 --test-images 100 --images 10 "
        "--local-epochs 3 --transfer-images 100 --central-steps 40 --generator-steps 2 "
        f"--cache {tmp_path / 'cache'} --json {tmp_path / 'found.json'}"
    ).split()
    gradient_fidelity.main(arguments)
    first = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    rows = found["tables"]["estimators"]
    assert len(rows) == 3 * len(gradient_fidelity.cases()["estimators"])
    assert "**steps and formats**" in first.out
    assert "| half (" in first.out
    by_name = {
        name: sum(row["cosine"] for row in rows if row["case"]["estimator"] == name)
        for name in ("batch-difference", "guided")
    }
    assert by_name["guided"] > by_name["batch-difference"]
    # What rounding erases has no direction left, and that is no error.
    assert all(-1.0 <= row["cosine"] <= 1.0 for table in found["tables"].values() for row in table)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.*")}
    gradient_fidelity.main(arguments)
    assert capsys.readouterr().out == first.out
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


@pytest.mark.slow
def test_liars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Models that were trained once do as well for the next run; who is absent is not heard."""
    arguments = [
        *("--clients", "4", "--alpha", "1", "--cache", str(tmp_path / "cache")),
        *(
            "--ensemble",
            "known-contrasts",
            "--lie",
            "none",
            "absent",
            "50",
            "adaptive",
            "--set",
            *TINY.partition("--set ")[2].split(),
        ),
        *("num-train-images=400", "num-test-images=100", "num-server-rounds=2", "local-rounds=2"),
        *("random-shifts=false", "random-erasing=false"),
    ]
    runs = []
    for name in ("first", "second"):
        kept = tmp_path / f"{name}.json"
        liars.main([*arguments, "--json", str(kept)])
        liars.main([*arguments, "--json", str(kept), "--answers-alone"])
        runs.append([{**run, "seconds": 0} for run in json.loads(kept.read_text())])
    assert runs[0] == runs[1]
    assert len(list((tmp_path / "cache").iterdir())) == 4 * 2
    told = {run["lie"]: run for run in runs[0][4:]}
    assert told["50"]["a_to_b"] == 1.0
    assert told["none"]["a_to_b"] < 0.5
    assert told["absent"]["together"] != told["none"]["together"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 * ((2 + 4) + (2 + 8))


@pytest.mark.slow
def test_zeroth_order_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients are trained once for all rows; a finished row is not run again."""
    exact, rounds = zeroth_order_value.exact_steps, []

    def noted(server: ServerState, clients: FixedClients, round_: int) -> None:
        rounds.append(round_)
        exact(server, clients, round_)

    monkeypatch.setattr(zeroth_order_value, "exact_steps", noted)
    kept = tmp_path / "kept.json"
    rows = ["evolved patterns", "steered patterns", "generated, exact"]
    arguments = [
        *("--clients", "3", "--cache", str(tmp_path / "cache"), "--json", str(kept)),
        *("--row", *rows, "--exchanges", "2", "--set"),
        *TINY.partition("--set ")[2].split(),
        *("num-train-images=300", "num-test-images=100", "num-server-rounds=2", "local-rounds=2"),
    ]
    zeroth_order_value.main(arguments)
    runs = json.loads(kept.read_text())
    assert [run["row"] for run in runs] == rows
    # Two rounds of 20 images, in four of 10.
    assert [run["queries"] for run in runs] == [40, 40, 40]
    # In the first the central model has learned nothing yet.
    assert rounds == [2, 3, 4]
    assert len(list((tmp_path / "cache").iterdir())) == 3 * 2
    assert "training round 2" in capsys.readouterr().out
    zeroth_order_value.main(arguments)
    assert json.loads(kept.read_text()) == runs
    assert "training round" not in capsys.readouterr().out


@pytest.mark.slow
def test_single_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hard labels tell a class and nothing else; a finished row is not run again."""
    kept = tmp_path / "kept.json"
    arguments = [
        *("--dataset", "digits", "--model", "cnn", "--budget", "40", "--epochs", "2"),
        *("--steps", "3", "--cache", str(tmp_path / "cache"), "--json", str(kept)),
        *("--set", "num-server-rounds=2", "num-train-images=200", "num-test-images=100"),
    ]
    single_teacher.main(arguments)
    runs = json.loads(kept.read_text())
    assert [(run["labels"], run["queries"]) for run in runs] == [("hard", 40), ("soft", 40)]
    assert runs[0]["ensemble"] == runs[1]["ensemble"] > 0.3
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert "| digits | cnn | hard | 40 | " in capsys.readouterr().out
    single_teacher.main(arguments)
    assert json.loads(kept.read_text()) == runs
    logits = np.array([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]], dtype=np.float32)
    hard = single_teacher.classes_alone(logits)
    assert hard.tolist() == [[0, 10, 0], [10, 0, 0]]
    assert single_teacher.lenet5((1, 28, 28), 7)(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert single_teacher.lenet5((3, 32, 32), 7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_steered_patterns_go_where_the_central_model_sees_the_rare_class() -> None:
    """Its own gradient moves them: as they are drawn, hardly any is bright."""

    class Central(torch.nn.Module):
        def forward(self, x_NCHW: torch.Tensor) -> torch.Tensor:
            mean_N = x_NCHW.mean(dim=(1, 2, 3))
            return torch.stack((torch.zeros_like(mean_N), 9 * (mean_N - 0.7)), dim=1)

    central, told = Central(), Memories.of(10)
    steered = Steered(central)
    plain = steered(200, (1, 8, 8), told, torch.Generator().manual_seed(0))
    told.images.add(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.tensor([[9.0, -9.0]]))
    moved = steered(200, (1, 8, 8), told, torch.Generator().manual_seed(0))
    shares = [
        float(central(part.images_NCHW).argmax(dim=1).double().mean()) for part in (plain, moved)
    ]
    assert shares[0] < 0.25
    assert shares[1] > 2 * shares[0]


@pytest.mark.parametrize("ensemble", ["mean", "mean-probability"])
def test_the_exact_gradient_is_autograds(ensemble: str) -> None:
    """Of ensembles that torch can differentiate by itself."""
    settings = from_run_config(
        {
            **dict.fromkeys(("num-train-images", "num-test-images"), 200),
            **{"num-clients": 3, "local-rounds": 1, "min-local-steps": 4, "ensemble": ensemble},
            **{"generator-width": 4, "answer-temperature": 2.0},
        }
    )
    clients = FixedClients(settings, None)
    server = build_server(
        settings,
        build_central(settings),
        build_generator(settings),
        num_rounds=1,
        device=torch.device("cpu"),
    )
    batch = generate(server, 6, torch.Generator().manual_seed(0))
    x_NCHW = batch.x_NCHW.detach().requires_grad_()
    white = zeroth_order_value.WhiteBox(server, clients)
    (found,) = torch.autograd.grad(white.loss(x_NCHW, batch.z_ND, batch.y_N), x_NCHW)
    examples = clients.num_examples
    shares = [examples[p] / sum(examples.values()) for p in clients.models]
    logits = [model(x_NCHW) for model in clients.models.values()]
    if ensemble == "mean-probability":
        logits = [(logits_NK / 2.0).softmax(dim=1) for logits_NK in logits]
    together = sum(share * logits_NK for share, logits_NK in zip(shares, logits, strict=True))
    assert isinstance(together, torch.Tensor)
    if ensemble == "mean-probability":
        together = together.log()
    terms = server.objective(x_NCHW, batch.z_ND, batch.y_N, together, server.central(x_NCHW))
    (wanted,) = torch.autograd.grad(terms["total"], x_NCHW)
    assert float(wanted.abs().max()) > 1e-6
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.slow
def test_central_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Queries are those of the budget, a finished run is not run again, rows differ by name."""
    kept, picture = tmp_path / "kept.json", tmp_path / "accuracy.png"
    arguments = [
        *TINY.split(),
        *("--budget", "90", "--seed", "0", "1", "--json", str(kept), "--plot", str(picture)),
        *("--recipe", "paper", "efficient", "no evolution", "local only"),
    ]
    central_accuracy.main(arguments)
    first = capsys.readouterr().out
    runs = json.loads(kept.read_text())
    assert len(runs) == 8
    last = {(run["row"], run["seed"]): run["points"][-1] for run in runs}
    # 20 images in 6 copies are above the budget, yet there is a round.
    assert last["paper", 0]["queries"] == 120
    assert last["no evolution", 1]["queries"] == 80
    assert last["local only", 0]["central"] is None
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = [line for line in first.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert all(" | 2 | " in line for line in table[2:])
    stamp = kept.stat().st_mtime_ns
    central_accuracy.main(arguments)
    again = capsys.readouterr().out
    assert kept.stat().st_mtime_ns == stamp
    assert [line for line in again.splitlines() if line.startswith("|")] == table


def test_trained_clients_are_kept_until_they_distill(tmp_path: Path) -> None:
    """A run is the same with kept clients, and those of a longer one are of use to it."""
    settings = "local-rounds=3 client-distill-rounds=2 candidates=1"
    points = []
    for budget, cache in ((80, None), (60, "kept"), (80, "kept"), (80, "kept")):
        found = tmp_path / f"{len(points)}.json"
        kept = ["--cache", str(tmp_path / cache)] if cache else []
        arguments = [*TINY.split(), *settings.split(), "--json", str(found), *kept]
        central_accuracy.main([*arguments, "--recipe", "efficient", "--budget", str(budget)])
        points.append(json.loads(found.read_text())[0]["points"])
    alone, shorter, longer, again = points
    assert alone == longer == again
    assert longer[0] == shorter[0]
    # The shorter run distills in rounds 2 and 3, so that its third training is its own.
    assert longer[2]["mean_client"] != shorter[2]["mean_client"]
    assert len(list((tmp_path / "kept").iterdir())) == 6


def test_kept_clients_are_those_of_the_same_sampling(tmp_path: Path) -> None:
    """A client's third round is another model if it is the first that it takes part in."""
    points = []
    for fraction, cache in ((1.0, True), (0.5, True), (0.5, False)):
        found = tmp_path / f"{len(points)}.json"
        kept = ["--cache", str(tmp_path / "kept")] if cache else []
        settings = ["local-rounds=3", "client-distill-steps=0", f"fraction-train={fraction}"]
        arguments = [*TINY.split(), *settings, "--json", str(found), *kept]
        central_accuracy.main([*arguments, "--recipe", "efficient", "--budget", "80"])
        points.append(json.loads(found.read_text())[0]["points"])
    every, half, alone = points
    assert half == alone != every


def kept_run(seed: int, central: float, rounds: int = 2, **settings: object) -> dict[str, Any]:
    points = [
        {"round": round_, "queries": 10 * round_, "central": central, "ensemble": 0.8}
        for round_ in range(1, rounds + 1)
    ]
    return {
        "row": "efficient",
        "alpha": 1.0,
        "seed": seed,
        "local_models": "cnn",
        "rounds": rounds,
        "settings": {"seed": seed, "client-distill-steps": 600, **settings},
        "points": [{**point, "mean_client": 0.5} for point in points],
        "seconds": 60,
    }


def test_unlike_runs_are_not_averaged(tmp_path: Path) -> None:
    """Other lengths and settings have rows of their own; a seed counts once, as measured last."""
    runs = [
        kept_run(0, 0.1),
        kept_run(0, 0.6),
        kept_run(1, 0.8),
        kept_run(0, 0.4, rounds=3),
        kept_run(1, 0.3, **{"client-distill-steps": 0}),
    ]
    rows = [line.split(" | ") for line in central_accuracy.table(runs).splitlines()[2:]]
    assert [(row[0], row[2], row[4]) for row in rows] == [
        ("| efficient, 2 rounds, client-distill-steps=600", "2", "70.0 ± 10.0"),
        ("| efficient, 3 rounds, client-distill-steps=600", "1", "40.0"),
        ("| efficient, 2 rounds, client-distill-steps=0", "1", "30.0"),
    ]
    central_accuracy.draw(runs, tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 0
    alone = central_accuracy.table(runs[:3]).splitlines()
    assert alone[2].startswith("| efficient | 1 | 2 | 20 | 70.0 ± 10.0 |")


@pytest.mark.parametrize(
    "row",
    [
        "paper",
        "efficient",
        "surrogate only",
        "generator too",
        "generator alone",
        "no procedural images",
        "no memory",
    ],
)
def test_as_many_rounds_as_the_budget_is_enough_for(row: str) -> None:
    arguments = central_accuracy.parse([*TINY.split(), "synthetic-batch-size=40", "q=3"])
    settings = central_accuracy.settings_of(arguments, row, 1.0, 0)
    first, second = central_accuracy.run_federation(settings, 2, row)
    for budget, rounds in (
        (first.queries - 1, 1),
        (second.queries - 1, 1),
        (second.queries, 2),
        (3 * first.queries, 3),
    ):
        assert central_accuracy.rounds_within(settings, budget) == rounds


def test_bytes_of_a_round_are_within_the_goals() -> None:
    preset = from_run_config(read_settings(preset_file("cifar10-homo-a1")))
    totals = {row["transport"]: row["total"] for row in byte_rows(preset)}
    assert totals["compact, directions from a seed"] <= 1_750_000
    assert totals["compact, guided directions"] <= 3_400_000
    assert totals["dense"] > 37_000_000


@pytest.mark.slow
def test_cost_of_simulated_rounds(efficient_config: dict[str, Any]) -> None:
    """The ways do the same work: rows are there for each, whatever the seconds are."""
    config = dict(efficient_config)
    del config["output-dir"], config["run-name"]
    rows = list(overhead_rows(config, 2))
    assert [row["way"].split(",")[0] for row in rows] == [
        "one process",
        "2 processes",
        "simulation",
    ]
    assert min(row["over_fastest_loop"] for row in rows[:2]) == 0
    assert set(markdown(rows).splitlines()[1]) == {"|", "-"}
    row = scale_row(config, clients=4, sampled=2, rounds=3)
    assert row["reached"] <= 4
    assert 50 < row["largest_mb_early"] < 5000
    assert min(row["server_mb"], row["worker_mb"]) > 50


def test_memory_is_watched_by_stage() -> None:
    stage = 1
    code = "import time; held = bytearray(200_000_000); print(flush=True); time.sleep(60)"
    with MemoryWatch(lambda: stage) as memory:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        try:
            assert child.stdout is not None
            child.stdout.readline()
            deadline = time.monotonic() + 30
            while memory.at(1) < 200_000_000:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        finally:
            child.communicate(child.kill())
        stage = 2
        time.sleep(1.5)
    assert memory.peak("other") == memory.at(1) == memory.at(1, "other") < 400_000_000
    assert memory.at(1, "worker") == memory.peak("server") == 0
    assert memory.at(2) < 200_000_000


@pytest.mark.slow
def test_processes_and_one_process_give_the_same_answers(tiny_config: dict[str, Any]) -> None:
    settings = from_run_config(tiny_config)
    levels = np.random.default_rng(0).integers(256, size=(6, 1, 8, 8), dtype=np.uint8)
    question = Question.unperturbed(levels)
    here = LocalClients(settings)
    with parallel_clients(settings, 2) as there:
        assert there.num_examples == here.num_examples
        for round_ in (1, 2):
            answers = [
                clients.ask(round_, (0, 1, 2), question, to_distill=False)
                for clients in (here, there)
            ]
            for partition in range(3):
                one, other = (found[partition] for found in answers)
                assert np.array_equal(one.logits_BK, other.logits_BK)


def test_clients_of_a_benchmark_undo_what_those_of_a_run_would(
    efficient_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Else its figures are of distillations that no owner allows."""
    more = {"local-epochs": 8, "client-distill-steps": 100, "client-rehearsal": False}
    settings = from_run_config({**efficient_config, "num-train-images": 900, **more})
    clients = LocalClients(settings)
    clients.train(1, (0,))
    asked = load_split(settings.data, "test").take(np.arange(60))
    question = Question.unperturbed(asked.images_NCHW)

    def distilled(shift: int) -> bool:
        before = {name: value.copy() for name, value in clients._boxes[0].state().items()}
        rows = np.eye(10, dtype=np.float32)[(asked.labels_N + shift) % 10]
        targets = Targets.on(question, 1, 20 * rows - 10, 1.5)
        assert clients.distill(1, (0,), targets)[0] > 0
        after = clients._boxes[0].state()
        return any(not np.array_equal(after[name], value) for name, value in before.items())

    assert not distilled(1)
    assert "distillation of client 0 was undone" in capsys.readouterr().out
    assert distilled(0)


@pytest.mark.slow
def test_an_estimate_takes_little_memory() -> None:
    """Of the paper's estimator and of the default one; each in a process of its own."""
    config = {"dataset": "cifar10", "synthetic-batch-size": 300, "q": 3, "client-device": "cpu"}
    for estimator in ("guided", "batch-difference"):
        settings = from_run_config({**config, "estimator": estimator})
        (row, *_) = memory_rows(settings, estimators=(estimator,), centrals=("cnn",))
        # All pairs of images would take 300·300·3072 float32: 1.1 GB.
        assert 0 < row["extra_mb"] < 200


@pytest.mark.parametrize(
    ("content", "message"),
    [("[", "not what a benchmark has kept"), ("{}", "not what this benchmark"), ("<html>", "HTML")],
)
def test_what_a_user_can_mend_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    assert kept_in(path, list) == []
    path.write_text(content)
    with pytest.raises(SystemExit, match=f"^error: {path}: .*{message}"):
        told(lambda: kept_in(path, list))


def test_run_table_of_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run_table", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"^error: .* is not the folder of a run"):
        told(run_table.main)
