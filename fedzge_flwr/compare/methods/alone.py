"""The floor and the ceiling: each client by itself, and all data in one place."""

from __future__ import annotations

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedzge_flwr.common.randomness import Purpose, torch_stream
from fedzge_flwr.compare.clients import Client
from fedzge_flwr.compare.method import Method, steps_in_every_round
from fedzge_flwr.compare.plan import Plan
from fedzge_flwr.compare.session import Session
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.partition import partition_indices
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.tensors import to_tensor
from fedzge_flwr.learning.training import train_locally


def run_local(session: Session) -> None:
    """Have each client train by itself."""
    rounds = session.settings.run.num_server_rounds
    for round_ in range(1, rounds + 1):
        asked = RecordDict({"config": ConfigRecord({"round": round_})})
        session.ask_all("train.alone", asked)
        if session.evaluated(round_):
            session.record(round_, mean_client=session.mean_of("evaluate.alone", "accuracy"))


def register_local(app: ClientApp) -> None:
    """Register ``train.alone`` and ``evaluate.alone``."""

    @app.train("alone")
    def train(message: Message, context: Context) -> Message:
        client = Client.of(LOCAL, context)
        round_ = int(message.content.config_records["config"]["round"])  # type: ignore[arg-type]
        model = client.kept_model()
        client.train(model, round_)
        client.keep(model)
        return Message(RecordDict(), reply_to=message)

    @app.evaluate("alone")
    def evaluate(message: Message, context: Context) -> Message:
        return Client.of(LOCAL, context).reply_with_accuracy(message)


LOCAL = Method(
    "local only",
    run_local,
    leaves="nothing",
    source="the floor",
    figure="mean client",
    client_keys=steps_in_every_round,
    endpoints=register_local,
)


def run_pooled(session: Session) -> None:
    """Train one model on the images of all clients, as many steps as all of them together."""
    settings = session.settings
    run, data = settings.run, settings.data
    parts = partition_indices(data, run.num_clients, run.seed)
    images = load_split(data, "train")
    device = select_device(run.server_device)
    model = session.central_model().to(device)
    steps = sum(Plan.of(settings, len(part)).total for part in parts)
    plan = Plan.of(settings, sum(len(part) for part in parts))
    keys = {"local-epochs": plan.epochs(steps, plan.rounds), "min-local-steps": 0}
    settings = from_run_config({**settings.to_run_config(), **keys})
    images_u8_NCHW = to_tensor(images.images_NCHW, device)
    labels_N = to_tensor(images.labels_N, device)
    for round_ in range(1, run.num_server_rounds + 1):
        train_locally(
            model,
            images_u8_NCHW,
            labels_N,
            data.spec.num_classes,
            settings,
            torch_stream(run.seed, Purpose.LOCAL_TRAINING, round_=round_),
        )
        session.evaluate_fn(round_, ArrayRecord(model.state_dict()))


POOLED = Method("pooled", run_pooled, leaves="all data", source="the ceiling")
