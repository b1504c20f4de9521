"""Extra peak memory of one estimate at the server; ``python -m benchmarks.costs.memory``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.query.copies import copies_asked
from fedzge_flwr.server.build import build_central, build_generator, build_server
from fedzge_flwr.server.phases import draw_noise, make_objective
from fedzge_flwr.server.round import SyntheticBatch
from fedzge_flwr.zeroth_order.estimators import ESTIMATORS

_ROOT = Path(__file__).parent.parent.parent


def memory_rows(
    settings: Settings,
    estimators: Sequence[str] = tuple(ESTIMATORS),
    centrals: Sequence[str] = ("cnn", "resnet18"),
) -> Iterator[dict[str, Any]]:
    """Yield the extra peak memory of choosing a question and estimating, a process each."""
    for estimator in estimators:
        for central in centrals:
            config = {**settings.to_run_config(), "estimator": estimator, "central-model": central}
            run = subprocess.run(
                [sys.executable, "-m", "benchmarks.costs.memory"],
                input=json.dumps(config),
                capture_output=True,
                text=True,
                check=True,
                cwd=_ROOT,
            )
            yield {"estimator": estimator, "central": central, **json.loads(run.stdout)}


def one_estimate(settings: Settings) -> dict[str, Any]:
    """Measure one question chosen and one estimate, after a small one that loads what it needs.

    The answers are random, and the perturbed copies, which clients make, are not made here.
    """
    spec, num_images = settings.data.spec, settings.images.synthetic_batch_size
    queries = settings.queries
    copies = copies_asked(queries.estimator, queries.q, queries.differences)
    seconds = 0.0
    before = after = 0
    central, generator = build_central(settings), build_generator(settings)
    server = build_server(settings, central, generator, num_rounds=1, device=torch.device("cpu"))
    for size in (8, num_images):
        stream = torch_stream(settings.run.seed, Purpose.LATENT)
        z_ND, y_N = draw_noise(settings, size, stream)
        x_NCHW = torch.rand(size, *spec.image_shape, generator=stream)
        x_NCHW = PIXEL_RANGE.from_uint8(PIXEL_RANGE.to_uint8(x_NCHW))
        batch = SyntheticBatch(z_ND, y_N, x_NCHW)
        logits_BNK = torch.rand(copies, size, spec.num_classes, generator=stream)
        before = _reset_peak()
        started = time.perf_counter()
        objective = make_objective(server, batch)
        question = server.estimator.ask(x_NCHW, stream, objective)
        server.estimator.tell(question, logits_BNK, objective)
        seconds = time.perf_counter() - started
        after = _status("VmHWM")
    return {"extra_mb": (after - before) / 1e3, "seconds": seconds}


def _reset_peak() -> int:
    """Set this process's peak memory to what it holds now, in kB, and return that (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(one_estimate(from_run_config(json.load(sys.stdin)))))
