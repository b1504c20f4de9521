"""A federation over a few processes of one machine, without Flower, Ray or messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.managers import BaseManager
from typing import Any, TypeVar

from benchmarks.local_clients import LocalClients
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.query.question import Question
from fedzge_flwr.query.targets import Targets
from fedzge_flwr.server.clients import ClientAccuracy, ClientAnswer

T = TypeVar("T")


class _Manager(BaseManager):
    """Holds a federation in a process of its own."""


_Manager.register("LocalClients", LocalClients)


class ParallelClients:
    """`fedzge_flwr.server.clients.Clients` over P processes; partition p lives in process p mod P.

    Parameters
    ----------
    num_examples : dict[int, int]
        Training examples by partition.
    processes : Sequence[Any]
        Proxies of a `LocalClients` each.
    threads : ThreadPoolExecutor
        As many threads as processes: each waits for one.
    """

    def __init__(
        self, num_examples: dict[int, int], processes: Sequence[Any], threads: ThreadPoolExecutor
    ) -> None:
        self._num_examples = num_examples
        self._processes = processes
        self._threads = threads

    @property
    def num_examples(self) -> dict[int, int]:
        """Training examples by partition."""
        return dict(self._num_examples)

    def _each(
        self, partitions: Sequence[int], call: Callable[[Any, list[int]], dict[int, T]]
    ) -> dict[int, T]:
        count = len(self._processes)
        shares = [[p for p in partitions if p % count == k] for k in range(count)]
        merged: dict[int, T] = {}
        for found in self._threads.map(call, self._processes, shares):
            merged |= found
        return dict(sorted(merged.items()))

    def ask(
        self, round_: int, partitions: Sequence[int], question: Question, *, to_distill: bool
    ) -> dict[int, ClientAnswer]:
        """Train each client and return its logits."""
        return self._each(
            partitions,
            lambda process, share: process.ask(round_, share, question, to_distill=to_distill),
        )

    def distill(self, round_: int, partitions: Sequence[int], targets: Targets) -> dict[int, float]:
        """Have each client distill."""
        return self._each(
            partitions, lambda process, share: process.distill(round_, share, targets)
        )

    def deliver(self, round_: int) -> dict[int, float]:
        """Nothing is ever put off."""
        return {}

    def evaluate(
        self, round_: int, partitions: Sequence[int], split: str, num_logits: int
    ) -> dict[int, ClientAccuracy]:
        """Evaluate each client."""
        return self._each(
            partitions,
            lambda process, share: process.evaluate(round_, share, split, num_logits),
        )


@contextmanager
def parallel_clients(settings: Settings, num_processes: int) -> Iterator[ParallelClients]:
    """Start the processes of a federation, and end them."""
    managers = [_Manager(ctx=get_context("spawn")) for _ in range(num_processes)]
    try:
        for manager in managers:
            manager.start()
        # What a manager registers is made an attribute of it when it is created.
        processes = [manager.LocalClients(settings) for manager in managers]  # type: ignore[attr-defined]
        with ThreadPoolExecutor(num_processes) as threads:
            yield ParallelClients(LocalClients(settings).num_examples, processes, threads)
    finally:
        for manager in managers:
            manager.shutdown()
