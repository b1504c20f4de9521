"""What tests of black boxes share: a context, images, models, settings of a second's run."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.app import Context, RecordDict
from sklearn.ensemble import RandomForestClassifier
from torch import nn

from fedzge_flwr import ImageSet, make_settings
from fedzge_flwr.data.loading import load_split

SHAPE = (1, 8, 8)
QUERY = np.random.default_rng(1).uniform(-1, 1, (7, *SHAPE)).astype(np.float32)
TINY: dict[str, Any] = {
    "image_shape": SHAPE,
    "num_classes": 10,
    "num_clients": 2,
    "num_server_rounds": 2,
    "synthetic_batch_size": 20,
    "generator_share": 1.0,
    "generator_width": 4,
    "generator_steps": 1,
    "memory_size": 30,
    "central_distill_steps": 2,
    "client_distill_steps": 2,
    "local_rounds": 1,
    "server_threads": 1,
}


def context_of(partition: int = 0, **node_config: Any) -> Context:
    config = {"partition-id": partition, "num-partitions": 3, **node_config}
    return Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})


def digits(split: Any = "train", num: int = 200, classes: int = 10) -> ImageSet:
    images = load_split(make_settings().data, split)
    chosen = np.flatnonzero(images.labels_N < classes)[:num]
    return ImageSet(images.images_NCHW[chosen], images.labels_N[chosen])


def forest() -> RandomForestClassifier:
    return RandomForestClassifier(20, random_state=0)


def train_a_little(model: nn.Module) -> float:
    images = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, labels = torch.from_numpy(images.inputs_NCHW), torch.tensor(images.labels_N)
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    return loss.item()
