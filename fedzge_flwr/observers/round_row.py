"""The row of a round: what a run reports of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fedzge_flwr.common.errors import CheckpointError
from fedzge_flwr.common.file_kinds import reason_of
from fedzge_flwr.common.notices import warn_once
from fedzge_flwr.common.text import percent
from fedzge_flwr.observers.recalls import Recalls
from fedzge_flwr.wire.traffic import MissingReply, RoundAccount, Traffic

# Whoever reads a run's rows, the command line first of all, does without PyTorch.
if TYPE_CHECKING:
    from fedzge_flwr.server.checkpoints import Checkpoint
    from fedzge_flwr.server.round import RoundState
    from fedzge_flwr.server.state import ServerState


@dataclass(frozen=True)
class RoundRow:
    """One round's figures: a row of ``rounds.jsonl``.

    Parameters
    ----------
    round : int
        From 1.
    central_accuracy, central_loss : float, optional
        Of the central model on the test set, evaluation mode; None when not evaluated.
    ensemble_accuracy : float, optional
        Of the participants' combined answers on the test set.
    mean_client_accuracy : float, optional
        Mean over the clients evaluated, after distillation.
    client_accuracy : dict[int, float]
        By partition; of all clients, sampled or not.
    sampled, participants : tuple of int
        Partitions sampled, and those whose answers made the ensemble.
    unmoved : tuple of int
        Those of them whose answers did not change within ε: left out of the zeroth-order estimate.
    missing : tuple of MissingReply
        Who was left out, and why.
    skipped : str, optional
        Why the round ended early.
    queries_per_client : int
        Images that the most-asked client has been asked about since the start, the perturbed ones
        included, those of evaluation not.
    queries : int
        The same, summed over clients.
    bytes_down, bytes_up : int
        Encoded bytes to and from all clients in this round, without evaluation.
    bytes_down_total, bytes_up_total : int
        The same since the start, the hello exchange included.
    evaluation_bytes_down, evaluation_bytes_up : int
        Encoded bytes of this round's evaluation.
    loss : dict[str, float]
        The generator's objective and its terms; mean losses of training and distillation.
    seconds : float
        Wall time of the round, evaluation included.
    client_bytes : dict[int, Traffic]
        ``bytes_down`` and ``bytes_up`` by partition and by what they are for.
    phase_seconds : dict[str, float]
        Wall time by phase.
    answer_classes : tuple of int
        The round's images, counted by the class that the ensemble gives them.
    recalls : Recalls
        Central model and ensemble by class of the test set.
    """

    round: int
    central_accuracy: float | None
    central_loss: float | None
    ensemble_accuracy: float | None
    mean_client_accuracy: float | None
    client_accuracy: dict[int, float]
    sampled: tuple[int, ...]
    participants: tuple[int, ...]
    unmoved: tuple[int, ...]
    missing: tuple[MissingReply, ...]
    skipped: str | None
    queries_per_client: int
    queries: int
    bytes_down: int
    bytes_up: int
    bytes_down_total: int
    bytes_up_total: int
    evaluation_bytes_down: int
    evaluation_bytes_up: int
    seconds: float
    client_bytes: dict[int, Traffic] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    answer_classes: tuple[int, ...] = ()
    recalls: Recalls = field(default_factory=Recalls)

    @classmethod
    def of(
        cls,
        server: ServerState,
        current: RoundState,
        account: RoundAccount,
        *,
        central: Mapping[str, object] | None,
        ensemble_accuracy: float | None,
        recalls: Recalls,
        seconds: float,
    ) -> RoundRow:
        """Return the row of a round that has ended.

        ``central`` has "accuracy" and "loss" of the central model, if it was evaluated; ``seconds``
        is the round's wall time, evaluation included.
        """
        accuracies = {p: item.accuracy for p, item in current.evaluated.accuracies.items()}
        queries = server.num_queries.values()
        return cls(
            round=current.round,
            central_accuracy=_figure(central, "accuracy"),
            central_loss=_figure(central, "loss"),
            ensemble_accuracy=ensemble_accuracy,
            mean_client_accuracy=statistics.fmean(accuracies.values()) if accuracies else None,
            client_accuracy=accuracies,
            sampled=current.sampled,
            participants=tuple(sorted(current.replies)),
            unmoved=current.answered.unmoved if current.answered else (),
            missing=account.missing,
            skipped=current.skipped,
            queries_per_client=max(queries, default=0),
            queries=sum(queries),
            bytes_down=account.all_nodes.total_down,
            bytes_up=account.all_nodes.total_up,
            bytes_down_total=account.since_start.total_down,
            bytes_up_total=account.since_start.total_up,
            evaluation_bytes_down=account.evaluation.total_down,
            evaluation_bytes_up=account.evaluation.total_up,
            client_bytes=account.by_client,
            seconds=seconds,
            loss=_losses(current),
            phase_seconds={name: round(spent, 4) for name, spent in current.seconds.items()},
            answer_classes=_answer_classes(current),
            recalls=recalls,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON types: partitions become strings.

        What is not finite, which JSON does not have, is null.
        """
        row: dict[str, Any] = asdict(self)
        for name in ("central_accuracy", "central_loss"):
            row[name] = row[name] if row[name] is None or math.isfinite(row[name]) else None
        row["loss"] = {k: v if math.isfinite(v) else None for k, v in self.loss.items()}
        for name in ("client_accuracy", "client_bytes"):
            row[name] = {str(partition): value for partition, value in row[name].items()}
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RoundRow:
        """Return the row that `to_json` wrote."""
        values = dict(row)
        for name in ("client_accuracy", "client_bytes"):
            values[name] = {int(partition): value for partition, value in row[name].items()}
        traffic = values["client_bytes"].items()
        values["client_bytes"] = {partition: Traffic(**item) for partition, item in traffic}
        values["missing"] = tuple(MissingReply(**item) for item in row["missing"])
        values["loss"] = {k: math.nan if v is None else v for k, v in row["loss"].items()}
        for name in ("sampled", "participants", "unmoved"):
            values[name] = tuple(row[name])
        # Runs of earlier versions have no counts, nor recalls.
        values["answer_classes"] = tuple(row.get("answer_classes", ()))
        values["recalls"] = Recalls.from_json(row["recalls"]) if "recalls" in row else Recalls()
        return cls(**values)

    def figures(self) -> dict[str, float]:
        """Return what was measured as ``group/name``, for trackers; what was not is left out."""
        found = {
            "accuracy/central": self.central_accuracy,
            "accuracy/ensemble": self.ensemble_accuracy,
            "accuracy/mean client": self.mean_client_accuracy,
            **{f"client accuracy/{p}": value for p, value in self.client_accuracy.items()},
            "cost/queries a client": self.queries_per_client,
            "cost/MB down": self.bytes_down_total / 1e6,
            "cost/MB up": self.bytes_up_total / 1e6,
            "cost/seconds": self.seconds,
            "clients/participants": len(self.participants),
            "clients/missing": len(self.missing),
            **{f"loss/{name}": value for name, value in self.loss.items()},
            **{f"seconds/{name}": value for name, value in self.phase_seconds.items()},
        }
        return {
            name: float(value)
            for name, value in found.items()
            if value is not None and math.isfinite(value)
        }

    def to_line(self, num_rounds: int) -> str:
        """Return the row as one line for people."""
        figures = (
            ("central", self.central_accuracy),
            ("ensemble", self.ensemble_accuracy),
            ("mean client", self.mean_client_accuracy),
        )
        down, up = (size / 1e6 for size in (self.bytes_down_total, self.bytes_up_total))
        parts = [
            f"round {self.round}/{num_rounds}",
            *(f"{name} {percent(value)}" for name, value in figures if value is not None),
            f"queries {self.queries_per_client:,} a client",
            f"all clients: {down:,.1f} MB down, {up:,.1f} MB up",
            f"{self.seconds:.1f} s",
        ]
        if self.missing:
            left_out = sorted({item.partition for item in self.missing})
            parts.append(f"left out: {', '.join(map(str, left_out))}")
        if self.skipped:
            parts.append(f"SKIPPED: {self.skipped}")
        return " | ".join(parts)


