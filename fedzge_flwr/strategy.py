"""FedZGE as a Flower strategy: rounds over the grid, reports to observers, Flower's Result."""

from __future__ import annotations

import copy
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import nn

from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import CheckpointError, TooFewClientsError
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.grid.clients import GridClients
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.observers.base import Observer, RoundRow
from fedzge_flwr.server.build import RECIPES, build_generator, check_names
from fedzge_flwr.server.checkpoints import Checkpoint, CheckpointFolder
from fedzge_flwr.server.checks import load_central
from fedzge_flwr.server.phases import is_evaluation_round, run_round
from fedzge_flwr.server.state import RoundState, ServerState

LOGGER = logging.getLogger("flwr.fedzge")

EvaluateFn: TypeAlias = Callable[[int, ArrayRecord], MetricRecord | None]


class CommonTestSet(Protocol):
    """The common test set, as far as the strategy may know it."""

    @property
    def num_images(self) -> int:
        """Number M of test images."""
        ...

    def accuracy(self, logits_MK: FloatArray) -> float:
        """Return the accuracy in [0, 1] of logits (M, K) in the test set's order."""
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
        self._observers = tuple(observers)
        self._checkpoints = checkpoints
        self._resume_from = resume_from
        self._warned: set[int] = set()
        self._skipped = 0
        self._kept_states: dict[int, dict[int, str]] = {}
        self._phases = RECIPES[settings.run.recipe]

    def summary(self) -> None:
        """Log what will be done."""
        run, server = self._settings.run, self._settings.server
        LOGGER.info(
            "FedZGE: recipe %s, %d of %d clients a round, %d images a round, estimator %s with %d "
            "queries a generated image, ensemble by %s",
            run.recipe,
            run.participants,
            run.num_clients,
            server.synthetic_batch_size,
            server.estimator,
            server.copies,
            server.ensemble,
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
        """Run FedZGE.

        Torch has ``server-threads`` threads meanwhile (0: those that it has), and afterwards as
        many as before.

        Parameters
        ----------
        grid : Grid
            Flower's grid.
        initial_arrays : ArrayRecord
            Initial state of the central model; no client sees it.
        num_rounds : int, optional
            Rounds R, and the span of the schedules; by default ``num-server-rounds``. 0: none.
        timeout : float, optional
            Seconds to wait for the replies of one exchange, where the settings have no other for
            its kind; by default ``exchange-timeout``.
        train_config, evaluate_config : ConfigRecord, optional
            Must be empty: clients take their settings from the run config, not from messages.
        evaluate_fn : Callable[[int, ArrayRecord], MetricRecord | None], optional
            Evaluates the central model: before the first round, every ``eval-every`` rounds and
            at the last. Its "accuracy" and "loss" go into the round's row.

        Returns
        -------
        Result
            ``arrays`` is the central model after the last round; metrics are by round.

        Raises
        ------
        ConfigError
            If the central model, the generator, or an estimator, ensemble or objective from outside
            the package does not do what it should.
        RosterError
            If the nodes are not the federation of the settings.
        TooFewClientsError
            If too few clients answer in a round and ``too-few-clients`` is "fail", or in every
            round.
        DivergenceError
            If generator or central model diverge.
        CheckpointError
            If a checkpoint cannot be written, or the one to resume from is of other settings or of
            a run of another length.
        ValueError
            If ``train_config`` or ``evaluate_config`` holds anything, or ``num_rounds`` is below 0.

        Whatever an observer raises ends the run too.
        """
        if train_config or evaluate_config:
            raise ValueError(
                "FedZGE sends clients no configuration: leave train_config and evaluate_config out"
            )
        if num_rounds is not None and num_rounds < 0:
            raise ValueError(f"num_rounds = {num_rounds}: give 0 or more")
        run = self._settings.run
        threads_before = torch.get_num_threads()
        torch.set_num_threads(run.server_threads or threads_before)
        try:
            return self._run(
                grid,
                initial_arrays,
                run.num_server_rounds if num_rounds is None else num_rounds,
                run.exchange_timeout if timeout is None else timeout,
                evaluate_fn,
            )
        finally:
            torch.set_num_threads(threads_before)

    def _run(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int,
        timeout: float,
        evaluate_fn: EvaluateFn | None,
    ) -> Result:
        self._generator.load_state_dict(self._generator_before)
        server = ServerState.create(
            self._settings,
            self._central,
            self._generator,
            num_rounds=num_rounds,
            device=select_device(self._settings.run.server_device),
            num_test_images=self._test_set.num_images if self._test_set is not None else 0,
        )
        self.summary()
        # Of this start alone: a strategy may be started again.
        self._warned, self._skipped, self._kept_states = set(), 0, {}
        clients = GridClients(
            grid, self._settings, timeout, secrets.token_hex(16), self._on_replies
        )
        result = Result()
        try:
            load_central(server, initial_arrays.to_torch_state_dict())
            if self._checkpoints is not None and self._settings.run.checkpoint_every:
                self._checkpoints.prepare()
            done = self._resume(server, clients, result)
            clients.gather()
            if done is None:
                if evaluate_fn is not None:
                    initial = evaluate_fn(0, initial_arrays)
                    if initial is not None:
                        result.evaluate_metrics_serverapp[0] = initial
                self._save(server, clients, 0, result)
            self._announce(server, clients)
            for round_ in range((done or 0) + 1, num_rounds + 1):
                self._skipped += self._one_round(server, clients, round_, result, evaluate_fn)
                self._save(server, clients, round_, result)
            if num_rounds and self._skipped == num_rounds:
                raise TooFewClientsError(
                    f"all {num_rounds} rounds were skipped: see what the log says of each client"
                )
            result.arrays = ArrayRecord(server.central.state_dict())
        except BaseException as error:
            self._close(server, error)
            raise
        self._close(server, None)
        return result

    def _resume(self, server: ServerState, clients: GridClients, result: Result) -> int | None:
        """Take up the checkpoint to go on from, if there is one, and return its round."""
        checkpoint = self._resume_from
        if checkpoint is None:
            return None
        checkpoint.check_settings(self._settings)
        if checkpoint.strategy["num_rounds"] != server.num_rounds:
            raise CheckpointError(
                f"the run to resume has {checkpoint.strategy['num_rounds']} rounds, this one "
                f"{server.num_rounds}: go on with as many, since learning rates fall over them all"
            )
        try:
            server.restore(checkpoint.server)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint of round {checkpoint.round} is of other models: resume with those "
                "that the run was started with"
            ) from error
        clients.restore(checkpoint.clients)
        self._skipped = checkpoint.strategy["skipped"]
        self._warned = set(checkpoint.strategy["warned"])
        for name, by_round in checkpoint.strategy["metrics"].items():
            records = {number: MetricRecord(values) for number, values in by_round.items()}
            getattr(result, name).update(records)
        LOGGER.info("resumed after round %d of %d", checkpoint.round, server.num_rounds)
        return checkpoint.round

    def _save(self, server: ServerState, clients: GridClients, round_: int, result: Result) -> None:
        """Save a checkpoint, if it is its turn, and tell clients what they may forget."""
        every = self._settings.run.checkpoint_every
        if self._checkpoints is None or not every:
            # Nothing will ever go on from anything but now.
            clients.make_durable(clients.states)
            return
        if round_ % every and round_ != server.num_rounds:
            return
        strategy = {
            "num_rounds": server.num_rounds,
            "skipped": self._skipped,
            "warned": sorted(self._warned),
            "metrics": {
                name: {number: dict(record) for number, record in getattr(result, name).items()}
                for name in _METRICS
            },
        }
        checkpoint = Checkpoint(
            round_,
            self._settings.to_run_config(),
            server.snapshot(),
            clients.snapshot(),
            strategy,
        )
        self._on_phase(round_, "save_checkpoint")
        kept = self._checkpoints.save(checkpoint)
        self._kept_states[round_] = clients.states
        # One that this process did not write may need any state.
        if min(kept) in self._kept_states:
            clients.make_durable(self._kept_states[min(kept)])

    def _close(self, server: ServerState, error: BaseException | None) -> None:
        """Close every observer, and raise what the first of them does, if nothing else ended it."""
        first: Exception | None = None
        for observer in self._observers:
            try:
                observer.on_end(server, error)
            except Exception as another:  # noqa: BLE001 - of whatever library an observer uses
                if error is None and first is None:
                    first = another
                else:
                    # What ended the run is what the user must see.
                    LOGGER.error("and when closing: %s", another)
        if first is not None:
            raise first

    def _announce(self, server: ServerState, clients: GridClients) -> None:
        described = {
            partition: f"{member.hello.num_examples} examples on {member.hello.device}"
            + (f" ({member.hello.gpu_share:g} of a GPU)" if member.hello.gpu_share else "")
            for partition, member in clients.members.items()
        }
        for partition, text in described.items():
            LOGGER.info("client %d: %s", partition, text)
        for observer in self._observers:
            observer.on_start(server, described)

    def _one_round(
        self,
        server: ServerState,
        clients: GridClients,
        round_: int,
        result: Result,
        evaluate_fn: EvaluateFn | None,
    ) -> bool:
        """Run a round, report it, and return whether it was skipped."""
        started = time.perf_counter()
        current = run_round(self._phases, server, clients, round_, self._on_phase)
        central: MetricRecord | None = None
        if evaluate_fn is not None and is_evaluation_round(server, round_):
            self._on_phase(round_, "evaluate_central")
            central = evaluate_fn(round_, ArrayRecord(server.central.state_dict()))
            current.seconds["evaluate_central"] = (
                time.perf_counter() - started - sum(current.seconds.values())
            )
        self._warn_of_unmoved(current)
        row = self._make_row(server, clients, current, central, time.perf_counter() - started)
        _add_to_result(result, row, central)
        LOGGER.info(row.to_line(server.num_rounds))
        for observer in self._observers:
            observer.on_round(server, current, row)
        return row.skipped is not None

    def _warn_of_unmoved(self, current: RoundState) -> None:
        for number in current.unmoved:
            if number not in self._warned:
                self._warned.add(number)
                LOGGER.warning(
                    "round %d: client %d's answers do not change within 'eps' = %g: it is left out "
                    "of the generator's gradient and kept in the ensemble; raise 'eps' if its "
                    "logits are rounded",
                    current.round,
                    number,
                    self._settings.server.eps,
                )

    def _on_phase(self, round_: int, phase: str) -> None:
        for observer in self._observers:
            observer.on_phase(round_, phase)

    def _on_replies(self, answered: int, asked: int) -> None:
        for observer in self._observers:
            observer.on_replies(answered, asked)

    def _make_row(
        self,
        server: ServerState,
        clients: GridClients,
        current: RoundState,
        central: MetricRecord | None,
        seconds: float,
    ) -> RoundRow:
        account = clients.close_round()
        accuracies = {number: item.accuracy for number, item in current.accuracies.items()}
        test_logits = current.ensemble_test_logits_MK
        ensemble = (
            self._test_set.accuracy(test_logits)
            if self._test_set is not None and test_logits is not None
            else None
        )
        queries = server.num_queries.values()
        return RoundRow(
            round=current.round,
            central_accuracy=_metric(central, "accuracy"),
            central_loss=_metric(central, "loss"),
            ensemble_accuracy=ensemble,
            mean_client_accuracy=float(np.mean(list(accuracies.values()))) if accuracies else None,
            client_accuracy=accuracies,
            sampled=current.sampled,
            participants=current.participants,
            unmoved=current.unmoved,
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
            answer_classes=_classes(current),
        )

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


_METRICS = (
    "train_metrics_clientapp",
    "evaluate_metrics_clientapp",
    "evaluate_metrics_serverapp",
)


def _metric(record: MetricRecord | None, name: str) -> float | None:
    value = None if record is None else record.get(name)
    return float(value) if isinstance(value, (int, float)) else None


def _classes(current: RoundState) -> tuple[int, ...]:
    if current.transfer is None:
        return ()
    logits_NK = current.transfer.logits_NK
    return tuple(np.bincount(logits_NK.argmax(axis=1), minlength=logits_NK.shape[1]).tolist())


def _losses(current: RoundState) -> dict[str, float]:
    # First, so that no objective's term stands for one of the run's own figures.
    losses = {name: float(value) for name, value in (current.terms or {}).items()}
    if trained := [loss for loss in current.train_losses.values() if loss is not None]:
        losses["local_training"] = float(np.mean(trained))
    if current.gradient_norm is not None:
        losses["gradient_norm"] = current.gradient_norm
    if current.central_distill_loss is not None:
        losses["central_distillation"] = current.central_distill_loss
    if current.distill_losses:
        losses["client_distillation"] = float(np.mean(list(current.distill_losses.values())))
    return losses


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
