"""What clients that lie do to the central model and to honest clients' models.

``python -m benchmarks.liars --dataset digits --json FILE`` runs whole federations in this process,
one thread: without a liar, and with one client, or two, that lie in each of several ways. It prints
a table and keeps finished runs in FILE: the same command again goes on where it stopped. What
clients learn of their own data does not depend on what others answer, until they distill: with
``--cache FOLDER`` they are trained once for all lies.

A liar answers for class B wherever it takes an image for A. Both are classes of which honest
clients have more than half of the images; among those, the two of which the liar has most
(``--alone``: A is the class of which the liar has the largest share instead).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.central_accuracy import overrides_of
from benchmarks.local_clients import LocalClients
from benchmarks.told import kept_in, run_once, told
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.partition import client_data
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.tensors import to_numpy, to_tensor
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.build import RECIPES, build_central, build_generator, build_server
from fedzge_flwr.server.clients import ClientAccuracy, ClientAnswer
from fedzge_flwr.server.ensemble import (
    ENSEMBLES,
    Answers,
    ensemble_weights,
    update_tendencies,
)
from fedzge_flwr.server.phases import run_round
from fedzge_flwr.server.state import ServerState
from fedzge_flwr.synthesis.procedural import procedural_images

CLAIM = 10**9
"""Examples that a liar says it has."""

_SHIFTS = (1.0, 2.0, 4.0, 8.0, 16.0, 50.0)


@dataclass(frozen=True)
class Lie:
    """What a liar wants and has: honest logits (N, K), classes A and B, and a view of the others.

    ``moved`` is an adaptive liar's: from its logits to the ensemble's preference of B over A, (N,).
    """

    logits_NK: FloatArray
    a: int
    b: int
    stream: np.random.Generator
    moved: Callable[[FloatArray], npt.NDArray[np.float64]]

    @property
    def taken_for_a_N(self) -> npt.NDArray[np.bool_]:
        """Which images the liar's own model takes for class A."""
        return self.logits_NK.argmax(axis=1) == self.a


def _b_for_a(lie: Lie, high: float) -> FloatArray:
    told = lie.logits_NK.copy()
    told[lie.taken_for_a_N, lie.b] = high
    told[lie.taken_for_a_N, lie.a] = -high
    return told


def _random(lie: Lie) -> FloatArray:
    return (20 * lie.stream.normal(size=lie.logits_NK.shape)).astype(np.float32)


def _adaptive(lie: Lie) -> FloatArray:
    """Know all other answers and the ensemble, and say, image by image, what moves it most."""
    best, most = lie.logits_NK.copy(), lie.moved(lie.logits_NK)
    for shift in _SHIFTS:
        told = lie.logits_NK.copy()
        # Towards B from where A is, as much as the ensemble believes.
        told[:, lie.b] = lie.logits_NK[:, lie.a] + shift / 2
        told[:, lie.a] -= shift / 2
        moved = lie.moved(told)
        better = lie.taken_for_a_N & (moved > most)
        best[better], most[better] = told[better], moved[better]
    return best


LIES: dict[str, Callable[[Lie], FloatArray]] = {
    "50": lambda lie: _b_for_a(lie, 50.0),
    "million": lambda lie: _b_for_a(lie, 1e6),
    "random": _random,
    "rotated": lambda lie: np.roll(lie.logits_NK, 1, axis=1),
    "adaptive": _adaptive,
}


ABSENT = "absent"


