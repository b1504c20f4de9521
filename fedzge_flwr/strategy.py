"""FedZGE as a Flower strategy: rounds over the grid, reports to observers, Flower's Result."""

from __future__ import annotations

import copy
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from fedzge_flwr.common.arrays import FloatArray, IntArray
from fedzge_flwr.common.errors import CheckpointError, DataError, TooFewClientsError
from fedzge_flwr.common.file_kinds import reason_of
from fedzge_flwr.config.parsing import differs_from_paper
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.grid.clients import GridClients
from fedzge_flwr.learning.numerics import select_device, threads
from fedzge_flwr.learning.tensors import plain_state
from fedzge_flwr.observers.base import Observer
from fedzge_flwr.observers.heartbeat import Heartbeat
from fedzge_flwr.observers.recalls import Recalls
from fedzge_flwr.observers.round_row import RoundRow, rows_of
from fedzge_flwr.query.copies import copies_asked
from fedzge_flwr.server.build import RECIPES, build_generator, build_server, check_names
from fedzge_flwr.server.checkpoints import Checkpoint, CheckpointFolder
from fedzge_flwr.server.checks import load_central, notice_of_size
from fedzge_flwr.server.doubts import Doubts
from fedzge_flwr.server.phases import is_evaluation_round, run_round
from fedzge_flwr.wire.messages import HelloReply

LOGGER = logging.getLogger("flwr.fedzge")

EvaluateFn: TypeAlias = Callable[[int, ArrayRecord], MetricRecord | None]


class CommonTestSet(Protocol):
    """The common test set, as far as the strategy may know it."""

    @property
    def labels_M(self) -> IntArray:
        """Classes of the test images, int64 (M,), in the order in which clients have them."""
        ...


