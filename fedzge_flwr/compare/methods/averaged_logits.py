"""FD: what leaves a client is, for each class, the mean of its logits on own images.

Jeong et al., 2018, "Communication-efficient on-device machine learning", arXiv 1811.11479: a client
learns its labels and, on each image, the mean logits that the other clients have for its class.
"""

from __future__ import annotations

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedzge_flwr.common.arrays import FloatArray, IntArray
from fedzge_flwr.common.randomness import Purpose
from fedzge_flwr.compare.clients import Client
from fedzge_flwr.compare.method import Keys, Method, steps_in_every_round
from fedzge_flwr.compare.plan import Plan
from fedzge_flwr.compare.session import Session
from fedzge_flwr.config.sections import Settings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.distillation import distill
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.tensors import to_numpy

_TEMPERATURE = 1.0


def class_means(logits_NK: FloatArray, labels_N: IntArray, num_classes: int) -> FloatArray:
    """Return the mean logits (K, K) on the images of each class; NaN for a class without images.

    Of logits (N, K) and classes (N,).
    """
    means = np.full((num_classes, logits_NK.shape[1]), np.nan, dtype=np.float32)
    for k in np.unique(labels_N):
        means[int(k)] = logits_NK[labels_N == k].mean(axis=0)
    return means


def others_means(means_MKK: FloatArray, client: int) -> FloatArray:
    """Return the mean (K, K) of (M, K, K) over all clients but one; NaN where no other has it."""
    others = np.delete(means_MKK, client, axis=0)
    known = ~np.isnan(others)
    with np.errstate(invalid="ignore"):
        mean: FloatArray = np.where(known, others, 0).sum(axis=0) / known.sum(axis=0)
    return mean


def run_fd(session: Session) -> None:
    """Train, gather each client's means, and send it those of the others."""
    nodes = sorted(session.grid.get_node_ids())
    num_classes = session.settings.data.spec.num_classes
    nothing = np.full((num_classes, num_classes), np.nan, dtype=np.float32)
    sent = [nothing] * len(nodes)
    for round_ in range(1, session.settings.run.num_server_rounds + 1):
        config = ConfigRecord({"round": round_})
        messages = [
            Message(
                RecordDict({"means": ArrayRecord({"means": Array(m)}), "config": config}),
                dst_node_id=node,
                message_type="train.fd",
            )
            for node, m in zip(nodes, sent, strict=True)
        ]
        replies = session.replies(messages)
        means_MKK = np.stack(
            [reply.content.array_records["means"]["means"].numpy() for reply in replies]
        )
        sent = [others_means(means_MKK, client) for client in range(len(nodes))]
        if session.evaluated(round_):
            session.record(round_, mean_client=session.mean_of("evaluate.fd", "accuracy"))


def register_fd(app: ClientApp) -> None:
    """Register ``train.fd`` and ``evaluate.fd``."""

    @app.train("fd")
    def train(message: Message, context: Context) -> Message:
        client = Client.of(FD, context)
        round_ = int(message.content.config_records["config"]["round"])  # type: ignore[arg-type]
        others_KK = torch.from_numpy(message.content.array_records["means"]["means"].numpy().copy())
        model, own = client.kept_model(), client.own()
        x_NCHW = PIXEL_RANGE.from_uint8(own.images_u8_NCHW)
        # An image of a class that no other client has is learned by its label alone.
        known_N = ~others_KK.isnan().any(dim=1)[own.labels_N.cpu()]
        if int(known_N.sum()) < client.settings.training.batch_size:
            client.train(model, round_)
        else:
            distill(
                model,
                x_NCHW[known_N],
                others_KK[own.labels_N.cpu()][known_N].to(x_NCHW.device),
                steps=client.settings.distillation.client_distill_steps,
                batch_size=client.settings.training.batch_size,
                temperature=_TEMPERATURE,
                lr=client.settings.training.local_lr,
                settings=client.settings.optimizer,
                stream=client.stream(Purpose.CLIENT_DISTILLATION, round_),
                rehearsed=own,
                max_norm=client.settings.distillation.client_distill_max_norm,
            )
        size = client.settings.queries.query_batch_size
        logits_NK = to_numpy(predict(model, own.images_u8_NCHW, size))
        means = class_means(logits_NK, own.labels_N.cpu().numpy(), client.num_classes)
        client.keep(model)
        return Message(
            RecordDict({"means": ArrayRecord({"means": Array(means)})}), reply_to=message
        )

    @app.evaluate("fd")
    def evaluate(message: Message, context: Context) -> Message:
        return Client.of(FD, context).reply_with_accuracy(message)


def _keys(settings: Settings, plan: Plan) -> Keys:
    steps = max(round(plan.total / plan.rounds), 1)
    return {**steps_in_every_round(settings, plan), "client-distill-steps": steps}


FD = Method(
    "FD",
    run_fd,
    leaves="class means of logits",
    source="Jeong et al., 2018, arXiv 1811.11479",
    figure="mean client",
    client_keys=_keys,
    endpoints=register_fd,
)
