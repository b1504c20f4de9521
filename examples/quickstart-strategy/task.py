"""An ordinary Flower app's model and data: a table of Hugging Face's, normalised by its loader."""

from functools import lru_cache

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from flwr_datasets.partitioner import DirichletPartitioner
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import Compose, Normalize, ToTensor

MEAN, STD = 0.3, 0.37


class Net(nn.Module):
    """A small CNN for 8×8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x):
        return self.head(self.features(x))


@lru_cache(maxsize=1)
def table() -> datasets.Dataset:
    """Stand for a download."""
    digits = load_digits()
    levels = np.round(digits.images / 16 * 255).astype(np.uint8)
    return datasets.Dataset.from_dict(
        {"image": [Image.fromarray(one) for one in levels], "label": digits.target.tolist()},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(10)}),
    )


@lru_cache(maxsize=1)
def partitioner(num_partitions: int) -> DirichletPartitioner:
    """Divide it among the clients, once in a process."""
    found = DirichletPartitioner(num_partitions, "label", alpha=1.0, min_partition_size=10, seed=42)
    found.dataset = table()
    return found


def load_partition(partition_id: int, num_partitions: int) -> datasets.DatasetDict:
    """Return a client's table, 80 % for training."""
    partition = partitioner(num_partitions).load_partition(partition_id)
    return partition.train_test_split(test_size=0.2, seed=42)


def load_data(partition_id: int, num_partitions: int) -> tuple[DataLoader, DataLoader]:
    """Return a client's loaders, of normalised images."""
    transform = Compose([ToTensor(), Normalize((MEAN,), (STD,))])

    def apply(batch):
        batch["image"] = [transform(image) for image in batch["image"]]
        return batch

    split = load_partition(partition_id, num_partitions).with_transform(apply)
    return (
        DataLoader(split["train"], batch_size=32, shuffle=True, drop_last=True),
        DataLoader(split["test"], batch_size=256),
    )


def train(net: nn.Module, loader: DataLoader, epochs: int) -> float:
    """Train a model in place; return the mean loss."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.002)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / max(len(loader) * epochs, 1)


@torch.inference_mode()
def test(net: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Return mean loss and accuracy of a model."""
    net.eval()
    loss = right = count = 0.0
    for batch in loader:
        logits = net(batch["image"])
        loss += F.cross_entropy(logits, batch["label"], reduction="sum").item()
        right += (logits.argmax(1) == batch["label"]).sum().item()
        count += len(batch["label"])
    return loss / count, right / count
