"""One central model from clients with images from flwr-datasets."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from task import SHAPE, settings, test_images

from fedzge_flwr import MODELS, FedZGE

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedZGE and print accuracies."""
    torch.manual_seed(0)
    classes = int(context.run_config["num-classes"])
    central = MODELS["cnn"](SHAPE, classes)
    test = test_images(context)

    @torch.inference_mode()
    def evaluate(round_: int, arrays: ArrayRecord) -> MetricRecord:
        model = MODELS["cnn"](SHAPE, classes)
        model.load_state_dict(arrays.to_torch_state_dict())
        found = model.eval()(torch.from_numpy(test.inputs_NCHW)).argmax(dim=1)
        accuracy = (found == torch.tensor(test.labels_N)).double().mean().item()
        print(f"round {round_}: central model {accuracy:.1%}", flush=True)
        return MetricRecord({"accuracy": accuracy})

    strategy = FedZGE(settings(context), central)
    strategy.start(grid, ArrayRecord(central.state_dict()), evaluate_fn=evaluate)
