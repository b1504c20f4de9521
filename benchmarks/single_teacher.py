"""One teacher, a budget of images, hard or soft labels: the protocol of black-box distillation.

``python -m benchmarks.single_teacher --data-dir DIR --json FILE --cache FOLDER`` trains a teacher
on all training images once, and then a student of the same architecture on its answers to images
that this package's sources make, as published for data-free black-box distillation (DIP-KD, arXiv
2604.25794: LeNet-5 on Fashion-MNIST, budgets of images, labels that are classes alone). Published
accuracies of Fashion-MNIST with 50,000 images and hard labels: teacher 90.90, DIP-KD 83.98, IDEAL
82.84, ZSDB3 71.60.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.central_accuracy import overrides_of
from benchmarks.fixed_clients import FixedClients, run_server
from benchmarks.told import kept_in, run_once, told
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.models.catalogue import MODELS
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.clients import ClientAnswer

_CERTAIN = 10.0
"""The logit of the class, in hard labels; of the others 0."""


def lenet5(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return LeNet-5 with ReLU and max-pooling, for images of 28 pixels or 32.

    LeCun et al., 1998, "Gradient-based learning applied to document recognition".
    """
    channels, height, _ = image_shape
    side = height + (4 if height == 28 else 0)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=(side - height) // 2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, num_classes),
    )


class Teacher(FixedClients):
    """A client that answers with logits, or with its class alone."""

    def __init__(self, settings: Settings, cache: Path | None, *, hard: bool) -> None:
        super().__init__(settings, cache)
        self._hard = hard

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Answer with logits or with the class."""
        answers = super().ask(round_, partitions, question, to_distill=to_distill)
        if not self._hard:
            return answers
        return {
            p: ClientAnswer(classes_alone(a.logits_BK), a.train_loss) for p, a in answers.items()
        }


def classes_alone(logits_BK: FloatArray) -> FloatArray:
    """Return logits (B, K) that say which class is the likeliest and nothing else."""
    rows = np.eye(logits_BK.shape[1], dtype=np.float32)
    hard_BK: FloatArray = _CERTAIN * rows[logits_BK.argmax(axis=1)]
    return hard_BK


def run_row(settings: Settings, cache: Path | None, *, hard: bool) -> dict[str, Any]:
    """Distill the teacher; return the figures in [0, 1]: the central model is the student."""
    return run_server(settings, Teacher(settings, cache, hard=hard))


def settings_of(arguments: argparse.Namespace, budget: int, seed: int) -> Settings:
    """Return the settings of one budget."""
    given: dict[str, object] = {
        "dataset": arguments.dataset,
        "data-dir": str(arguments.data_dir),
        "partition": "iid",
        "num-clients": 1,
        "seed": seed,
        "local-models": arguments.model,
        "central-model": arguments.model,
        "local-rounds": 1,
        "local-epochs": arguments.epochs,
        "logit-adjustment": False,
        "mixup": False,
        "random-shifts": False,
        "random-erasing": False,
        "ensemble": "mean",
        "server-threads": 1,
        "eval-every": 10**6,
        "client-distill-steps": 0,
        "memory-size": budget,
        "central-distill-steps": arguments.steps,
        **overrides_of(arguments.set),
    }
    rounds = from_run_config(given).run.num_server_rounds
    return from_run_config({**given, "synthetic-batch-size": budget // rounds})


def table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table, in per cent, with each seed's student."""
    lines = [
        "| data set | model | labels | images | student | by seed | teacher | agreement |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        key = [run[name] for name in ("dataset", "model", "labels", "budget", "set")]
        groups.setdefault(json.dumps(key), []).append(run)
    for members in groups.values():
        first, found = members[0], [100 * run["central"] for run in members]
        means = {n: 100 * np.mean([run[n] for run in members]) for n in ("ensemble", "agreement")}
        lines.append(
            f"| {first['dataset']} | {first['model']} | {first['labels']} | {first['queries']:,} | "
            f"{np.mean(found):.1f} | {', '.join(f'{value:.1f}' for value in found)} | "
            f"{means['ensemble']:.1f} | {means['agreement']:.1f} |"
        )
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="fashionmnist")
    parser.add_argument("--data-dir", type=Path, default=Path("~/fedzge-data"))
    parser.add_argument("--model", default="lenet5", help="of teacher and student")
    parser.add_argument("--labels", nargs="+", default=["hard", "soft"], choices=["hard", "soft"])
    parser.add_argument("--budget", type=int, nargs="+", default=[1000, 5000, 20000, 50000])
    parser.add_argument("--epochs", type=int, default=20, help="of the teacher's training")
    parser.add_argument("--steps", type=int, default=600, help="of the student, a round")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings")
    parser.add_argument("--json", type=Path, required=True, help="keep finished rows here")
    parser.add_argument("--cache", type=Path, help="keep the teacher here")
    return parser.parse_args(arguments)


def main(given: list[str] | None = None) -> None:
    """Run what is not yet done, and print the table."""
    arguments = parse(given)
    MODELS.setdefault("lenet5", lenet5)
    torch.set_num_threads(1)
    for seed in arguments.seed:
        for budget in arguments.budget:
            for labels in arguments.labels:
                _kept(arguments, budget, labels, seed)
    print(table(kept_in(arguments.json, list)))


def _kept(arguments: argparse.Namespace, budget: int, labels: str, seed: int) -> None:
    """Run a row unless the file has it."""
    names = ("dataset", "model", "epochs", "steps", "set")
    key = {name: getattr(arguments, name) for name in names}
    settings = settings_of(arguments, budget, seed)
    run_once(
        arguments.json,
        {**key, "budget": budget, "labels": labels, "seed": seed},
        lambda: run_row(settings, arguments.cache, hard=labels == "hard"),
    )


if __name__ == "__main__":
    told(main)
