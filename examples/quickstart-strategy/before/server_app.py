"""The server of the quickstart."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from task import Net, load_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the global model."""
    torch.manual_seed(0)
    global_model = Net()
    num_rounds = int(context.run_config["num-server-rounds"])
    _, test_loader = load_data(0, 1)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = Net()
        model.load_state_dict(arrays.to_torch_state_dict())
        loss, accuracy = test(model, test_loader)
        print(f"round {server_round}: global model {accuracy:.1%}", flush=True)
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(global_model.state_dict()),
        num_rounds=num_rounds,
        evaluate_fn=evaluate,
    )
    torch.save(result.arrays.to_torch_state_dict(), str(context.run_config["output"]))
