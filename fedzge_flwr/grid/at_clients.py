"""The central model on the clients' own data, by the evaluation that their app has already."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

LOGGER = logging.getLogger("flwr.fedzge")

_ACCURACIES = ("accuracy", "eval_acc", "eval_accuracy", "acc", "test_accuracy", "val_accuracy")
_LOSSES = ("loss", "eval_loss", "test_loss", "val_loss")


def evaluate_at_clients(
    grid: Grid,
    strategy: Strategy | None = None,
    config: ConfigRecord | None = None,
    timeout: float = 3600.0,
) -> Callable[[int, ArrayRecord], MetricRecord | None]:
    """Return an ``evaluate_fn`` that sends the central model to the clients' ``@app.evaluate``.

    Clients get the central model then, and tell what they measure on their data.

    Parameters
    ----------
    grid : Grid
        Flower's grid.
    strategy : Strategy, optional
        Whose evaluation it is: who is asked, what with, and how metrics are averaged. By default
        `flwr.serverapp.strategy.FedAvg` with all clients, by their "num-examples".
    config : ConfigRecord, optional
        What clients get as "config".
    timeout : float
        Seconds to wait for them.

    Returns
    -------
    Callable[[int, ArrayRecord], MetricRecord | None]
        For `FedZGE.start`. Its metrics are the clients', and "accuracy" and "loss" are those of
        them that are called so, or "eval_acc", "eval_loss" and the like. None: nobody answered.
    """
    whose = strategy or FedAvg(fraction_evaluate=1.0, min_evaluate_nodes=1, min_available_nodes=1)

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        given = ConfigRecord(dict(config or {}))
        messages = whose.configure_evaluate(round_, arrays, given, grid)
        replies = grid.send_and_receive(messages, timeout=timeout)
        found = whose.aggregate_evaluate(round_, replies)
        if found is None:
            LOGGER.warning("round %d: no client evaluated the central model", round_)
            return None
        metrics = MetricRecord(dict(found))
        for name, known in (("accuracy", _ACCURACIES), ("loss", _LOSSES)):
            if (value := _first(found, known)) is not None:
                metrics[name] = value
        return metrics

    return evaluate


def _first(metrics: MetricRecord, names: Sequence[str]) -> float | None:
    for name in names:
        value = metrics.get(name)
        if isinstance(value, (int, float)):
            return float(value)
    return None