class FedZGE(Strategy):
    """Data-free black-box federated learning (arXiv 2503.06028) as a Flower strategy.

    The clients' apps need the endpoints of `fedzge_flwr.register_endpoints`. Nothing of it reads
    data: evaluation enters as callables.

    Parameters
    ----------
    settings : Settings
        The run's settings (`make_settings`, `from_run_config`). What is a client's own is not read
        here: give the clients the same settings.
    central_model : nn.Module
        Student: maps float32 images (N, C, H, W) in the shared pixel range to logits (N, K). It is
        moved to ``server-device`` and trained in place.
    generator : nn.Module, optional
        Maps noise (N, nz), nz = ``latent-dim``, and labels (N,) to images (N, C, H, W) in the
        shared pixel range; without it, the one that the settings name. It is moved and trained in
        place, and each `start` begins with it as it is now.
    test_set : CommonTestSet, optional
        Scores the clients' ensemble, from the logits that clients return on the common test set
        (``client-evaluation = "test"``). Without it no such logits are asked for.
    observers : Sequence[Observer]
        Follow the run.
    checkpoints : CheckpointFolder, optional
        Gets the server's whole state every ``checkpoint-every`` rounds.
    resume_from : Checkpoint, optional
        The state to go on from (`CheckpointFolder.newest`); ``initial_arrays`` of `start` then do
        not matter.

    Raises
    ------
    ConfigError
        If a setting names something unknown.
    """

    def __init__(
        self,
        settings: Settings,
        central_model: nn.Module,
        generator: nn.Module | None = None,
        *,
        test_set: CommonTestSet | None = None,
        observers: Sequence[Observer] = (),
        checkpoints: CheckpointFolder | None = None,
        resume_from: Checkpoint | None = None,
    ) -> None:
        self._settings = settings
        self._central = central_model
        check_names(settings)
        self._generator = build_generator(settings) if generator is None else generator
        self._generator_before = copy.deepcopy(self._generator.state_dict())
        self._test_set = test_set
        self._observers = (Heartbeat(), *observers)
        self._checkpoints = checkpoints
        self._resume_from = resume_from

    def summary(self) -> None:
        """Log what will be done."""
        run, images, queries = self._settings.run, self._settings.images, self._settings.queries
        copies = copies_asked(queries.estimator, queries.q, queries.differences)
        of_generated = f", {copies} queries each of those generated (estimator {queries.estimator})"
        LOGGER.info(
            "FedZGE: recipe %s, %d of %d clients a round, %d images a round%s, ensemble by %s",
            run.recipe,
            run.participants,
            run.num_clients,
            images.synthetic_batch_size,
            of_generated if images.generator_share else "",
            queries.ensemble,
        )
        if notice := notice_of_size(self._settings):
            LOGGER.warning("%s", notice)
        keys = differs_from_paper(self._settings)
        if keys:
            LOGGER.warning(
                "recipe 'paper' with the default, not the paper's value of %s: the preset 'paper' "
                "has them all",
                ", ".join(keys),
            )

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run FedZGE; torch has ``server-threads`` threads meanwhile (0: those that it has).

        Parameters
        ----------
        grid : Grid
            Flower's grid.
        initial_arrays : ArrayRecord
            Initial state of the central model; no client sees it.
        num_rounds : int, optional
            Rounds R, and the span of the schedules; by default ``num-server-rounds``. 0: none.
        timeout : float, optional
            Seconds to wait for replies where the settings have no other; ``exchange-timeout``.
        train_config, evaluate_config : ConfigRecord, optional
            Must be empty: clients take their settings from the run config, not from messages.
        evaluate_fn : Callable[[int, ArrayRecord], MetricRecord | None], optional
            Evaluates the central model: before the first round, every ``eval-every`` rounds and
            at the last: "accuracy", "loss", and "classes", the class of each ``test_set`` image.

        Returns
        -------
        Result
            ``arrays`` is the central model after the last round; metrics are by round.

        Raises
        ------
        FedZGEError
            See `fedzge_flwr.common.errors` for the kinds; whatever an observer raises, too.
        ValueError
            If ``train_config`` or ``evaluate_config`` holds anything, or ``num_rounds`` is below 0.
        """
        if train_config or evaluate_config:
            raise ValueError("FedZGE sends clients no configuration: leave both configs out")
        if num_rounds is not None and num_rounds < 0:
            raise ValueError(f"num_rounds = {num_rounds}: give 0 or more")
        given = self._settings.run
        rounds = given.num_server_rounds if num_rounds is None else num_rounds
        patience = given.exchange_timeout if timeout is None else timeout
        self._generator.load_state_dict(self._generator_before)
        with threads(given.server_threads):
            return _Run(self, grid, rounds, patience, evaluate_fn).go(initial_arrays)

    # -- Flower's per-phase hooks: a round of FedZGE has more phases than train and evaluate ------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used: `start` runs FedZGE's own phases."""
        raise NotImplementedError("FedZGE runs its own phases: call start()")

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Not used: `start` runs FedZGE's own phases."""
        raise NotImplementedError("FedZGE runs its own phases: call start()")

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Not used: `start` runs FedZGE's own phases."""
        raise NotImplementedError("FedZGE runs its own phases: call start()")

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Not used: `start` runs FedZGE's own phases."""
        raise NotImplementedError("FedZGE runs its own phases: call start()")


