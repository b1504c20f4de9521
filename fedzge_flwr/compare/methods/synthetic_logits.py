"""Methods that learn from logits on images that the server makes: FedZGE, and one round of it."""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord

from fedzge_flwr.compare.method import Keys, Method
from fedzge_flwr.compare.plan import Plan, queries_of_round
from fedzge_flwr.compare.session import Session
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.presets.catalogue import PAPER, preset_file, read_settings
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.learning.training import steps_an_epoch
from fedzge_flwr.observers.base import Observer
from fedzge_flwr.observers.round_row import RoundRow
from fedzge_flwr.server.round import RoundState
from fedzge_flwr.server.state import ServerState
from fedzge_flwr.strategy import FedZGE


class _Recorder(Observer):
    """Takes the accuracies of a run's rows into a session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_start(self, server: ServerState, clients: Mapping[int, str]) -> None:
        """Nothing is recorded then."""
        return

    def on_phase(self, round_: int, phase: str) -> None:
        """Nothing is recorded then."""
        return

    def on_replies(self, answered: int, asked: int) -> None:
        """Nothing is recorded then."""
        return

    def on_end(self, server: ServerState, error: BaseException | None) -> None:
        """Nothing is recorded then."""
        return

    def on_round(self, server: ServerState, current: RoundState, row: RoundRow) -> None:
        """Record a round that was evaluated."""
        if row.central_accuracy is not None:
            self._session.record(
                row.round,
                central=row.central_accuracy,
                ensemble=row.ensemble_accuracy,
                mean_client=row.mean_client_accuracy,
                queries=row.queries_per_client,
            )


def run_fedzge(session: Session) -> None:
    """Run the strategy as its settings say."""
    central = session.central_model()
    strategy = FedZGE(
        session.settings,
        central,
        test_set=session.evaluation,
        observers=[_Recorder(session)],
    )
    strategy.start(
        session.grid,
        ArrayRecord(central.state_dict()),
        evaluate_fn=session.evaluation.central,
    )


def _paper_keys(settings: Settings) -> Keys:
    """Return the published values, and rounds for as many queries as FedZGE has."""
    paper = read_settings(preset_file(PAPER))
    published = from_run_config({**settings.to_run_config(), **paper})
    budget = settings.run.num_server_rounds * settings.images.synthetic_batch_size
    return {**paper, "num-server-rounds": max(budget // queries_of_round(published), 1)}


def _paper_client_keys(settings: Settings, plan: Plan) -> Keys:
    published = from_run_config({**settings.to_run_config(), **_paper_keys(settings)})
    rounds = published.run.num_server_rounds
    training = plan.total - rounds * published.distillation.client_distill_steps
    # A batch of the paper's is larger, and an epoch fewer steps.
    an_epoch = steps_an_epoch(plan.num_examples, published.training.batch_size)
    return {"local-epochs": max(round(training / rounds / an_epoch), 1)}


def _one_round_keys(settings: Settings) -> Keys:
    rounds, images = settings.run.num_server_rounds, settings.images
    asked = rounds * images.synthetic_batch_size
    return {
        "num-server-rounds": 1,
        "local-rounds": 1,
        "image-sources": "procedural:1",
        "generator-share": 0.0,
        "surprise-power": 0.0,
        "candidates": 1,
        "synthetic-batch-size": asked,
        "memory-size": asked,
        "central-distill-steps": rounds * settings.distillation.central_distill_steps,
        "client-distill-steps": 0,
    }


def _one_round_client_keys(_settings: Settings, plan: Plan) -> Keys:
    return {"local-epochs": plan.epochs(plan.total, 1), "min-local-steps": 0}


_LOGITS = "logits on synthetic images"

FEDZGE = Method("FedZGE", run_fedzge, leaves=_LOGITS, source="this package's default")

PAPER_FEDZGE = Method(
    "FedZGE, published",
    run_fedzge,
    leaves=_LOGITS,
    source="arXiv 2503.06028, preset paper",
    keys=_paper_keys,
    client_keys=_paper_client_keys,
)

ONE_ROUND = Method(
    "one round",
    run_fedzge,
    leaves="logits on procedural images, once",
    source="what of FedZGE the rounds buy",
    keys=_one_round_keys,
    client_keys=_one_round_client_keys,
)
