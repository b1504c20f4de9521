"""An ordinary Flower app's model and data: digits, a share for each client."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """A small CNN for 8×8 grey images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(64)
        self.hidden = nn.Linear(64 * 2 * 2, 128)
        self.out = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = F.max_pool2d(F.relu(self.norm1(self.conv1(images))), 2)
        maps = F.max_pool2d(F.relu(self.norm2(self.conv2(maps))), 2)
        return self.out(F.relu(self.hidden(maps.flatten(1))))


def load_data(partition_id: int, num_partitions: int) -> tuple[DataLoader, DataLoader]:
    """Return a client's loader of training images and everyone's loader of test images."""
    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    mine, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0)
    mine = mine[partition_id::num_partitions]
    train_set, test_set = (TensorDataset(images[part], labels[part]) for part in (mine, test))
    return DataLoader(train_set, 32, shuffle=True, drop_last=True), DataLoader(test_set, 256)


def train(model: nn.Module, loader: DataLoader, epochs: int, lr: float) -> float:
    """Train a model in place; return the mean loss of the last epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(loader)


@torch.inference_mode()
def test(model: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Return mean loss and accuracy of a model."""
    model.eval()
    loss = right = count = 0.0
    for images, labels in loader:
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return loss / count, right / count
