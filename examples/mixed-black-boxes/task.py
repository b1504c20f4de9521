"""Digits, divided among four clients, and the clients' models."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from fedzge_flwr import ImageSet

NUM_CLIENTS = 4
IMAGE_SHAPE = (1, 8, 8)
NUM_CLASSES = 10


@lru_cache(maxsize=1)
def all_images() -> tuple[ImageSet, ImageSet]:
    """Return training and test images; the test images are the same for everyone."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    parts = train_test_split(
        images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
    )
    return ImageSet(parts[0], parts[2]), ImageSet(parts[1], parts[3])


@lru_cache(maxsize=1)
def partitions(alpha: float) -> list[np.ndarray]:
    """Return each client's indices into the training images."""
    train, _ = all_images()
    partitioner = DirichletPartitioner(
        NUM_CLIENTS, "label", alpha, min_partition_size=30, self_balancing=False, seed=0
    )
    partitioner.dataset = Dataset.from_dict({"label": train.labels_N, "at": np.arange(len(train))})
    return [np.array(partitioner.load_partition(n)["at"]) for n in range(NUM_CLIENTS)]


def client_images(partition: int, alpha: float) -> ImageSet:
    """Return a client's own training images."""
    train, _ = all_images()
    mine = partitions(alpha)[partition]
    return ImageSet(train.images_NCHW[mine], train.labels_N[mine])


class SmallNet(nn.Module):
    """The model that the ONNX file holds, and the central one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, NUM_CLASSES),
        )  # fmt: skip

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def train(model: nn.Module, images: ImageSet, epochs: int) -> float:
    """Train a PyTorch model on a client's images; return the last batch's loss."""
    inputs, labels = torch.from_numpy(images.inputs_NCHW), torch.tensor(images.labels_N)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loss = torch.zeros(())
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(32):
            if len(batch) > 1:  # batch norm needs two
                optimizer.zero_grad()
                loss = F.cross_entropy(model(inputs[batch]), labels[batch])
                loss.backward()
                optimizer.step()
    return loss.item()


@torch.inference_mode()
def accuracy(model: nn.Module) -> float:
    """Return a PyTorch model's accuracy on the test images."""
    _, test = all_images()
    found = model.eval()(torch.from_numpy(test.inputs_NCHW)).argmax(dim=1)
    return float((found == torch.tensor(test.labels_N)).double().mean())
