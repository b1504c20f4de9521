"""One client of ten that answers garbage, or lies, and claims to have almost all of the data.

``python -m tests.server.test_robustness --ensemble median known-contrasts`` prints what other ways
to combine answers make of it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedzge_flwr.black_boxes.contract import (
    ClientEvaluation,
    ClientProfile,
    EvaluationSplit,
    FitReport,
)
from fedzge_flwr.black_boxes.node import torch_black_box
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.client.endpoints import register_endpoints
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import FedZGEError
from fedzge_flwr.common.text import percent
from fedzge_flwr.learning.models.catalogue import MODELS
from fedzge_flwr.wire.messages import LARGEST_LOGIT
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.running import rows_of, run_server
from tests.helpers.small_models import mlp

CULPRIT = 7
CLAIM = 10**9
SEEDS = (0, 1)
LARGEST_LOSS = 1e30

CONFIG: dict[str, Any] = {
    "num-clients": 10,
    "num-server-rounds": 6,
    "local-models": "mlp",
    "central-model": "mlp",
    "synthetic-batch-size": 2000,
    "generator-share": 0.05,
    "image-sources": "bred:0.5,procedural:0.15",
    "central-distill-steps": 300,
    "client-distill-steps": 0,
    "eval-every": 6,
    "server-threads": 1,
}


def random(honest: FloatArray, stream: np.random.Generator) -> FloatArray:
    return (20 * stream.normal(size=honest.shape)).astype(np.float32)


def huge(honest: FloatArray, stream: np.random.Generator) -> FloatArray:
    signs = stream.random(honest.shape) < 0.5
    return np.where(signs, -LARGEST_LOGIT, LARGEST_LOGIT).astype(np.float32)


def constant(honest: FloatArray, stream: np.random.Generator) -> FloatArray:
    return np.tile(np.eye(honest.shape[1], dtype=np.float32)[3] * 50, (len(honest), 1))


def not_a_number(honest: FloatArray, stream: np.random.Generator) -> FloatArray:
    return np.full(honest.shape, np.nan, dtype=np.float32)


def one_class_for_another(honest: FloatArray, stream: np.random.Generator) -> FloatArray:
    """Be sure of a 7 wherever it is a 1, and honest elsewhere."""
    told, ones = honest.copy(), honest.argmax(axis=1) == 1
    told[ones, 1], told[ones, 7] = -50.0, 50.0
    return told


GARBAGE: dict[str, Callable[[FloatArray, np.random.Generator], FloatArray]] = {
    "random": random,
    "huge": huge,
    "constant": constant,
    "NaN": not_a_number,
    "7 for 1": one_class_for_another,
}


class Liar:
    """A black box in front of a real one: it answers garbage and claims examples without end."""

    def __init__(self, box: TorchBlackBox, kind: str) -> None:
        self._box, self._kind = box, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._box, name)

    def _garbage(self, honest: FloatArray) -> FloatArray:
        # Not the same in every message, and the same again when a test is.
        return GARBAGE[self._kind](honest, np.random.default_rng(len(honest)))

    def profile(self) -> ClientProfile:
        return replace(self._box.profile(), num_examples=CLAIM)

    def fit(self, round_: int) -> FitReport:
        return FitReport(num_examples=CLAIM, loss=LARGEST_LOSS)

    def logits(self, images_NCHW: FloatArray) -> FloatArray:
        return self._garbage(self._box.logits(images_NCHW))

    def evaluate(self, split: EvaluationSplit) -> ClientEvaluation:
        honest = self._box.evaluate(split).logits_NK
        return ClientEvaluation(len(honest), LARGEST_LOSS, 1.0, self._garbage(honest))


def app_with_a_liar(kind: str) -> Callable[[Message, Context], Message]:
    """The real ClientApp, but for one node."""
    import client_app

    lying = ClientApp()
    register_endpoints(lying, lambda context: Liar(torch_black_box(context), kind))  # type: ignore[arg-type, return-value]

    def app(message: Message, context: Context) -> Message:
        culprit = context.node_config["partition-id"] == CULPRIT
        return (lying if culprit else client_app.app)(message, context)

    return app


def run(
    ensemble: str, kind: str | None, seed: int, folder: Path, **more: Any
) -> list[dict[str, Any]]:
    """Run a federation with a liar of a kind, or without; return its rounds' rows."""
    import client_app

    config = {
        **CONFIG,
        "ensemble": ensemble,
        "seed": seed,
        "output-dir": str(folder),
        "run-name": f"{ensemble}-{str(kind).replace(' ', '-')}-{seed}",
        **more,
    }
    app = client_app.app if kind is None else app_with_a_liar(kind)
    return rows_of(run_server(InProcessGrid(app, config, 10), config))  # type: ignore[arg-type]


def mean_accuracy(ensemble: str, kind: str | None, folder: Path) -> float:
    rows = [run(ensemble, kind, seed, folder)[-1] for seed in SEEDS]
    return float(np.mean([row["central_accuracy"] for row in rows]))


@pytest.fixture(scope="module", params=["robust-contrasts", "trimmed-mean"])
def clean(
    request: pytest.FixtureRequest, models: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, float]:
    """An ensemble, and the central model's accuracy if all are honest."""
    ensemble: str = request.param
    accuracy = mean_accuracy(ensemble, None, tmp_path_factory.mktemp("clean"))
    assert accuracy > 0.8
    return ensemble, accuracy


@pytest.mark.faults
@pytest.mark.parametrize("kind", GARBAGE)
def test_a_robust_ensemble_bears_a_liar(
    kind: str, clean: tuple[str, float], tmp_path: Path
) -> None:
    """Within two points of the clean runs, in the mean over the same seeds."""
    ensemble, accuracy = clean
    assert mean_accuracy(ensemble, kind, tmp_path) > accuracy - 0.02


@pytest.mark.faults
@pytest.mark.usefixtures("models")
@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("ensemble", ["robust-contrasts", "trimmed-mean"])
def test_a_run_with_a_liar_ends_well(
    ensemble: str, kind: str, efficient_config: dict[str, Any], tmp_path: Path
) -> None:
    """Nothing overflows, since warnings are errors; who answers NaN counts as missing."""
    config = {
        **efficient_config,
        "num-clients": 10,
        "num-train-images": 300,
        "client-distill-rounds": 0,
        "eval-every": 1,
    }
    rows = run(ensemble, kind, 0, tmp_path, **config)
    assert len(rows) == 2
    for row in rows:
        assert all(np.isfinite(loss) for loss in row["loss"].values())
        assert np.isfinite(row["central_loss"])
        present = CULPRIT in row["participants"]
        assert present == (kind != "NaN")
        assert (CULPRIT in row["unmoved"]) == (kind == "constant")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ensemble", nargs="+", default=["robust-contrasts"])
    parser.add_argument("--kind", nargs="+", default=["none", *GARBAGE])
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--model", default="mlp")
    given = parser.parse_args()
    MODELS["mlp"] = mlp
    more = {"local-models": given.model, "central-model": given.model}
    with tempfile.TemporaryDirectory() as folder:
        for ensemble in given.ensemble:
            for seed in given.seed:
                for kind in given.kind:
                    print(f"{ensemble}, seed {seed}, {kind}:", end=" ", flush=True)
                    try:
                        liar = None if kind == "none" else kind
                        rows = run(ensemble, liar, seed, Path(folder), **more)
                    except FedZGEError as error:
                        print(error, flush=True)
                    else:
                        figures = (rows[-1][f"{part}_accuracy"] for part in ("central", "ensemble"))
                        print(", ".join(percent(figure) for figure in figures), flush=True)


if __name__ == "__main__":
    main()
