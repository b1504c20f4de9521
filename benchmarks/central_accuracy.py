"""Central, ensemble and client accuracy against queries: paper, efficient, and ablations.

``python -m benchmarks.central_accuracy --dataset fashionmnist --data-dir DIR --json FILE`` runs
whole federations in this process, one thread, without Ray or messages, prints a table, and keeps
finished runs in FILE: the same command again goes on where it stopped. Runs of other settings or
lengths in FILE have rows of their own. A run knows its settings but not the code that made it:
after a change of numbers take another FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from flwr.app import ArrayRecord

from benchmarks.local_clients import LocalClients
from benchmarks.told import kept_in, told
from fedzge_flwr.common.files import atomic_write_text
from fedzge_flwr.common.text import percent
from fedzge_flwr.compare.plan import queries_of_round
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import PAPER, preset_file, read_settings
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.evaluation import TestSetEvaluation
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.observers.recalls import Recalls
from fedzge_flwr.server.build import RECIPES, build_central, build_generator, build_server
from fedzge_flwr.server.phases import run_round

LOCAL_ONLY = "local only"
LOCAL_DEFAULT = "local only, default training"

_GENERATOR = {"generator-share": 0.2}
"""Beside four sources of share 1: nearly a twentieth of the images."""

PRIVATE = {"private, ε = 8": 8.0, "private, ε = 2": 2.0}
"""Rows of clients with differential privacy, by ε; δ = 10⁻⁵."""

ROWS: dict[str, dict[str, object]] = {
    "paper": {"recipe": "paper"},
    "efficient": {},
    "no memory": {"memory-size": 0},
    "no procedural images": {"image-sources": "evolved:1,patterns:1,bred:1"},
    "no search": {"image-sources": "evolved:1,patterns:1,procedural:1"},
    "no evolution": {"image-sources": "patterns:1,bred:1,procedural:1"},
    "no patterns": {"image-sources": "bred:1,procedural:1"},
    "sources not favoured": {"surprise-power": 0.0},
    "generator too": _GENERATOR,
    "generator alone": {"generator-share": 1.0, "image-sources": ""},
    "surrogate only": {**_GENERATOR, "estimator": "surrogate"},
    "per-image estimates": {**_GENERATOR, "estimator": "per-image"},
    "surrogate not shifted": {**_GENERATOR, "surrogate-shift": 0},
    "no free generator steps": {**_GENERATOR, "generator-steps": 0},
    "known contrasts": {"ensemble": "known-contrasts"},
    "mean logits": {"ensemble": "mean"},
    "mean probability": {"ensemble": "mean-probability"},
    "confidence": {"ensemble": "confidence"},
    "class tendency": {"ensemble": "class-tendency"},
    "median": {"ensemble": "median"},
    "trimmed mean": {"ensemble": "trimmed-mean"},
    "no screening": {"candidates": 1},
    "no class balance": {"class-balance": 0.0},
    "no client distillation": {"client-distill-steps": 0},
    "client distillation in every round": {"client-distill-rounds": 0},
    "no logit adjustment": {"logit-adjustment": False},
    "no mixup": {"mixup": False},
    "no shifts": {"random-shifts": False},
    "no erasing": {"random-erasing": False},
    "no shifts, no erasing": {"random-shifts": False, "random-erasing": False},
    "local training in every round": {"local-rounds": 0},
    "no least number of local steps": {"min-local-steps": 0},
    "no rehearsal": {"client-rehearsal": False},
    "answers not softened": {"answer-temperature": 1.0},
    LOCAL_ONLY: {
        "local-rounds": 0,
        "logit-adjustment": False,
        "mixup": False,
        "random-shifts": False,
        "random-erasing": False,
        "min-local-steps": 40,
    },
    LOCAL_DEFAULT: {},
    **{row: {} for row in PRIVATE},
}
"""The runs by name, as the settings in which they differ from the default; of the paper's recipe,
from its preset."""


@dataclass(frozen=True)
class Point:
    """Accuracies in [0, 1] after a round, and the queries that each client has been asked.

    ``worst`` is the lowest recall of a class of the central model, ``worst_ensemble`` the
    ensemble's recall of the same class.
    """

    round: int
    queries: int
    central: float | None
    ensemble: float | None
    mean_client: float
    worst: float | None = None
    worst_ensemble: float | None = None


def rounds_within(settings: Settings, budget: int) -> int:
    """Return the rounds that a budget of queries a client is enough for; at least 1."""
    return max(budget // queries_of_round(settings), 1)


def run_federation(
    settings: Settings,
    num_rounds: int,
    label: str,
    epsilon: float | None = None,
    cache: Path | None = None,
) -> list[Point]:
    """Run one federation; return its accuracies on evaluation rounds.

    ``epsilon`` is its clients' privacy, ``cache`` the folder of their trained models.
    """
    clients = LocalClients(settings, cache, epsilon)
    evaluation = TestSetEvaluation(settings)
    labels_M = evaluation.labels_M
    server = build_server(
        settings,
        build_central(settings),
        build_generator(settings),
        num_rounds=num_rounds,
        device=select_device(settings.run.server_device),
        num_test_images=len(labels_M),
    )
    points: list[Point] = []
    started = time.perf_counter()
    for round_ in range(1, num_rounds + 1):
        current = run_round(
            RECIPES[settings.run.recipe], server, clients, round_, lambda round_, phase: None
        )
        evaluated = current.evaluated
        if evaluated.ensemble_logits_MK is not None:
            metrics = evaluation.central(round_, ArrayRecord(server.central.state_dict()))
            accuracies = [item.accuracy for item in evaluated.accuracies.values()]
            together_MK = evaluated.ensemble_logits_MK
            recalls = Recalls.of(
                labels_M,
                settings.data.spec.num_classes,
                cast("list[int]", metrics["classes"]),
                together_MK,
            )
            pairs = zip(recalls.central_recalls, recalls.ensemble_recalls, strict=True)
            worst = min((c, e) for c, e in pairs if c is not None and e is not None)
            points.append(
                Point(
                    round_,
                    max(server.num_queries.values()),
                    float(str(metrics["accuracy"])),
                    float((together_MK.argmax(axis=1) == labels_M).mean()),
                    float(np.mean(accuracies)),
                    *worst,
                )
            )
        _progress(label, round_, num_rounds, started, points)
    return points


def run_local_only(settings: Settings, num_rounds: int, label: str) -> list[Point]:
    """Train each client alone for as many rounds, without distillation."""
    clients = LocalClients(settings)
    partitions = tuple(clients.num_examples)
    points: list[Point] = []
    started = time.perf_counter()
    for round_ in range(1, num_rounds + 1):
        clients.train(round_, partitions)
        if round_ % settings.run.eval_every == 0 or round_ == num_rounds:
            outcomes = clients.evaluate(round_, partitions, "test", 0)
            mean = float(np.mean([item.accuracy for item in outcomes.values()]))
            points.append(Point(round_, 0, None, None, mean))
        _progress(label, round_, num_rounds, started, points)
    return points


def _progress(
    label: str, round_: int, num_rounds: int, started: float, points: list[Point]
) -> None:
    seconds = time.perf_counter() - started
    left = seconds / round_ * (num_rounds - round_)
    last = points[-1] if points else None
    central = f", central {percent(last.central)}" if last else ""
    print(f"  {label}: round {round_}/{num_rounds}{central}, {left:.0f} s left", flush=True)


def settings_of(arguments: argparse.Namespace, row: str, alpha: float, seed: int) -> Settings:
    """Return the settings of one run; the paper's for what is not given, if that is the recipe."""
    given = {
        "dataset": arguments.dataset,
        "data-dir": str(arguments.data_dir),
        "num-train-images": arguments.train_images,
        "num-test-images": arguments.test_images,
        "num-clients": arguments.clients,
        "alpha": alpha,
        "seed": seed,
        "local-epochs": arguments.local_epochs,
        "local-models": arguments.local_models,
        "server-threads": 1,
        "client-threads": 1,
        "eval-every": arguments.eval_every,
        **overrides_of(arguments.set),
        **ROWS[row],
    }
    paper = read_settings(preset_file(PAPER)) if given.get("recipe") == "paper" else {}
    return from_run_config({**paper, **given})