class _Run:
    """One start of a strategy: all that lives from its first round to its last."""

    def __init__(
        self,
        strategy: FedZGE,
        grid: Grid,
        num_rounds: int,
        patience: float,
        evaluate_fn: EvaluateFn | None,
    ) -> None:
        self._settings = settings = strategy._settings
        test_set = strategy._test_set
        self._labels_M = None if test_set is None else test_set.labels_M
        self._observers = strategy._observers
        self._checkpoints = strategy._checkpoints
        self._resume_from = strategy._resume_from
        self._recipe = RECIPES[settings.run.recipe]
        self._evaluate_fn = evaluate_fn
        self._server = build_server(
            settings,
            strategy._central,
            strategy._generator,
            num_rounds=num_rounds,
            device=select_device(settings.run.server_device),
            num_test_images=0 if self._labels_M is None else len(self._labels_M),
        )
        strategy.summary()
        self._clients = GridClients(
            grid, settings, patience, secrets.token_hex(16), self._on_replies
        )
        self._result, self._skipped = Result(), 0
        self._doubts = Doubts(settings)
        self._rows: deque[RoundRow] = deque(maxlen=_rows_kept(settings))
        self._kept_states: dict[int, dict[int, str]] = {}

    def go(self, initial_arrays: ArrayRecord) -> Result:
        """Run to the end; whatever happens, close the observers."""
        try:
            load_central(self._server, initial_arrays.to_torch_state_dict())
            if self._checkpoints is not None and self._settings.run.checkpoint_every:
                self._checkpoints.prepare()
            done = self._resume()
            self._clients.channel.gather()
            if done is None:
                self._evaluate_first()
                self._save(0)
            self._announce()
            num_rounds = self._server.num_rounds
            for round_ in range((done or 0) + 1, num_rounds + 1):
                self._skipped += self._one_round(round_)
                self._save(round_)
            if num_rounds and self._skipped == num_rounds:
                raise TooFewClientsError(
                    f"all {num_rounds} rounds were skipped: see what the log says of each client"
                )
            self._result.arrays = ArrayRecord(plain_state(self._server.central))
        except BaseException as error:
            self._close(error)
            raise
        self._close(None)
        return self._result

    def _evaluate_first(self) -> None:
        arrays = ArrayRecord(plain_state(self._server.central))
        initial, _ = evaluate_central(self._evaluate_fn, 0, arrays)
        if initial is not None:
            self._result.evaluate_metrics_serverapp[0] = initial

    def _resume(self) -> int | None:
        """Take up the checkpoint to go on from, if there is one, and return its round."""
        checkpoint, num_rounds = self._resume_from, self._server.num_rounds
        if checkpoint is None:
            return None
        checkpoint.check_settings(self._settings)
        if (then := checkpoint.strategy.get("num_rounds")) != num_rounds:
            raise CheckpointError(
                f"the run to resume has {then} rounds, this one {num_rounds}: go on with as many"
            )
        try:
            self._server.restore(checkpoint.server)
        except Exception as error:  # of whatever parts others have written
            raise CheckpointError(
                f"the checkpoint of round {checkpoint.round} is of other models: resume with those "
                "that the run was started with"
            ) from error
        self._rows.extend(rows_of(checkpoint))
        try:
            self._clients.restore(checkpoint.clients)
            self._skipped = checkpoint.strategy["skipped"]
            self._doubts.restore(checkpoint.strategy["doubts"])
            _restore_metrics(self._result, checkpoint.strategy["metrics"])
        except Exception as error:
            raise _lacking(checkpoint, error) from error
        LOGGER.info("resumed after round %d of %d", checkpoint.round, num_rounds)
        return checkpoint.round

    def _save(self, round_: int) -> None:
        """Save a checkpoint, if it is its turn, and tell clients what they may forget."""
        every, standings = self._settings.run.checkpoint_every, self._clients.channel.standings
        if self._checkpoints is None or not every:
            # Nothing will ever go on from anything but now.
            standings.make_durable(standings.states)
            return
        if round_ % every and round_ != self._server.num_rounds:
            return
        checkpoint = Checkpoint(
            round_,
            self._settings.to_run_config(),
            self._server.snapshot(),
            self._clients.snapshot(),
            {
                "num_rounds": self._server.num_rounds,
                "skipped": self._skipped,
                "doubts": self._doubts.snapshot(),
                "metrics": _metrics(self._result),
            },
            [row.to_json() for row in self._rows],
        )
        self._on_phase(round_, "save_checkpoint")
        kept = self._checkpoints.save(checkpoint)
        states = {**self._kept_states, round_: standings.states}
        self._kept_states = {at: states[at] for at in kept if at in states}
        if min(kept) in states:  # One that this process did not write may need any state.
            standings.make_durable(states[min(kept)])

    def _close(self, error: BaseException | None) -> None:
        """Close every observer, and raise what the first of them does, if nothing else ended it."""
        first: Exception | None = None
        for observer in self._observers:
            try:
                observer.on_end(self._server, error)
            except Exception as another:  # noqa: BLE001 - of whatever library an observer uses
                if error is None and first is None:
                    first = another
                else:
                    # What ended the run is what the user must see.
                    LOGGER.error("and when closing: %s", another)
        if first is not None:
            raise first

    def _announce(self) -> None:
        described = {
            partition: f"{member.hello.num_examples} examples on {member.hello.device}"
            + (f" ({member.hello.gpu_share:g} of a GPU)" if member.hello.gpu_share else "")
            + _privacy(member.hello)
            for partition, member in self._clients.channel.members.items()
        }
        for partition, text in described.items():
            LOGGER.info("client %d: %s", partition, text)
        for observer in self._observers:
            observer.on_start(self._server, described)

    def _one_round(self, round_: int) -> bool:
        """Run a round, report it, and return whether it was skipped."""
        server, started = self._server, time.perf_counter()
        current = run_round(self._recipe, server, self._clients, round_, self._on_phase)
        central, classes_M = None, None
        if self._evaluate_fn is not None and is_evaluation_round(server, round_):
            arrays = ArrayRecord(plain_state(server.central))
            central, classes_M = current.do(evaluate_central, self._evaluate_fn, round_, arrays)
        for line in self._doubts.of(current.answered):
            LOGGER.warning("round %d: %s", round_, line)
        ensemble_logits_MK = current.evaluated.ensemble_logits_MK
        row = RoundRow.of(
            server,
            current,
            self._clients.channel.close_round(),
            central=central,
            recalls=_recalls(server.settings, self._labels_M, classes_M, ensemble_logits_MK),
            ensemble_accuracy=_accuracy(self._labels_M, ensemble_logits_MK),
            seconds=time.perf_counter() - started,
        )
        _add_to_result(self._result, row, central)
        self._rows.append(row)
        LOGGER.info(row.to_line(server.num_rounds))
        for observer in self._observers:
            observer.on_round(server, current, row)
        return row.skipped is not None

    def _on_phase(self, round_: int, phase: str) -> None:
        for observer in self._observers:
            observer.on_phase(round_, phase)

    def _on_replies(self, answered: int, asked: int) -> None:
        for observer in self._observers:
            observer.on_replies(answered, asked)


