"""What zeroth-order queries are worth: central models by source of images, at equal labels.

``python -m benchmarks.zeroth_order_value --dataset digits --json FILE --cache FOLDER`` trains each
client in its training rounds once, keeps it in FOLDER, and then runs the server alone over these
fixed clients, in this process on one thread: a row takes minutes. ``--exchanges K`` has the same
images and steps in K times as many rounds. Rows whose name ends in "exact" train the generator by
the gradient through the clients' models, which no run can: what it cannot buy, no estimate will.
"Steered patterns" are searched by the central model's gradient instead of by queries.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.central_accuracy import overrides_of
from benchmarks.fixed_clients import FixedClients, run_server
from benchmarks.steered_patterns import Steered
from benchmarks.told import kept_in, run_once, told
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.outputs import logits_of
from fedzge_flwr.learning.tensors import to_numpy
from fedzge_flwr.server.ensemble import ensemble_weights
from fedzge_flwr.server.phases import generate
from fedzge_flwr.server.state import ServerState

_GENERATOR_BATCH = 64
_EXACT_STEPS = 20
_LOGIT_STEP = 0.05


def _sources(text: str, *, generated: float = 0.0) -> dict[str, Any]:
    """Return settings of sources whose shares stay as they are."""
    return {"generator-share": generated, "image-sources": text, "surprise-power": 0.0}


_GENERATED = {**_sources("", generated=1.0), "estimator": "surrogate"}
_BEFORE = _sources("bred:0.5,procedural:0.45", generated=0.05)
_PLAIN = {"random-shifts": False, "random-erasing": False, "min-local-steps": 40}
"""The clients' training of the default before images were moved and covered."""
_STEERED = "steered patterns"

ROWS: dict[str, dict[str, Any]] = {
    "default": {},
    "sources not favoured": {"surprise-power": 0.0},
    "blind": _sources("patterns:1,procedural:1"),
    "generator, bred and procedural": {**_BEFORE, "synthetic-batch-size": 2000},
    "surrogate only": {**_BEFORE, "estimator": "surrogate"},
    "bred and procedural": _sources("bred:0.5,procedural:0.5"),
    "procedural": _sources("procedural:1"),
    "new patterns": _sources("patterns:1"),
    _STEERED: _sources("patterns:0.5,evolved:0.5"),
    "evolved patterns": _sources("patterns:0.5,evolved:0.5"),
    "generated, untrained": {**_GENERATED, "generator-steps": 0},
    "generated, central model's": {**_GENERATED, "generator-steps": _EXACT_STEPS},
    "generated, exact": {**_GENERATED, "generator-steps": 0},
    "plain clients": _PLAIN,
    "plain clients, trained as long": {**_PLAIN, "min-local-steps": 100},
    "clients' images shifted": {"random-erasing": False},
    "clients' images erased": {"random-shifts": False},
}
"""The rows by name, as the settings in which they differ from the default.

"Blind" images owe nothing to any answer. Queries of the generator's estimate are no labels.
"""


@dataclass(frozen=True)
class WhiteBox:
    """The objective's exact gradient through clients and ensemble."""

    server: ServerState
    clients: FixedClients

    def loss(self, x_NCHW: Tensor, z_ND: Tensor, y_N: Tensor) -> Tensor:
        """Return a scalar with the gradient of the objective by the images.

        The ensemble is differentiated by its clients' logits numerically: few numbers an image.
        """
        logits = {p: logits_of(model(x_NCHW)) for p, model in self.clients.models.items()}
        answers = {p: to_numpy(l_NK.detach()) for p, l_NK in logits.items()}
        ensemble_NK = torch.from_numpy(self._combined(answers)).requires_grad_()
        central_NK = logits_of(self.server.central(x_NCHW))
        objective = self.server.objective
        terms = objective(x_NCHW, z_ND, y_N, ensemble_NK, central_NK)
        (by_ensemble_NK,) = torch.autograd.grad(terms["total"], ensemble_NK, retain_graph=True)
        direct = objective(x_NCHW, z_ND, y_N, ensemble_NK.detach(), central_NK)["total"]
        for partition, jacobian_NJK in self._jacobians(answers).items():
            by_client_NJ = torch.einsum("nk,njk->nj", by_ensemble_NK, jacobian_NJK)
            direct = direct + (by_client_NJ * logits[partition]).sum()
        return direct

    def _combined(self, answers: dict[int, FloatArray]) -> FloatArray:
        examples = self.clients.num_examples
        return self.server.combined(answers, ensemble_weights({p: examples[p] for p in answers}))

    def _jacobians(self, answers: dict[int, FloatArray]) -> dict[int, Tensor]:
        """Return ∂e/∂f of each client's logits f, (N, J, K), by central differences."""
        num_images, num_classes = next(iter(answers.values())).shape
        moved: dict[int, list[FloatArray]] = {p: [] for p in answers}
        for partition in answers:
            for j in range(num_classes):
                for step in (_LOGIT_STEP, -_LOGIT_STEP):
                    for p, logits_NK in answers.items():
                        moved[p].append(logits_NK.copy())
                        if p == partition:
                            moved[p][-1][:, j] += step
        found = self._combined({p: np.concatenate(parts) for p, parts in moved.items()})
        shape = (len(answers), num_classes, 2, num_images, num_classes)
        ahead, behind = np.moveaxis(found.astype(np.float64).reshape(shape), 2, 0)
        slopes_PJNK = torch.from_numpy((ahead - behind) / (2 * _LOGIT_STEP)).float()
        return {p: slopes_PJNK[i].transpose(0, 1) for i, p in enumerate(answers)}


