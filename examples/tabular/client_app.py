"""Clients with rows of a table: networks, and one with gradient boosting."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.ensemble import HistGradientBoostingClassifier
from task import client_rows, network, settings, train

from fedzge_flwr import BlackBox, ModuleBlackBox, SklearnBlackBox, register_endpoints

app = ClientApp()


@app.train()
def fit(msg: Message, context: Context) -> Message:
    """Train the global model, if the strategy is FedAvg."""
    model, own = network(context), client_rows(context)
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    train(model, own, int(context.run_config["local-epochs"]))
    metrics = MetricRecord({"num-examples": len(own)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


def black_box(context: Context) -> BlackBox:
    """Return this node's private model."""
    shared, own = settings(context), client_rows(context)
    shape, classes = shared.data.spec.image_shape, shared.data.spec.num_classes
    if context.run_config["boosting"] and context.node_config["partition-id"] == 0:
        boosting = HistGradientBoostingClassifier(max_iter=60, min_samples_leaf=5, random_state=0)
        return SklearnBlackBox(context, boosting, own, classes)
    return ModuleBlackBox(
        context, network(context), None, shape, classes, len(own), own=own, settings=shared
    )


register_endpoints(app, black_box)