def _privacy(hello: HelloReply) -> str:
    """Return what a client tells of its privacy."""
    if not hello.epsilon:
        return ""
    return f", differentially private: ε = {hello.epsilon:g}, δ = {hello.delta:g}"


def _lacking(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the checkpoint of round {checkpoint.round} lacks what a run goes on from "
        f"({reason_of(error)}): remove it, to resume from the one before"
    )


def _rows_kept(settings: Settings) -> int:
    """Return how many of the newest rows a checkpoint has: a number that no round raises.

    Those since the checkpoint before the last: a run folder syncs each row, so only a disk that
    says that it has written what it has not may lose more.
    """
    return max(2 * settings.run.checkpoint_every, 16)


_METRICS = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)


def _metrics(result: Result) -> dict[str, dict[int, dict[str, object]]]:
    return {
        name: {round_: dict(record) for round_, record in getattr(result, name).items()}
        for name in _METRICS
    }


def _restore_metrics(
    result: Result, metrics: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> None:
    for name, by_round in metrics.items():
        records = {round_: MetricRecord({**values}) for round_, values in by_round.items()}
        getattr(result, name).update(records)


def evaluate_central(
    evaluate_fn: EvaluateFn | None, round_: int, arrays: ArrayRecord
) -> tuple[MetricRecord | None, list[int] | None]:
    """Evaluate the central model: the last phase of a round that is evaluated.

    Returns its metrics, and "classes" apart from them: thousands of numbers are no metric.
    """
    found = evaluate_fn(round_, arrays) if evaluate_fn is not None else None
    if found is None:
        return None, None
    classes_M = found.get("classes")
    metrics = MetricRecord({name: value for name, value in found.items() if name != "classes"})
    return metrics, [int(c) for c in classes_M] if isinstance(classes_M, list) else None


def _accuracy(labels_M: IntArray | None, logits_MK: FloatArray | None) -> float | None:
    if labels_M is None or logits_MK is None:
        return None
    return float((logits_MK.argmax(axis=1) == labels_M).mean())


def _recalls(
    settings: Settings,
    labels_M: IntArray | None,
    classes_M: Sequence[int] | None,
    ensemble_logits_MK: FloatArray | None,
) -> Recalls:
    if labels_M is None:
        return Recalls()
    num_classes = settings.data.spec.num_classes
    try:
        return Recalls.of(labels_M, num_classes, classes_M, ensemble_logits_MK)
    except ValueError as error:
        raise DataError(
            f"the test set and what was answered about it do not fit: {error}; give 'test_set' "
            'the labels of the images that clients have, in their order, and as "classes" of '
            "'evaluate_fn' a class for each"
        ) from error


def _add_to_result(result: Result, row: RoundRow, central: MetricRecord | None) -> None:
    if row.loss:
        result.train_metrics_clientapp[row.round] = MetricRecord({**row.loss})
    if row.client_accuracy:
        metrics = MetricRecord({"accuracy": row.mean_client_accuracy or 0.0})
        if row.ensemble_accuracy is not None:
            metrics["ensemble-accuracy"] = row.ensemble_accuracy
        result.evaluate_metrics_clientapp[row.round] = metrics
    if central is not None:
        result.evaluate_metrics_serverapp[row.round] = central
