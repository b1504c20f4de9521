"""FedZGE's ServerApp: wires settings, models, evaluation and run folder into the strategy."""

import logging

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedzge_flwr.common.errors import FedZGEError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.data.evaluation import TestSetEvaluation, check_partition, data_digests
from fedzge_flwr.observers.base import Observer
from fedzge_flwr.observers.run_folder import RunFolder
from fedzge_flwr.observers.tensorboard import TensorBoard
from fedzge_flwr.server.build import build_central, check_models, check_names
from fedzge_flwr.strategy import FedZGE

LOGGER = logging.getLogger("flwr.fedzge")

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedZGE as the run config says."""
    try:
        settings = from_run_config(context.run_config)
        check_names(settings)
        check_models(settings)
        evaluation = None
        if settings.run.server_evaluation == "test":
            evaluation = TestSetEvaluation(settings)
        class_counts = check_partition(settings)
        central = build_central(settings)
        folder = RunFolder(settings, class_counts=class_counts, data=data_digests(settings))
        LOGGER.info("run folder: %s", folder.path)
        observers: list[Observer] = [folder]
        if settings.run.tensorboard:
            observers.append(TensorBoard(folder.path / "tensorboard", folder.resumed_from))
        strategy = FedZGE(
            settings,
            central,
            test_set=evaluation,
            observers=observers,
            checkpoints=folder.checkpoints,
            resume_from=folder.resumed_from,
        )
        strategy.start(
            grid,
            ArrayRecord(central.state_dict()),
            evaluate_fn=evaluation.central if evaluation else None,
        )
        LOGGER.info("run folder: %s", folder.path)
    except FedZGEError as error:
        # One line for people; Flower logs the traceback after it.
        LOGGER.error("fedzge: %s", error)
        raise
