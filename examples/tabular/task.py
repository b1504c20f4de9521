"""A table of scikit-learn's, divided among the clients, and a network for its rows."""

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import Context
from sklearn import datasets
from torch import nn

from fedzge_flwr import ImageSet, Settings, make_settings

TABLES = {"breast-cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}


def table(context: Context) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (N, 1, 1, F), each column scaled to [-1, 1], and classes (N,), shuffled."""
    found = TABLES[str(context.run_config["table"])]()
    low, high = found.data.min(axis=0), found.data.max(axis=0)  # what all clients agree on
    rows = (2 * (found.data - low) / (high - low) - 1).astype(np.float32)
    order = np.random.default_rng(seed(context)).permutation(len(rows))
    return rows[order, None, None], found.target[order]


def seed(context: Context) -> int:
    """Return what draws the partition and the models."""
    return int(context.run_config["seed"])


def settings(context: Context) -> Settings:
    """Return what server and clients go by alike."""
    rows, classes = table(context)
    run = context.run_config
    return make_settings(
        image_shape=rows.shape[1:],
        num_classes=int(classes.max()) + 1,
        num_clients=int(run["num-clients"]),
        seed=seed(context),
        batch_size=32,
        synthetic_batch_size=int(run["rows-a-round"]),
        central_distill_steps=int(run["central-steps"]),
        client_distill_steps=int(run["distill-steps"]),
    )


def test_rows(context: Context) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a quarter of the table, the same for everyone."""
    rows, classes = table(context)
    return torch.tensor(rows[: len(rows) // 4]), torch.tensor(classes[: len(rows) // 4])


def client_rows(context: Context) -> ImageSet:
    """Return a node's rows of the other three quarters, its shares of classes drawn at α = 1."""
    rows, classes = table(context)
    num_clients = int(context.run_config["num-clients"])
    rng = np.random.default_rng(seed(context))
    mine = []
    for label in np.unique(classes):
        found = np.flatnonzero(classes == label)
        found = found[found >= len(rows) // 4]
        ends = (rng.dirichlet(np.ones(num_clients)).cumsum()[:-1] * len(found)).astype(int)
        mine.append(np.split(found, ends)[int(context.node_config["partition-id"])])
    chosen = np.sort(np.concatenate(mine))
    return ImageSet.from_inputs(rows[chosen], classes[chosen])


def network(context: Context) -> nn.Module:
    """Return a network of two hidden layers, its first values by the seed."""
    rows, classes = table(context)
    torch.manual_seed(seed(context))
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(rows.shape[-1], 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, int(classes.max()) + 1),
    )


def train(model: nn.Module, own: ImageSet, epochs: int) -> None:
    """Train a model in place: what FedAvg does."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    rows, classes = torch.tensor(own.inputs_NCHW), torch.tensor(own.labels_N)
    for _ in range(epochs):
        for chosen in torch.randperm(len(own)).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(rows[chosen]), classes[chosen]).backward()
            optimizer.step()
