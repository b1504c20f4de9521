"""How true the estimators' gradients are: cosine and norm against autograd through the clients.

Trains clients in this process, a central model from their answers on procedural images, and, for
each stage of the central model, estimator and kind of image, compares ĝ with ∂L/∂x. Every draw is a
new batch with new directions. Nothing measured here is read by a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fidelity_models import (
    IMAGES,
    Effort,
    Ensemble,
    Images,
    agreement,
    images_for,
    test_images,
    train_central,
    train_ensemble,
)
from benchmarks.told import kept_in, told
from fedzge_flwr.common.files import atomic_write_text
from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import PAPER, preset_file, read_settings
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.numerics import exact_float32, tensor_float32
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.query.copies import Differences, copies_asked
from fedzge_flwr.server.build import build_objective
from fedzge_flwr.server.objective import BatchObjective
from fedzge_flwr.zeroth_order.chain_rule import exact_parts
from fedzge_flwr.zeroth_order.estimators import ESTIMATORS
from fedzge_flwr.zeroth_order.samplers import DIRECTIONS

TF32 = "answers in tf32"
"""Images as they are, but clients whose GPU computes in TF32, which theirs never do in a run."""

FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda images: images,
    "fp16": lambda images: images.half().float(),
    "bf16": lambda images: images.bfloat16().float(),
    "uint8": lambda images: PIXEL_RANGE.from_uint8(PIXEL_RANGE.to_uint8(images)),
    TF32: lambda images: images,
}
"""What becomes of all copies, base and perturbed, on their way to the clients."""


@dataclass(frozen=True)
class Case:
    """One line of the table, but for the images."""

    stage: str
    estimator: str
    q: int = 5
    eps: float = 1e-2
    directions: str = "sphere"
    differences: Differences = "forward"
    shift: int = 1
    format: str = "float32"


def cases() -> dict[str, list[Case]]:
    """Return the default grid, by table."""
    by_estimator = [
        case
        for stage in ("half", "fresh", "trained")
        for case in (
            Case(stage, "batch-difference", eps=1e-3),
            Case(stage, "per-image"),
            Case(stage, "surrogate", shift=0),
            Case(stage, "surrogate"),
            Case(stage, "guided", q=1),
            Case(stage, "guided"),
            # As by default, but for the temperatures and the way to combine.
            Case(stage, "guided", q=2, eps=1e-1, directions="rademacher"),
        )
    ]
    half = Case("half", "guided")
    by_setting = [
        replace(half, estimator="batch-difference", directions="rademacher", eps=1e-3),
        replace(half, estimator="per-image", directions="rademacher"),
        replace(half, estimator="per-image", q=1),
        replace(half, shift=0),
        replace(half, q=2),
        replace(half, q=9),
        replace(half, q=2, differences="central"),
        replace(half, differences="central"),
    ]
    by_step = [
        replace(half, estimator=name, eps=eps, format=format_)
        for name in ("batch-difference", "per-image", "guided")
        for eps in (1e-3, 1e-2, 1e-1)
        for format_ in FORMATS
        if format_ != TF32
    ]
    in_tf32 = [
        replace(half, estimator=name, eps=eps, format=format_)
        for name in ("batch-difference", "per-image", "guided")
        for eps in (1e-3, 1e-2, 1e-1)
        for format_ in ("float32", TF32)
    ]
    return {
        "estimators": by_estimator,
        "settings": by_setting,
        "steps and formats": by_step,
        TF32: in_tf32,
    }


@dataclass(frozen=True)
class Truth:
    """Images with the two parts of their exact gradient: direct, and through the clients."""

    x_NCHW: Tensor
    objective: BatchObjective
    direct_NCHW: Tensor
    clients_NCHW: Tensor


@dataclass(frozen=True)
class Scene:
    """Clients, a central model at one stage, and images to try it on."""

    settings: Settings
    ensemble: Ensemble
    central: nn.Module
    images: Images
    device: torch.device
    truths: dict[tuple[str, int], Truth] = field(default_factory=dict)

    def measure(self, case: Case, kind: str, draw: int) -> dict[str, float]:
        """Estimate one gradient and compare it with the exact one.

        Returns
        -------
        dict[str, float]
            ``cosine`` and ``norm_ratio`` of the whole gradient; ``clients_cosine`` of what only the
            clients know, Jᵀ·∂L/∂e, with the exact direct part taken from the estimate.
        """
        truth = self._truth(kind, draw)
        objective = replace(truth.objective, surrogate_shift=case.shift)
        estimator = ESTIMATORS[case.estimator](
            DIRECTIONS[case.directions], case.q, case.eps, case.differences
        )
        stream = torch_stream(self.settings.run.seed, Purpose.DIRECTIONS, round_=draw)
        with exact_float32():
            question = estimator.ask(truth.x_NCHW, stream, objective)
            images_BCHW = torch.from_numpy(question.images_BCHW).to(self.device)
            asked_BCHW = FORMATS[case.format](images_BCHW)
            answers_BK = self._answers(asked_BCHW, in_tf32=case.format == TF32)
            # All images are perturbed, or none is, in one copy each.
            answers_BNK = answers_BK.unflatten(0, (-1, len(truth.x_NCHW))).clone()
            found = estimator.tell(question, answers_BNK, objective).gradient_NCHW
        exact = truth.direct_NCHW + truth.clients_NCHW
        return {
            "cosine": _cosine(found, exact),
            "clients_cosine": _cosine(found - truth.direct_NCHW, truth.clients_NCHW),
            "norm_ratio": float(found.norm() / exact.norm()),
        }

    def _answers(self, images_BCHW: Tensor, *, in_tf32: bool) -> Tensor:
        if not in_tf32:
            return predict(self.ensemble, images_BCHW, 500)
        with torch.inference_mode(), tensor_float32(allowed=True):
            return torch.cat([self.ensemble(chunk) for chunk in images_BCHW.split(500)])

    def _truth(self, kind: str, draw: int) -> Truth:
        """Return a batch and its exact gradient, the same for all cases."""
        if (kind, draw) not in self.truths:
            batch = self.images.batch(kind, draw)
            objective = BatchObjective(
                self.central,
                batch.z_ND.to(self.device),
                batch.y_N.to(self.device),
                build_objective(self.settings),
                surrogate_shift=0,
                chunk=self.settings.queries.gradient_batch_size,
            )
            x_NCHW = batch.x_NCHW.to(self.device)
            x = x_NCHW.clone().requires_grad_()
            with exact_float32():
                logits_NK = self.ensemble(x)
                parts = exact_parts(objective, x_NCHW, logits_NK)
                (clients,) = torch.autograd.grad(logits_NK, x, parts.by_logits_NK.float())
            self.truths[kind, draw] = Truth(x_NCHW, objective, parts.direct_NCHW, clients.double())
        return self.truths[kind, draw]


def _cosine(first: Tensor, second: Tensor) -> float:
    # Nothing has no direction: an estimate that rounding erased is at right angles to the truth.
    length = first.norm() * second.norm()
    return float((first * second).sum() / length) if length > 0 else 0.0


Row = dict[str, Any]


class Rows:
    """Finished rows, kept in a file if there is one, so that a stopped measurement goes on."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: dict[str, Row] = kept_in(path, dict)

    def get(self, key: Row, make: Callable[[], Row]) -> Row:
        """Return the row of a key, measured if it is not there."""
        name = json.dumps(key, sort_keys=True)
        if name not in self._rows:
            self._rows[name] = make()
            if self._path is not None:
                atomic_write_text(self._path, json.dumps(self._rows, indent=1))
        return {**key, **self._rows[name]}


