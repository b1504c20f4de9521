"""The clients of the quickstart."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import Net, load_data, test
from task import train as train_fn

from fedzge_flwr import ImageSet, ModuleBlackBox, register_endpoints

app = ClientApp()


def loaders(context: Context):
    """Return this node's training and test data."""
    node = context.node_config
    return load_data(int(node["partition-id"]), int(node["num-partitions"]))


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the global model on this node's data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader, _ = loaders(context)
    run = context.run_config
    loss = train_fn(model, loader, int(run["local-epochs"]), float(run["learning-rate"]))
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the global model on this node's data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, loader = loaders(context)
    loss, accuracy = test(model, loader)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


def black_box(context: Context) -> ModuleBlackBox:
    """Return this node's private model, which answers queries and stays here."""
    (loader, _), run = loaders(context), context.run_config

    def fit(model: Net) -> float:
        return train_fn(model, loader, int(run["local-epochs"]), float(run["learning-rate"]))

    own = ImageSet.from_inputs(*loader.dataset.tensors)
    return ModuleBlackBox(context, Net(), fit, (1, 8, 8), 10, len(own), own=own)


register_endpoints(app, black_box)
