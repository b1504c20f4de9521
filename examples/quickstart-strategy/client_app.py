"""The clients of the quickstart."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from shared import settings
from task import MEAN, STD, Net, load_data, load_partition
from task import test as test_fn
from task import train as train_fn

from fedzge_flwr import ImageSet, ModuleBlackBox, Normalized, register_endpoints

app = ClientApp()


def place(context: Context) -> tuple[int, int]:
    """Return which partition is this node's, and of how many."""
    node = context.node_config
    return int(node["partition-id"]), int(node["num-partitions"])


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the global model on this node's data."""
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader, _ = load_data(*place(context))
    loss = train_fn(net, loader, int(context.run_config["local-epochs"]))
    metrics = {"train_loss": loss, "num-examples": len(loader.dataset)}
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(content=RecordDict(content), reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the global model on this node's data."""
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, loader = load_data(*place(context))
    loss, accuracy = test_fn(net, loader)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


def black_box(context: Context) -> ModuleBlackBox:
    """Return this node's private model, which answers queries and stays here."""
    own = ImageSet.from_dataset(load_partition(*place(context))["train"], "image", "label")
    model = Normalized(Net(), MEAN, STD)
    return ModuleBlackBox(
        context, model, None, (1, 8, 8), 10, len(own), own=own, settings=settings(context)
    )


register_endpoints(app, black_box)