class LyingClients(LocalClients):
    """`LocalClients` of which some lie; trained models are kept on disk.

    Parameters
    ----------
    settings : Settings
        The run's.
    server : ServerState
        What an adaptive liar knows of the server.
    lie : str, optional
        One of `LIES`, or `ABSENT`: liars do not answer; None: nobody lies.
    liars : Sequence[int]
        Who does.
    a, b : int
        The class that they turn into another, and that other.
    cache : Path, optional
        Where trained models are kept.
    """

    def __init__(
        self,
        settings: Settings,
        server: ServerState,
        lie: str | None,
        liars: Sequence[int],
        a: int,
        b: int,
        cache: Path | None,
    ) -> None:
        super().__init__(settings, cache)
        self._server, self._lie, self._liars = server, lie, tuple(liars if lie else ())
        self._a, self._b = a, b
        if lie not in (None, ABSENT):
            self._num_examples |= dict.fromkeys(self._liars, CLAIM)

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Train each client and return its logits, or its lies."""
        answers = super().ask(round_, partitions, question, to_distill=to_distill)
        told = self._told({p: answer.logits_BK for p, answer in answers.items()}, round_)
        return {p: ClientAnswer(told[p], answers[p].train_loss) for p in told}

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str, num_logits: int
    ) -> dict[int, ClientAccuracy]:
        """Evaluate each client; liars lie about test images too."""
        outcomes = super().evaluate(round_, partitions, split, num_logits)
        told = self._told({p: outcome.logits_MK for p, outcome in outcomes.items()}, round_)
        return {
            p: ClientAccuracy(outcomes[p].num_examples, outcomes[p].accuracy, logits_MK)
            for p, logits_MK in told.items()
        }

    def _told(self, logits: Mapping[int, FloatArray], round_: int) -> dict[int, FloatArray]:
        if self._lie == ABSENT:
            return {p: logits_BK for p, logits_BK in logits.items() if p not in self._liars}
        told = dict(logits)
        weights = ensemble_weights({p: self._num_examples[p] for p in logits})
        for liar in self._liars:

            def moved(mine: FloatArray, liar: int = liar) -> npt.NDArray[np.float64]:
                seen = {**told, liar: mine}
                uniform = np.full(mine.shape[1], 1 / mine.shape[1])
                tendencies = {p: self._server.tendencies.get(p, uniform) for p in seen}
                temperature = self._server.settings.queries.answer_temperature
                found = self._server.combine(Answers(seen, weights, tendencies, temperature))
                return np.asarray(found[:, self._b] - found[:, self._a], dtype=np.float64)

            stream = np.random.default_rng((round_, liar))
            told[liar] = LIES[self._lie or ""](Lie(logits[liar], self._a, self._b, stream, moved))
        return told

    def accuracies(self) -> dict[int, float]:
        """Return the test accuracies of the clients' own models, by partition."""
        return {p: box.evaluate("test").accuracy for p, box in enumerate(self._boxes)}


def roles(settings: Settings, num_liars: int, *, alone: bool) -> tuple[tuple[int, ...], int, int]:
    """Return the liars, those with the median number of images, and the classes A and B."""
    run, spec = settings.run, settings.data.spec
    counts_MK = np.stack(
        [
            np.bincount(
                client_data(
                    settings.data, run.num_clients, run.seed, p, hold_out=False
                ).train.labels_N,
                minlength=spec.num_classes,
            )
            for p in range(run.num_clients)
        ]
    )
    by_size = np.argsort(counts_MK.sum(axis=1), kind="stable")
    middle = (run.num_clients - num_liars) // 2
    liars = tuple(sorted(int(p) for p in by_size[middle : middle + num_liars]))
    theirs_K, all_K = counts_MK[list(liars)].sum(axis=0), counts_MK.sum(axis=0)
    if alone:
        share_K = theirs_K / np.maximum(all_K, 1)
        a = int(share_K.argmax())
        return liars, a, int(np.argsort(np.where(np.arange(len(all_K)) == a, -1, theirs_K))[-1])
    contested_K = np.where(theirs_K < all_K / 2, theirs_K, -1)
    b, a = (int(k) for k in np.argsort(contested_K, kind="stable")[-2:])
    return liars, a, b


def run_one(
    settings: Settings, lie: str | None, num_liars: int, *, alone: bool, cache: Path | None
) -> dict[str, Any]:
    """Run a federation; return figures in [0, 1]."""
    liars, a, b = roles(settings, max(num_liars, 1), alone=alone)
    test = load_split(settings.data, "test")
    rounds = settings.run.num_server_rounds
    server = build_server(
        settings,
        build_central(settings),
        build_generator(settings),
        num_rounds=rounds,
        device=select_device("cpu"),
        num_test_images=len(test.labels_N),
    )
    clients = LyingClients(settings, server, lie, liars, a, b, cache)
    for round_ in range(1, rounds + 1):
        current = run_round(
            RECIPES[settings.run.recipe], server, clients, round_, lambda round_, phase: None
        )
    found_N = to_numpy(predict(server.central, to_tensor(test.images_NCHW), 500)).argmax(axis=1)
    ensemble = current.evaluated.ensemble_logits_MK
    assert ensemble is not None
    of_a_N, accuracies = test.labels_N == a, clients.accuracies()
    return {
        "who": liars,
        "a": a,
        "b": b,
        "central": float((found_N == test.labels_N).mean()),
        "together": float((ensemble.argmax(axis=1) == test.labels_N).mean()),
        "a_to_b": float((found_N[of_a_N] == b).mean()),
        "a_right": float((found_N[of_a_N] == a).mean()),
        "together_a_to_b": float((ensemble.argmax(axis=1)[of_a_N] == b).mean()),
        "worst": min(accuracy for p, accuracy in accuracies.items() if p not in liars),
        "mean_client": float(np.mean(list(accuracies.values()))),
    }


