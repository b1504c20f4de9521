"""Seconds and memory of simulated rounds, and seconds of the same work in plain loops."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.costs.memory_watch import MemoryWatch
from benchmarks.costs.parallel_clients import parallel_clients
from benchmarks.local_clients import LocalClients
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.launch.simulate import Resources
from fedzge_flwr.launch.simulate import simulate as launch
from fedzge_flwr.server.build import RECIPES, build_central, build_generator, build_server
from fedzge_flwr.server.clients import Clients
from fedzge_flwr.server.phases import run_round

Row = dict[str, Any]
T = TypeVar("T")

_ROOT = Path(__file__).parent.parent.parent


def overhead_rows(config: Mapping[str, Any], rounds: int) -> Iterator[Row]:
    """Yield mean seconds a round after the first: simulated, and the same work in plain loops.

    Loops run before the simulation and, in reverse, after it: a machine that grows slower or faster
    meanwhile does so for all.
    """
    calls = from_run_config(config).run.participants
    one = from_run_config({**config, "client-threads": 2, "server-threads": 2})
    config = {**config, "client-threads": 1, "server-threads": 2}
    two = from_run_config(config)

    def in_one_process() -> list[float]:
        return looped(one, LocalClients(one), rounds)

    def in_two_processes() -> list[float]:
        with parallel_clients(two, 2) as clients:
            return looped(two, clients, rounds)

    def simulated() -> list[float]:
        rows, _ = simulate(config, rounds, lambda _: nullcontext())
        return [row["seconds"] for row in rows]

    loops = {"one process, 2 threads": in_one_process, "2 processes, 1 thread": in_two_processes}
    ways = {**loops, "simulation, 2 workers of 1 thread": simulated}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for name in (*ways, *reversed(loops)):
        found[name] += ways[name]()[1:]
    means = {name: statistics.fmean(seconds) for name, seconds in found.items()}
    fastest = min(means[name] for name in loops)
    for name, mean in means.items():
        yield {
            "way": name,
            "rounds": len(found[name]),
            "seconds": mean,
            "over_fastest_loop": mean / fastest - 1,
            "seconds_a_call_over_it": (mean - fastest) / calls,
        }


def looped(settings: Settings, clients: Clients, rounds: int) -> list[float]:
    """Run rounds in this process and return their seconds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.run.server_threads)
    server = build_server(
        settings,
        build_central(settings),
        build_generator(settings),
        num_rounds=rounds,
        device=torch.device("cpu"),
    )
    seconds = []
    for round_ in range(1, rounds + 1):
        started = time.perf_counter()
        run_round(RECIPES[settings.run.recipe], server, clients, round_, lambda *_: None)
        seconds.append(time.perf_counter() - started)
        print(f"  round {round_}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    torch.set_num_threads(threads)
    return seconds


class Rows:
    """The rows of a simulation, while it runs and after it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def current_round(self) -> int:
        """Return the number of the round that is going on; 0 before the first row is there."""
        return 1 + self._path.read_text().count("\n") if self._path.exists() else 0

    def all(self) -> list[Row]:
        """Return the rows so far."""
        return [json.loads(line) for line in self._path.read_text().splitlines()]


def simulate(
    config: Mapping[str, Any],
    rounds: int,
    watch: Callable[[Rows], AbstractContextManager[T]],
    resources: Resources = Resources(),  # noqa: B008
) -> tuple[list[Row], T]:
    """Run a real simulation; return its rows, and what watched it."""
    with tempfile.TemporaryDirectory(prefix="cost-") as folder:
        more = {"num-server-rounds": rounds, "output-dir": folder, "run-name": "run"}
        rows = Rows(Path(folder) / "run" / "rounds.jsonl")
        with watch(rows) as watched:
            launch(_ROOT, {**config, **more}, resources)
        return rows.all(), watched


def scale_row(config: Mapping[str, Any], clients: int, sampled: int, rounds: int) -> Row:
    """Run a federation of some clients, of which some take part in each round."""
    rows, memory = simulate(
        {**config, "num-clients": clients, "fraction-train": sampled / clients},
        rounds,
        lambda rows: MemoryWatch(rows.current_round),
    )
    early = min(5, rounds)
    return {
        "clients": clients,
        "sampled": sampled,
        "rounds": rounds,
        "seconds_a_round": statistics.fmean(row["seconds"] for row in rows[1:]),
        "server_mb": memory.peak("server") / 1e6,
        "worker_mb": memory.peak("worker") / 1e6,
        "largest_mb_early": memory.at(early) / 1e6,
        "largest_mb_last": memory.at(rounds) / 1e6,
        "server_mb_early": memory.at(early, "server") / 1e6,
        "server_mb_last": memory.at(rounds, "server") / 1e6,
        "other_mb_last": memory.at(rounds, "other") / 1e6,
        "reached": len({partition for row in rows for partition in row["participants"]}),
    }
