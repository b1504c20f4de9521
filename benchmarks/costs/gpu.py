"""Seconds and GPU memory of simulated rounds in which clients share one GPU."""

from __future__ import annotations

import pickle
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.costs.simulated import Rows, simulate
from benchmarks.costs.watch import Watch
from fedzge_flwr.launch.simulate import Resources

Row = dict[str, Any]

_EVERY_S = 0.25
_CIFAR_FOLDER = "cifar-10-batches-py"
_IMAGES_A_FILE = 10_000


def gpu_row(config: Mapping[str, Any], share: float, rounds: int) -> Row:
    """Run a federation on random images of CIFAR-10's shape and number.

    Parameters
    ----------
    config : Mapping
        Settings of the run; the data set is replaced.
    share : float
        Part of the GPU that each client is granted, in (0, 1]; so many clients run at once.
    rounds : int
        Rounds, at least 2: the first, in which workers start, is not counted.
    """
    with TemporaryDirectory(prefix="gpu-") as folder:
        write_random_cifar10(Path(folder))
        more = {"dataset": "cifar10", "data-dir": folder}
        rows, watched = simulate(
            {**config, **more},
            rounds,
            GpuWatch,
            Resources(num_gpus=share),
        )
    later = rows[1:]
    row: Row = {
        "share_of_the_gpu": share,
        "rounds": rounds,
        "seconds_a_round": statistics.fmean(row["seconds"] for row in later),
        "first_round": rows[0]["seconds"],
        "seconds_by_phase": {
            name: statistics.fmean(row["phase_seconds"][name] for row in later)
            for name in later[0]["phase_seconds"]
        },
    }
    return row | watched.figures()


def visible_gpu() -> str:
    """Return the GPU's name and memory as its driver tells them; empty without a GPU."""
    return _ask("--query-gpu=name,memory.total")


def write_random_cifar10(folder: Path) -> None:
    """Write noise and random labels as the files of CIFAR-10: 50,000 and 10,000 images."""
    (folder / _CIFAR_FOLDER).mkdir(parents=True)
    stream = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        content = {
            "data": stream.integers(0, 256, (_IMAGES_A_FILE, 3 * 32 * 32), dtype=np.uint8),
            "labels": stream.integers(0, 10, _IMAGES_A_FILE).tolist(),
        }
        (folder / _CIFAR_FOLDER / name).write_bytes(pickle.dumps(content))
    names = {"label_names": [f"class {number}" for number in range(10)]}
    (folder / _CIFAR_FOLDER / "batches.meta").write_bytes(pickle.dumps(names))


class GpuWatch(Watch):
    """Samples the GPU's memory as its driver tells it (``nvidia-smi``).

    Parameters
    ----------
    rows : Rows
        Tells the round that is going on; the first is not counted.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__(_EVERY_S)
        self._rows = rows
        self._totals: list[float] = []
        self._largest: list[float] = []
        self._processes: list[int] = []

    def sample(self) -> None:
        """Look once at the GPU and the processes on it."""
        total = _ask("--query-gpu=memory.used")
        by_process = _ask("--query-compute-apps=used_memory")
        if self._rows.current_round() > 1:
            self._totals += _numbers(total)
            self._largest += [max(_numbers(by_process), default=0.0)]
            self._processes += [len(by_process.split())]

    def figures(self) -> Row:
        """Return the most memory in use, in MB, altogether and by one process, and how many ran."""
        return {
            "gpu": visible_gpu(),
            "gpu_mb_peak": max(self._totals, default=0.0),
            "largest_process_mb": max(self._largest, default=0.0),
            "processes": max(self._processes, default=0),
        }


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split() if word.replace(".", "").isdigit()]


def _ask(query: str) -> str:
    try:
        asked = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout.strip()


def gpu_rows(presets: Mapping[str, Mapping[str, Any]], share: float, rounds: int) -> Iterator[Row]:
    """Yield a row for each of some settings, by name."""
    for name, config in presets.items():
        row = {"preset": name, **gpu_row(config, share, rounds)}
        print(f"  {row}", file=sys.stderr, flush=True)
        yield row
