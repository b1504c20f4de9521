"""One central model of a table that nobody has whole."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import network, settings, test_rows

from fedzge_flwr import FedZGE

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy of the run config, and print the accuracy on the test rows."""
    rows, classes = test_rows(context)

    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord:
        model = network(context)
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.inference_mode():
            accuracy = (model.eval()(rows).argmax(dim=1) == classes).double().mean().item()
        print(f"round {round_}: {accuracy:.1%}", flush=True)
        return MetricRecord({"accuracy": accuracy})

    central = network(context)
    strategy = (
        FedAvg(fraction_evaluate=0.0)
        if context.run_config["strategy"] == "fedavg"
        else FedZGE(settings(context), central)
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(central.state_dict()),
        num_rounds=int(context.run_config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