def overrides_of(pairs: list[str]) -> dict[str, object]:
    """Return settings given as KEY=VALUE; a value that is no JSON is text."""
    overrides: dict[str, object] = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            overrides[key] = json.loads(value)
        except json.JSONDecodeError:
            overrides[key] = value
    return overrides


Runs: TypeAlias = list[dict[str, Any]]


def grouped(runs: Runs) -> list[Runs]:
    """Return the runs in groups that differ in their seed alone, one run a seed, the latest."""
    groups: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        same = {name: value for name, value in run["settings"].items() if name != "seed"}
        key = (run["row"], run["alpha"], run["local_models"], run["rounds"], same)
        groups.setdefault(json.dumps(key, sort_keys=True), {})[run["seed"]] = run
    return [list(members.values()) for members in groups.values()]


def name_of(group: Runs, groups: list[Runs]) -> str:
    """Return the row's name, with the settings that tell it from others of that name."""
    first = group[0]
    name, models = first["row"], first["local_models"]
    parts = [name] if "," not in models else [name, models]
    others = [
        other[0]
        for other in groups
        if all(other[0][key] == first[key] for key in ("row", "alpha", "local_models"))
    ]
    if any(other["rounds"] != first["rounds"] for other in others):
        parts.append(f"{first['rounds']} rounds")
    for key, value in first["settings"].items():
        # The number of rounds is that of the budget, and named already.
        if key not in ("seed", "num-server-rounds"):
            values = [other["settings"].get(key) for other in others]
            parts += [f"{key}={value}"] if any(other != value for other in values) else []
    return ", ".join(parts)