def summary(draws: list[dict[str, float]]) -> Row:
    """Return mean and standard deviation over draws."""
    result: Row = {"draws": len(draws)}
    for name in draws[0]:
        values = [draw[name] for draw in draws]
        result[name] = statistics.fmean(values)
        result[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else 0.0
    return result


def copies_of(case: Case) -> int:
    """Return the queries per image."""
    return copies_asked(case.estimator, case.q, case.differences)


def markdown(rows: Iterable[Row]) -> str:
    """Return the table: a line a case, its seeds averaged, a column for each kind of image."""
    lines = [
        "| central (agreement) | estimator | q | queries | ε | directions | differences | shift | "
        "format | draws | " + " | ".join(f"{kind} cos" for kind in IMAGES) + " | mean cos | "
        "mean cos, clients' part | norm ratio |",
        "|" + "---|" * 16,
    ]
    by_case: dict[Case, list[Row]] = {}
    for row in rows:
        by_case.setdefault(Case(**row["case"]), []).append(row)
    for case, found in by_case.items():
        agreements = statistics.fmean(row["agreement"] for row in found)
        by_kind = [[row for row in found if row["images"] == kind] for kind in IMAGES]
        by_kind = [kind for kind in by_kind if kind]
        cells = [
            f"{_mean(kind, 'cosine'):.3f} ± {_mean(kind, 'cosine_std'):.3f}" for kind in by_kind
        ]
        cells += ["–"] * (len(IMAGES) - len(cells))
        ratios = [_mean(kind, "norm_ratio") for kind in by_kind]
        lines.append(
            f"| {case.stage} ({agreements:.2f}) | {case.estimator} | {case.q} | {copies_of(case)} "
            f"| {case.eps:g} | {case.directions} | {case.differences} | {case.shift} "
            f"| {case.format} | {found[0]['draws']} | {' | '.join(cells)} "
            f"| {_mean(found, 'cosine'):.3f} | {_mean(found, 'clients_cosine'):.3f} "
            f"| {min(ratios):.2g}–{max(ratios):.2g} |"
        )
    return "\n".join(lines)


def _mean(rows: list[Row], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gradient_fidelity")
    parser.add_argument("--dataset", default="fashionmnist")
    parser.add_argument("--data-dir", default="~/fedzge-data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--draws", type=int, default=20, help="of the first table's half stage")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--cache", type=Path, help="keep models and finished rows in this folder")
    parser.add_argument("--images", type=int, default=200, help="images N a batch")
    parser.add_argument("--train-images", type=int, default=6000)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--local-models", default="cnn", help="as the setting of that name")
    parser.add_argument("--central-model", default="cnn")
    parser.add_argument("--local-epochs", type=int, default=10)
    parser.add_argument("--transfer-images", type=int, default=4000)
    parser.add_argument("--central-steps", type=int, default=400)
    parser.add_argument("--generator-steps", type=int, default=20)
    tables = list(cases())
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=tables,
        default=[name for name in tables if name != TF32],
        help=f"all of them but '{TF32}', which needs a GPU",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    options = parse(arguments)
    if TF32 in options.tables and not options.device.startswith("cuda"):
        raise SystemExit(f"error: --tables '{TF32}' needs a GPU: give --device cuda as well")
    effort = Effort(options.transfer_images, options.central_steps, options.generator_steps)
    cache = options.cache
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
    store = Rows(cache / "rows.json" if cache else None)
    tables: dict[str, list[Row]] = {name: [] for name in options.tables}
    started = time.perf_counter()
    for seed in options.seeds:
        settings = settings_of(options, seed)
        # A name for all that the models depend on: other options never find them.
        digest = sha256(repr((settings, effort)).encode()).hexdigest()[:12]
        folder = cache / digest if cache else None
        ensemble = train_ensemble(settings, folder)
        centrals = train_central(settings, effort, ensemble, folder)
        test = test_images(settings)
        agreements = {name: agreement(model, ensemble, test) for name, model in centrals.items()}
        scenes = {
            name: Scene(
                settings,
                ensemble,
                model,
                images_for(settings, effort, name, model, folder),
                ensemble.device,
            )
            for name, model in centrals.items()
        }
        _say(f"{time.perf_counter() - started:4.0f} s  seed {seed}: agreement {agreements}")
        for table, case, kind in product_of(options.tables):
            draws = num_draws(table, case, options.draws)
            key = {"models": digest, "case": asdict(case), "images": kind, "draws": draws}
            row = store.get(key, partial(measured, scenes[case.stage], case, kind, draws))
            tables[table].append({"seed": seed, "agreement": agreements[case.stage], **row})
            shown = f"{case.stage} {case.estimator} q={case.q} {kind}: {row['cosine']:.3f}"
            _say(f"{time.perf_counter() - started:4.0f} s  {shown}")
    for table, rows in tables.items():
        print(f"\n**{table}**\n\n{markdown(rows)}")
    if options.json is not None:
        found = {"options": {name: str(v) for name, v in vars(options).items()}, "tables": tables}
        atomic_write_text(options.json, json.dumps(found, indent=1) + "\n")


def settings_of(options: argparse.Namespace, seed: int) -> Settings:
    """Return the run whose clients and objective are measured; T and β are the paper's."""
    return from_run_config(
        {
            **read_settings(preset_file(PAPER)),
            "dataset": options.dataset,
            "data-dir": options.data_dir,
            "num-train-images": options.train_images,
            "num-test-images": options.test_images,
            "num-clients": options.clients,
            "alpha": options.alpha,
            "local-models": options.local_models,
            "central-model": options.central_model,
            "local-epochs": options.local_epochs,
            "synthetic-batch-size": options.images,
            "client-device": options.device,
            "server-device": options.device,
            "seed": seed,
        }
    )


def num_draws(table: str, case: Case, draws: int) -> int:
    """Return how often to measure: all draws where estimators are compared, fewer elsewhere."""
    if table in ("estimators", TF32):
        return draws if case.stage == "half" else max(draws // 2, 1)
    return max(draws // (10 if table == "settings" else 20), 1)


def product_of(tables: list[str]) -> Iterator[tuple[str, Case, str]]:
    """Yield every table, case and kind of images, in the order of the tables.

    Steps and formats are tried on what a run asks about only: that spares a fifth of the time.
    """
    for table, grid in cases().items():
        kinds = IMAGES[:2] if table in ("steps and formats", TF32) else IMAGES
        if table in tables:
            yield from ((table, case, kind) for case in grid for kind in kinds)


def measured(scene: Scene, case: Case, kind: str, draws: int) -> Row:
    """Measure one row."""
    return summary([scene.measure(case, kind, draw) for draw in range(1, draws + 1)])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    told(main)
