"""What the clients of all methods share: their settings, their images, models that they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

from fedzge_flwr.common.randomness import Purpose, seeded_default, torch_stream
from fedzge_flwr.compare.method import Method
from fedzge_flwr.compare.plan import Plan
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import MIN_TRAINING_IMAGES, Settings
from fedzge_flwr.data.loading import load_split
from fedzge_flwr.data.partition import client_data, partition_indices
from fedzge_flwr.images.image_set import ImageSet
from fedzge_flwr.learning.models.catalogue import build_model, rebuild_model
from fedzge_flwr.learning.numerics import select_device
from fedzge_flwr.learning.predict import evaluate_logits, predict
from fedzge_flwr.learning.tensors import to_tensor
from fedzge_flwr.learning.training import OwnImages, train_locally
from fedzge_flwr.server.build import build_central

METHOD_KEY = "strategy"
"""The key of the run config that names the method."""

_MODEL = "compare.model"

RunConfig: TypeAlias = Mapping[str, object]


def server_settings(method: Method, run_config: RunConfig) -> Settings:
    """Return the settings of a method's run, each round of which needs all clients.

    Raises
    ------
    ConfigError
        As in `from_run_config`.
    """
    given = {key: value for key, value in run_config.items() if key != METHOD_KEY}
    base = from_run_config(given)
    all_of_them = {"min-clients": base.run.participants, "too-few-clients": "fail"}
    return from_run_config({**given, **all_of_them, **method.keys(base)})


def client_settings(method: Method, run_config: RunConfig, partition: int) -> Settings:
    """Return the settings of one client: those of the run, and the steps that it takes.

    Raises
    ------
    FedZGEError
        If a setting is wrong, or the images are not here.
    """
    given = {key: value for key, value in run_config.items() if key != METHOD_KEY}
    base = from_run_config(given)
    parts = partition_indices(base.data, base.run.num_clients, base.run.seed)
    own = method.client_keys(base, Plan.of(base, len(parts[partition])))
    return from_run_config({**given, **method.keys(base), **own})


@dataclass(frozen=True)
class Client:
    """A client of a method with endpoints of its own, for the time of one message.

    Parameters
    ----------
    settings : Settings
        Its own.
    partition : int
        From 0.
    context : Context
        The node's; what it keeps lies in its state.
    """

    settings: Settings
    partition: int
    context: Context

    @classmethod
    def of(cls, method: Method, context: Context) -> Client:
        """Return the client of the node that a context belongs to."""
        partition = int(context.node_config["partition-id"])
        return cls(client_settings(method, context.run_config, partition), partition, context)

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return self.settings.data.spec.num_classes

    def images(self) -> ImageSet:
        """Return its own images."""
        run = self.settings.run
        return client_data(
            self.settings.data, run.num_clients, run.seed, self.partition, hold_out=False
        ).train

    def own(self) -> OwnImages:
        """Return its own images as tensors on the client's device."""
        images, device = self.images(), select_device(self.settings.run.client_device)
        return OwnImages(
            to_tensor(images.images_NCHW, device),
            to_tensor(images.labels_N, device),
            None,
        )

    def central_model(self) -> nn.Module:
        """Return a model of the central model's architecture, on the client's device."""
        return build_central(self.settings).to(select_device(self.settings.run.client_device))

    def stream(self, purpose: Purpose, round_: int) -> torch.Generator:
        """Return the stream of its draws in a round."""
        seed = self.settings.run.seed
        return torch_stream(seed, purpose, round_=round_, partition=self.partition)

    def train(self, model: nn.Module, round_: int) -> float:
        """Train a model on its own images, as its settings say; return the loss in nats.

        On fewer than two it does not, as FedZGE's clients do not (batch norm cannot); 0.0 then.
        """
        own = self.own()
        if len(own.labels_N) < MIN_TRAINING_IMAGES:
            return 0.0
        return train_locally(
            model,
            own.images_u8_NCHW,
            own.labels_N,
            self.num_classes,
            self.settings,
            self.stream(Purpose.LOCAL_TRAINING, round_),
        )

    def kept_model(self) -> nn.Module:
        """Return the model that it has kept, or the one that its settings name, initialised."""
        name, spec = self.settings.training.model_of(self.partition), self.settings.data.spec
        kept = self.context.state.array_records.get(_MODEL)
        with seeded_default(self.settings.run.seed, Purpose.INIT_CLIENT, partition=self.partition):
            model = (
                build_model(name, spec.image_shape, spec.num_classes)
                if kept is None
                else rebuild_model(
                    name, spec.image_shape, spec.num_classes, kept.to_torch_state_dict()
                )
            )
        return model.to(select_device(self.settings.run.client_device))

    def keep(self, model: nn.Module) -> None:
        """Keep the model for the next message."""
        self.context.state[_MODEL] = ArrayRecord(model.cpu().state_dict())

    def accuracy(self, model: nn.Module) -> float:
        """Return a model's accuracy in [0, 1] on the common test set."""
        test = load_split(self.settings.data, "test")
        size = self.settings.queries.query_batch_size
        logits_NK = predict(model, to_tensor(test.images_NCHW), size)
        return evaluate_logits(logits_NK, to_tensor(test.labels_N)).accuracy

    def reply_with_accuracy(self, message: Message) -> Message:
        """Return a reply whose record "metrics" has the accuracy of the model that it has kept."""
        metrics = MetricRecord({"accuracy": self.accuracy(self.kept_model())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)
