"""Settings of the runs that follow the deployment guide."""

from __future__ import annotations

from typing import Any

PATIENCE_S = 900.0


SETTINGS: dict[str, Any] = {
    "num-clients": 3,
    "num-server-rounds": 3,
    "num-train-images": 120,
    "num-test-images": 60,
    "synthetic-batch-size": 20,
    "latent-dim": 8,
    "generator-width": 4,
    "generator-share": 1.0,
    "generator-steps": 1,
    "memory-size": 30,
    "min-local-steps": 4,
    "distill-batch-size": 8,
    "central-distill-steps": 2,
    "client-distill-steps": 2,
    "client-distill-lr": 0.001,
    "server-threads": 1,
    "eval-every": 3,
    "client-evaluation": "held-out",
}