def table(runs: Runs) -> str:
    """Return the runs as a Markdown table, mean ± standard deviation (of n) over their seeds."""
    lines = [
        "| run | α | seeds | queries a client | central | ensemble | central ÷ ensemble | "
        "worst class | ensemble there | mean client | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = grouped(runs)
    for members in groups:
        last = [member["points"][-1] for member in members]
        ratios = [
            point["central"] / point["ensemble"] if point["central"] is not None else None
            for point in last
        ]
        cells = (
            name_of(members, groups),
            f"{members[0]['alpha']:g}",
            str(len(members)),
            f"{max(point['queries'] for point in last):,}",
            _spread([point["central"] for point in last]),
            _spread([point["ensemble"] for point in last]),
            _spread(ratios, 3),
            _spread([point.get("worst") for point in last]),
            _spread([point.get("worst_ensemble") for point in last]),
            _spread([point["mean_client"] for point in last]),
            f"{np.mean([member['seconds'] for member in members]) / 60:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float | None], digits: int = 0) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean, deviation = float(np.mean(known)), float(np.std(known))
    if digits:
        text, spread = f"{mean:.{digits}f}", f"{deviation:.{digits}f}"
    else:
        text, spread = f"{100 * mean:.1f}", f"{100 * deviation:.1f}"
    return text if len(known) == 1 else f"{text} ± {spread}"


def draw(runs: Runs, path: Path) -> None:
    """Draw accuracy against queries as PNG: paper and efficient, a panel for each α.

    Of several groups of runs of one name the latest is drawn.
    """
    from matplotlib.figure import Figure

    from fedzge_flwr.common.files import atomic_path

    alphas = sorted({run["alpha"] for run in runs}, reverse=True)
    figure = Figure(figsize=(5.0 * len(alphas), 4.8), layout="constrained")
    axes_row = figure.subplots(1, len(alphas), squeeze=False, sharey=True)[0]
    colours = {"efficient": "tab:red", "paper": "tab:blue"}
    styles = {"central": "-", "ensemble": "--", "mean_client": ":"}
    for axes, alpha in zip(axes_row, alphas, strict=True):
        for row, colour in colours.items():
            found = [
                group
                for group in grouped(runs)
                if group[0]["row"] == row
                and group[0]["alpha"] == alpha
                and "," not in group[0]["local_models"]
            ]
            members = found[-1] if found else []
            for name, style in styles.items() if members else ():
                points = [[p[name] for p in run["points"]] for run in members]
                mean, deviation = np.mean(points, axis=0), np.std(points, axis=0)
                queries = [p["queries"] for p in members[0]["points"]]
                label = f"{row}: {name.replace('_', ' ')}"
                axes.plot(queries, mean, style, color=colour, label=label)
                axes.fill_between(
                    queries, mean - deviation, mean + deviation, color=colour, alpha=0.15
                )
        axes.set(title=f"Dirichlet α = {alpha:g}", xlabel="queries a client", ylim=(0, 1))
        axes.grid(alpha=0.3)
    axes_row[0].set_ylabel("test accuracy")
    if axes_row[0].get_legend_handles_labels()[0]:
        figure.legend(*axes_row[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="fashionmnist")
    parser.add_argument("--data-dir", type=Path, default=Path("~/fedzge-data"))
    parser.add_argument(
        "--recipe",
        nargs="+",
        default=["paper", "efficient", LOCAL_ONLY],
        choices=[*ROWS, "all"],
        metavar="ROW",
        help=f"all, or some of: {', '.join(ROWS)}",
    )
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--alpha", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--budget", type=int, default=25_000, help="queries a client")
    parser.add_argument("--train-images", type=int, default=6000, help="0: all")
    parser.add_argument("--test-images", type=int, default=2000, help="0: all")
    parser.add_argument("--local-epochs", type=int, default=2, help="the same for all rows")
    parser.add_argument("--local-models", default="cnn", help="one, or one a client, with commas")
    parser.add_argument("--eval-every", type=int, default=5, help="rounds between evaluations")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings")
    parser.add_argument("--json", type=Path, help="keep finished runs here, and go on from it")
    parser.add_argument("--cache", type=Path, help="keep the clients' trained models here")
    parser.add_argument("--plot", type=Path, help="draw accuracy against queries (PNG)")
    parsed = parser.parse_args(arguments)
    if "all" in parsed.recipe:
        parsed.recipe = list(ROWS)
    return parsed


def main(given: list[str] | None = None) -> None:
    """Run what is not yet done, and print the table."""
    arguments = parse(given)
    torch.set_num_threads(1)
    runs = _finished(arguments.json)
    for alpha in arguments.alpha:
        for seed in arguments.seed:
            for row in arguments.recipe:
                _one_run(arguments, row, alpha, seed, runs)
    print(table(runs))
    if arguments.plot:
        draw(runs, arguments.plot)


def _one_run(arguments: argparse.Namespace, row: str, alpha: float, seed: int, runs: Runs) -> None:
    settings = settings_of(arguments, row, alpha, seed)
    num_rounds = rounds_within(settings, arguments.budget)
    key = {
        "row": row,
        "alpha": alpha,
        "seed": seed,
        "local_models": arguments.local_models,
        "rounds": num_rounds,
        # What decides the outcome; where data lie does not.
        "settings": {
            name: value
            for name, value in settings.to_run_config().items()
            if name not in {"data-dir", "output-dir"}
        },
    }
    if any(all(run[name] == value for name, value in key.items()) for run in runs):
        return
    load_split(settings.data, "test")
    label = f"{row}, α = {alpha:g}, seed {seed}"
    started = time.perf_counter()
    if row in (LOCAL_ONLY, LOCAL_DEFAULT):
        found = run_local_only(settings, num_rounds, label)
    else:
        found = run_federation(settings, num_rounds, label, PRIVATE.get(row), arguments.cache)
    points = [asdict(point) for point in found]
    seconds = math.ceil(time.perf_counter() - started)
    # Another process may have finished a run for the same file meanwhile.
    runs[:] = _finished(arguments.json) if arguments.json else runs
    runs.append({**key, "points": points, "seconds": seconds})
    if arguments.json:
        atomic_write_text(arguments.json, json.dumps(runs, indent=1))


def _finished(path: Path | None) -> Runs:
    runs: Runs = kept_in(path, list)
    return runs


if __name__ == "__main__":
    told(main)