def rows_of(checkpoint: Checkpoint) -> list[RoundRow]:
    """Return the rows that a checkpoint keeps.

    Raises
    ------
    CheckpointError
        If one of them is no row.
    """
    try:
        rows = [RoundRow.from_json(row) for row in checkpoint.rows]
        if any(type(row.round) is not int for row in rows):
            raise ValueError("a round that is no number")
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint of round {checkpoint.round} has rows that are none "
            f"({reason_of(error)}): remove it, to resume from the one before"
        ) from error
    return rows


def _figure(record: Mapping[str, object] | None, name: str) -> float | None:
    """Return a figure of ``evaluate_fn``, if it has it, and warn once of one that is none."""
    value = None if record is None else record.get(name)
    if not isinstance(value, (int, float)):
        return None
    said = f"\"{name}\" = {value:g} of 'evaluate_fn'"
    if not math.isfinite(value):
        warn_once("evaluate_fn", f"{said} is left out of the rows; return finite figures")
        return None
    if name == "accuracy" and not 0 <= value <= 1:
        warn_once("evaluate_fn", f"{said} is shown as {percent(value)}; return a part of 1")
    return float(value)


def _answer_classes(current: RoundState) -> tuple[int, ...]:
    if current.answered is None:
        return ()
    logits_NK = current.answered.logits_NK
    return tuple(np.bincount(logits_NK.argmax(axis=1), minlength=logits_NK.shape[1]).tolist())


def _losses(current: RoundState) -> dict[str, float]:
    learned, losses = current.learned, dict[str, float]()
    if learned is not None and learned.step is not None:
        # First, so that no objective's term stands for one of the run's own figures.
        losses |= {name: float(value) for name, value in learned.step.terms.items()}
    trained = [reply.train_loss for reply in current.replies.values()]
    if known := [loss for loss in trained if loss is not None]:
        losses["local_training"] = statistics.fmean(known)
    if learned is not None:
        if learned.step is not None:
            losses["gradient_norm"] = learned.step.gradient_norm
        losses["central_distillation"] = learned.central_distill_loss
    distilled = {p: reply.distill_loss for p, reply in current.replies.items()}
    distilled |= current.distill_losses
    if found := [loss for loss in distilled.values() if loss is not None]:
        losses["client_distillation"] = statistics.fmean(found)
    return losses