def combine_alone(
    settings: Settings, lie: str | None, num_liars: int, *, alone: bool, cache: Path | None
) -> dict[str, Any]:
    """Train clients, combine what they answer on test images, return figures in [0, 1]."""
    liars, a, b = roles(settings, max(num_liars, 1), alone=alone)
    test = load_split(settings.data, "test")
    server = build_server(
        settings,
        build_central(settings),
        build_generator(settings),
        num_rounds=settings.training.local_rounds,
        device=select_device("cpu"),
    )
    clients = LyingClients(settings, server, lie, liars, a, b, cache)
    partitions = range(settings.run.num_clients)
    images = procedural_images(
        settings.images.synthetic_batch_size,
        settings.data.spec.image_shape,
        torch_stream(settings.run.seed, Purpose.IMAGES),
    )
    levels_NCHW = PIXEL_RANGE.to_uint8(images).numpy()
    for round_ in range(1, settings.training.local_rounds + 1):
        clients.train(round_, partitions)
    question = Question.unperturbed(levels_NCHW)
    replies = clients.ask(settings.training.local_rounds, partitions, question, to_distill=False)
    update_tendencies(server.tendencies, {p: reply.logits_BK for p, reply in replies.items()})
    outcomes = clients.evaluate(settings.training.local_rounds, partitions, "test", 1)
    logits = {p: outcome.logits_MK for p, outcome in outcomes.items()}
    found_N = server.combined(
        logits, ensemble_weights({p: clients.num_examples[p] for p in logits})
    ).argmax(axis=1)
    of_a_N = test.labels_N == a
    return {
        "who": liars,
        "a": a,
        "b": b,
        "together": float((found_N == test.labels_N).mean()),
        "a_to_b": float((found_N[of_a_N] == b).mean()),
        "a_right": float((found_N[of_a_N] == a).mean()),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data-dir", type=Path, default=Path("~/fedzge-data"))
    parser.add_argument("--ensemble", nargs="+", default=["robust-contrasts"], choices=ENSEMBLES)
    parser.add_argument(
        "--lie", nargs="+", default=["none", *LIES], choices=["none", ABSENT, *LIES]
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--liars", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="A: a class that few others know")
    parser.add_argument("--alpha", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--answers-alone", action="store_true", help="train no central model")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more settings")
    parser.add_argument("--json", type=Path, required=True, help="keep finished runs here")
    parser.add_argument("--cache", type=Path, help="keep trained models here")
    return parser.parse_args(arguments)


def main(given: list[str] | None = None) -> None:
    """Run what is not yet done, and print the table."""
    arguments = parse(given)
    torch.set_num_threads(1)
    for seed in arguments.seed:
        for alpha in arguments.alpha:
            for num_clients in arguments.clients:
                for ensemble in arguments.ensemble:
                    for lie in arguments.lie:
                        _kept(arguments, seed, alpha, num_clients, ensemble, lie)
    print(table(kept_in(arguments.json, list)))


def _kept(
    arguments: argparse.Namespace,
    seed: int,
    alpha: float,
    num_clients: int,
    ensemble: str,
    lie: str,
) -> None:
    """Run one federation unless the file has it."""
    key = {
        "dataset": arguments.dataset,
        "set": arguments.set,
        "clients": num_clients,
        "liars": arguments.liars if lie != "none" else 0,
        "alone": arguments.alone,
        "answers": arguments.answers_alone,
        "alpha": alpha,
        "seed": seed,
        "ensemble": ensemble,
        "lie": lie,
    }
    settings = from_run_config(
        {
            "dataset": arguments.dataset,
            "data-dir": str(arguments.data_dir),
            "num-clients": num_clients,
            "alpha": alpha,
            "seed": seed,
            "ensemble": ensemble,
            "server-threads": 1,
            "eval-every": 100,
            **overrides_of(arguments.set),
        }
    )
    num_liars = arguments.liars if lie != "none" else 0
    run_settings = combine_alone if arguments.answers_alone else run_one
    run_once(
        arguments.json,
        key,
        lambda: run_settings(
            settings,
            None if lie == "none" else lie,
            num_liars,
            alone=arguments.alone,
            cache=arguments.cache,
        ),
    )


def table(runs: list[dict[str, Any]]) -> str:
    """Return the runs as a Markdown table, means over seeds in per cent."""
    lines = [
        "| data set | clients | α | ensemble | lie | liars | seeds | central | ensemble | A→B | "
        "A right | worst honest |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("dataset", "clients", "alpha", "ensemble", "lie", "liars", "alone", "answers", "set")
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(json.dumps([run[name] for name in names]), []).append(run)
    for members in groups.values():
        first = members[0]
        cells = [str(first[name]) for name in names[:6]] + [str(len(members))]
        for figure in ("central", "together", "a_to_b", "a_right", "worst"):
            known = [run[figure] for run in members if figure in run]
            cells.append(f"{100 * float(np.mean(known)):.1f}" if known else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    told(main)
