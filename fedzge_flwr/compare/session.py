"""What a method's server is given, and what it has measured of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import nn

from fedzge_flwr.common.text import percent
from fedzge_flwr.compare.local_grid import LocalGrid
from fedzge_flwr.compare.meter import MeteredGrid
from fedzge_flwr.compare.tally import counted, work_of
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.data.evaluation import TestSetEvaluation
from fedzge_flwr.server.build import build_central


@dataclass(frozen=True)
class Point:
    """Where a method stands after a round.

    Parameters
    ----------
    round : int
        From 1.
    central, ensemble, mean_client : float, optional
        Accuracies in [0, 1] on the test set; None for what a method has not.
    queries : int
        Images that each client has been asked about so far.
    down, up : float
        Bytes to and from a client so far, on average, without evaluation.
    """

    round: int
    central: float | None
    ensemble: float | None
    mean_client: float | None
    queries: int
    down: float
    up: float


@dataclass(frozen=True)
class Measured:
    """All that is measured of one run.

    Parameters
    ----------
    points : tuple of Point
        By round; at least one.
    client_steps, client_seconds : float
        Gradient steps and processor seconds of a client, on average, without evaluation.
    server_steps : int
        Gradient steps of the server.
    server_seconds : float
        Processor seconds of the server.
    seconds : float
        Wall time.
    """

    points: tuple[Point, ...]
    client_steps: float
    client_seconds: float
    server_steps: int
    server_seconds: float
    seconds: float


@dataclass
class Session:
    """One run of a method, at the server.

    Parameters
    ----------
    settings : Settings
        The run's, with the method's own keys.
    grid : MeteredGrid
        Reaches the clients.
    evaluation : TestSetEvaluation
        Scores the central model on the common test set.
    told : Callable[[str], None]
        Takes a line for each round that was evaluated.
    """

    settings: Settings
    grid: MeteredGrid
    evaluation: TestSetEvaluation
    told: Callable[[str], None]
    points: list[Point] = field(default_factory=list)

    def central_model(self) -> nn.Module:
        """Return the central model of the settings, the same for all methods."""
        return build_central(self.settings)

    def evaluated(self, round_: int) -> bool:
        """Say whether a round is evaluated: every ``eval-every``, and the last."""
        run = self.settings.run
        return round_ % run.eval_every == 0 or round_ == run.num_server_rounds

    def evaluate_fn(self, round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluate a central model and record it, as a strategy's ``evaluate_fn``."""
        if round_ == 0 or not self.evaluated(round_):
            return None
        found = self.evaluation.central(round_, arrays)
        self.record(round_, central=float(found["accuracy"]))  # type: ignore[arg-type]
        return MetricRecord({name: found[name] for name in ("loss", "accuracy")})

    def record(
        self,
        round_: int,
        *,
        central: float | None = None,
        ensemble: float | None = None,
        mean_client: float | None = None,
        queries: int = 0,
    ) -> None:
        """Record accuracies in [0, 1] after a round, and the bytes so far."""
        clients = self.settings.run.num_clients
        down, up = self.grid.down / clients, self.grid.up / clients
        self.points.append(Point(round_, central, ensemble, mean_client, queries, down, up))
        shown = {"central": central, "ensemble": ensemble, "mean client": mean_client}
        figures = ", ".join(f"{n} {percent(v)}" for n, v in shown.items() if v is not None)
        self.told(f"round {round_}/{self.settings.run.num_server_rounds}: {figures}")

    def ask_all(self, action: str, content: RecordDict) -> list[Message]:
        """Send the same to all clients; return their replies, in order of the nodes.

        Raises
        ------
        ComparisonError
            If one fails: a comparison needs all of them.
        """
        nodes = sorted(self.grid.get_node_ids())
        return self.replies(
            [Message(content, dst_node_id=node, message_type=action) for node in nodes]
        )

    def replies(self, messages: Sequence[Message]) -> list[Message]:
        """Send messages; return their replies, in order of the nodes.

        Raises
        ------
        ComparisonError
            If one fails: a comparison needs all of them.
        """
        return list(self.grid.send_and_receive(messages))

    def mean_of(self, action: str, metric: str) -> float:
        """Ask all clients for a metric of their record "metrics"; return its mean."""
        replies = self.ask_all(action, RecordDict())
        values = [reply.content.metric_records["metrics"][metric] for reply in replies]
        return float(sum(values) / len(values))  # type: ignore[arg-type]


def measured(session: Session, run: Callable[[Session], None]) -> Measured:
    """Run a method and measure it."""
    started = time.perf_counter()
    with counted() as here:
        run(session)
    seconds = time.perf_counter() - started
    replies = session.ask_all("query.tally", RecordDict())
    works = [work_of(reply.content.metric_records["tally"]) for reply in replies]
    steps, cpu = sum(work.steps for work in works), sum(work.seconds for work in works)
    evaluating = sum(work.evaluating for work in works)
    # In one process the clients' work was counted with the server's.
    together = session.grid.is_local
    return Measured(
        points=tuple(session.points),
        client_steps=steps / len(works),
        client_seconds=cpu / len(works),
        server_steps=here.steps - (steps if together else 0),
        server_seconds=here.seconds - (cpu + evaluating if together else 0.0),
        seconds=seconds,
    )


def metered(grid: Grid) -> MeteredGrid:
    """Return the grid with a meter."""
    return MeteredGrid(grid, is_local=isinstance(grid, LocalGrid))
