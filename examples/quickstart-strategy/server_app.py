"""The server of the quickstart."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from shared import settings
from task import MEAN, STD, Net

from fedzge_flwr import FedZGE, Normalized, evaluate_at_clients

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the global model."""
    torch.manual_seed(0)
    global_model = Normalized(Net(), MEAN, STD)
    strategy = FedZGE(settings(context), global_model)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(global_model.state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=evaluate_at_clients(grid),
    )
    torch.save(result.arrays.to_torch_state_dict(), str(context.run_config["output"]))