def exact_steps(server: ServerState, clients: FixedClients, round_: int) -> None:
    """Train the generator by the exact gradient; these images are no labels."""
    white = WhiteBox(server, clients)
    stream = torch_stream(server.settings.run.seed, Purpose.GENERATOR_STEPS, round_=round_)
    server.central.eval()
    for _ in range(_EXACT_STEPS):
        batch = generate(server, _GENERATOR_BATCH, stream)
        server.generator_optimizer.zero_grad(set_to_none=True)
        white.loss(batch.x_NCHW, batch.z_ND, batch.y_N).backward()
        server.generator_optimizer.step()
    server.central.zero_grad(set_to_none=True)


def run_row(settings: Settings, row: str, cache: Path | None) -> dict[str, Any]:
    """Run the server over fixed clients; return figures in [0, 1]."""
    clients = FixedClients(settings, cache)

    def before_round(server: ServerState, round_: int) -> None:
        if row == _STEERED and round_ == 1:
            server.sources = {**server.sources, "evolved": Steered(server.central)}
        if row.endswith("exact") and round_ > 1:
            exact_steps(server, clients, round_)

    return run_server(settings, clients, before_round)


def settings_of(arguments: argparse.Namespace, row: str, alpha: float, seed: int) -> Settings:
    """Return the settings of a row, its rounds divided into exchanges."""
    given = {
        "dataset": arguments.dataset,
        "data-dir": str(arguments.data_dir),
        "num-clients": arguments.clients,
        "alpha": alpha,
        "seed": seed,
        "server-threads": 1,
        "eval-every": 10**6,
        "client-distill-steps": 0,
        **ROWS[row],
        **overrides_of(arguments.set),
    }
    whole = from_run_config(given)
    times = arguments.exchanges
    return from_run_config(
        {
            **given,
            "num-server-rounds": whole.run.num_server_rounds * times,
            "synthetic-batch-size": max(whole.images.synthetic_batch_size // times, 2),
            "central-distill-steps": max(whole.distillation.central_distill_steps // times, 1),
        }
    )


def table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table, in per cent, with each seed's central accuracy."""
    lines = [
        "| data set | α | row | exchanges | central | by seed | ensemble | worst class | queries |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        key = [run[name] for name in ("dataset", "alpha", "row", "exchanges", "set")]
        groups.setdefault(json.dumps(key), []).append(run)
    for members in groups.values():
        first, central = members[0], [100 * run["central"] for run in members]
        worst = float(np.mean([100 * min(run["recalls"]) for run in members]))
        ensemble = float(np.mean([100 * run["ensemble"] for run in members]))
        lines.append(
            f"| {first['dataset']} | {first['alpha']:g} | {first['row']} | {first['exchanges']} | "
            f"{np.mean(central):.1f} | {', '.join(f'{value:.1f}' for value in central)} | "
            f"{ensemble:.1f} | {worst:.0f} | {first['queries']:,} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir", type=Path, default=Path("~/fedzge-data"))
    parser.add_argument("--row", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    parser.add_argument("--exchanges", type=int, default=1, metavar="K")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--alpha", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings")
    parser.add_argument("--json", type=Path, required=True, help="keep finished rows here")
    parser.add_argument("--cache", type=Path, help="keep trained clients here")
    return parser.parse_args(arguments)


def main(given: list[str] | None = None) -> None:
    """Run what is not yet done, and print the table."""
    arguments = parse(given)
    torch.set_num_threads(1)
    for alpha in arguments.alpha:
        for seed in arguments.seed:
            for row in arguments.row:
                _kept(arguments, row, alpha, seed)
    print(table(kept_in(arguments.json, list)))


def _kept(arguments: argparse.Namespace, row: str, alpha: float, seed: int) -> None:
    """Run a row unless the file has it."""
    key = {
        "dataset": arguments.dataset,
        "alpha": alpha,
        "seed": seed,
        "row": row,
        "exchanges": arguments.exchanges,
        "clients": arguments.clients,
        "set": arguments.set,
    }
    settings = settings_of(arguments, row, alpha, seed)
    run_once(
        arguments.json,
        key,
        lambda: run_row(settings, row, arguments.cache),
    )


if __name__ == "__main__":
    told(main)
