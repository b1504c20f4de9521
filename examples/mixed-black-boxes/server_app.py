"""Distills the four clients into one central CNN, and prints a table of accuracies."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from task import IMAGE_SHAPE, NUM_CLASSES, NUM_CLIENTS, SmallNet, accuracy

from fedzge_flwr import FedZGE, Observer, RoundRow, make_settings

app = ServerApp()

KINDS = ("ResNet-18", "random forest", "gradient boosting", "ONNX, inference-only")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation."""
    rounds = int(context.run_config["num-server-rounds"])
    settings = make_settings(
        image_shape=IMAGE_SHAPE,
        num_classes=NUM_CLASSES,
        num_clients=NUM_CLIENTS,
        num_server_rounds=rounds,
        synthetic_batch_size=int(context.run_config["images-a-round"]),
        client_distill_steps=200,  # as its ResNet-18 has
        eval_every=rounds,
        client_evaluation="test",
    )
    torch.manual_seed(0)
    central = SmallNet()

    def evaluate(_round: int, arrays: ArrayRecord) -> MetricRecord:
        # Not the strategy's own, which may be on a GPU.
        model = SmallNet()
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": accuracy(model)})

    strategy = FedZGE(settings, central, observers=[Table()])
    strategy.start(grid, ArrayRecord(central.state_dict()), rounds, evaluate_fn=evaluate)


class Table(Observer):
    """Prints the accuracies of each evaluation."""

    def on_round(self, server: object, current: object, row: RoundRow) -> None:
        """Print a table after the rounds with an evaluation."""
        if row.central_accuracy is None:
            return
        lines = [(KINDS[number], found) for number, found in row.client_accuracy.items()]
        lines += [("mean client", row.mean_client_accuracy), ("central CNN", row.central_accuracy)]
        for name, found in lines:
            print(f"{name:22} {found:6.1%}", flush=True)
