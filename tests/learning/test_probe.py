"""A model from outside behaves here as it does alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from torch import Tensor, nn

from fedzge_flwr import TorchBlackBox, make_settings
from fedzge_flwr.common.errors import ConfigError, OutputError
from fedzge_flwr.learning.models.catalogue import MODELS, build_model, model_ways, rebuild_model
from fedzge_flwr.learning.models.probe import find_ways
from fedzge_flwr.server.build import check_models
from tests.helpers.small_models import mlp, returning

pytestmark = pytest.mark.usefixtures("registries")

SHAPE = (1, 8, 8)


class Viewing(nn.Module):
    """Flattens with ``view``, as most templates do."""

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape[0], 6, 3, padding=1)
        self.out = nn.Linear(6 * shape[1] * shape[2], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.out(x.view(len(x), -1))


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.out = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.a(self.first(x.flatten(1))).relu()))


class Loose(nn.Module):
    """Holds tensors that are in no state: one that is drawn, and one in a list."""

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_classes)
        self.mixing = torch.randn(64, 64) / 8
        self.kept = [torch.full((1,), 7.0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1) @ self.mixing)


class Volume(nn.Module):
    """Has a parameter of five dimensions, which has no channels-last layout."""

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 1)
        self.out = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x[:, :, None]).flatten(1))


class Sharing(nn.Module):
    """Two parameters in one memory: a step moves it twice."""

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)
        self.two.weight = nn.Parameter(self.one.weight.data)
        self.out = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(F.relu(self.one(x.flatten(1)))))


class Dropping(nn.Module):
    """Draws a mask in the order of memory."""

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 6, 3, padding=1), nn.Linear(384, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.dropout(self.conv(x), training=self.training).flatten(1))


class Lazy(nn.Sequential):
    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.LazyLinear(12), nn.ReLU(), nn.LazyLinear(num_classes))


def compiled(shape: Any, num_classes: int) -> nn.Module:
    return torch.compile(mlp(shape, num_classes), backend="eager")  # type: ignore[no-any-return]


KINDS: dict[str, Callable[[Any, int], nn.Module]] = {
    "view": Viewing,
    "tied": Tied,
    "loose": Loose,
    "sharing": Sharing,
    "volume": Volume,
    "dropping": Dropping,
    "lazy": Lazy,
    "compiled": compiled,
    "torchvision": lambda _, num_classes: torchvision.models.resnet18(num_classes=num_classes),
}


# Batch norm makes of another layout's rounding what it likes in a deep model's training.
@pytest.mark.parametrize("name", sorted(set(KINDS) - {"torchvision"}))
def test_a_model_goes_on_as_it_does_alone(name: str) -> None:
    """After each message of three, it answers and is trained as one that nobody has touched."""
    MODELS["mine"] = KINDS[name]
    torch.manual_seed(3)
    alone = KINDS[name](SHAPE, 10)
    if name == "lazy":
        alone(torch.zeros(1, *SHAPE))
    torch.manual_seed(3)
    ours = build_model("mine", SHAPE, 10)
    x = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        found = []
        for model in (alone, ours):
            torch.manual_seed(step)
            model.train()
            loss = F.cross_entropy(model(x), torch.arange(8))
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
                found.append(model.eval()(x))
        torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)
        assert len(list(ours.parameters())) == len(list(alone.parameters()))
        # As the next message finds it.
        torch.manual_seed(3)
        state = {key: value.clone() for key, value in ours.state_dict().items()}
        ours = rebuild_model("mine", SHAPE, 10, state)
    if name == "loose":
        assert ours.kept[0].item() == 7.0


def test_what_is_fast_is_done_where_it_changes_nothing() -> None:
    wanted = {
        "view": (False, True),
        "tied": (True, False),
        "loose": (True, False),
        "volume": (False, True),
        "dropping": (False, True),
        "compiled": (False, False),
        "torchvision": (True, True),
    }
    for name, ways in wanted.items():
        shape = (3, 16, 16) if name == "torchvision" else SHAPE
        found = find_ways(KINDS[name], shape, 10)
        assert (found.channels_last, found.empty is not None) == ways, name


@pytest.mark.parametrize("name", ["cnn", "cnn5", "resnet18", "resnet50-3x3"])
def test_the_packages_own_models_need_no_probe(name: str) -> None:
    """They would pass it, and it is spared."""
    found = find_ways(lambda *given: MODELS[name](*given), (3, 16, 16), 10)
    assert found.channels_last
    assert found.empty is not None
    assert not found.shared


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another while others work spend processor time on nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_the_probe_takes_as_long_as_a_few_builds_and_steps() -> None:
    """Of a ResNet-18: 4 to 6 of the fastest of three, in the process's own time."""
    MODELS["theirs"] = lambda _, num_classes: torchvision.models.resnet18(num_classes=num_classes)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    started = time.process_time()
    model_ways("theirs", (3, 32, 32), 10)
    taken = time.process_time() - started
    assert torch.equal(torch.get_rng_state(), before)

    def step() -> float:
        started = time.process_time()
        model = torchvision.models.resnet18(num_classes=10)
        model(torch.zeros(4, 3, 32, 32)).sum().backward()
        return time.process_time() - started

    assert taken < 10 * min(step() for _ in range(3))
    started = time.process_time()
    model_ways("theirs", (3, 32, 32), 10)
    assert time.process_time() - started < 0.01


def test_a_builder_that_gives_the_same_module_each_time() -> None:
    """Clients of one process do not go on from one another's."""
    module = mlp(SHAPE, 10)
    MODELS["one"] = lambda *_: module
    settings = make_settings(num_clients=2, local_models="one", num_train_images=200)
    first = TorchBlackBox(settings, 0, 2)
    first.fit(1)
    second = TorchBlackBox(settings, 1, 2)
    fresh = {name: value.numpy() for name, value in module.state_dict().items()}
    for name, value in second.state().items():
        np.testing.assert_array_equal(value, fresh[name])
        assert not np.array_equal(value, first.state()[name])


def broken(*_: object) -> nn.Module:
    raise KeyError("width")


NO_CLASSIFIERS: dict[str, tuple[Callable[[Any, int], Any], str]] = {
    "tuple": (
        returning(lambda _, y: (y, y)),
        "returns a tuple for 2 images in evaluation mode: return logits .N, K., or an object",
    ),
    "a tuple in training": (
        returning(lambda m, y: (y, y) if m.training else y),
        "returns a tuple for 2 images in training mode: return logits",
    ),
    "dict": (returning(lambda _, y: {"out": y}), "returns a dict without 'logits' for 2 images in"),
    "nothing": (returning(lambda *_: None), "returns a NoneType for 2 images in evaluation mode"),
    "classes": (returning(lambda _, y: y.argmax(1)), "returns torch.int64 for 2 .*before any argm"),
    "shape": (
        returning(lambda _, y: y[:, :7]),
        r"returns \(2, 7\) for 2 images in evaluation mode: return logits \(2, 10\)",
    ),
    "detached": (returning(lambda _, y: y.detach()), "logits without a gradient in training mode"),
    "not finite": (returning(lambda _, y: y / 0), "returns logits that are not finite for 2"),
    "no parameters": (lambda *_: nn.Flatten(), "has no parameters to train: give a module that"),
    "frozen": (lambda *given: mlp(*given).requires_grad_(False), "has no parameters to train"),
    "half": (lambda *given: mlp(*given).half(), "its parameters are torch.float16: give model.flo"),
    "larger images": (
        lambda *_: mlp((3, 32, 32), 10),
        r"takes no float32 images of shape \(2",
    ),
    "builder": (broken, r"cannot be built for images \(1, 8, 8\) and 10 classes \(KeyError: 'wid"),
    "no module": (lambda *_: lambda x: x, "the model's builder returns a function: return an nn.M"),
}


@pytest.mark.parametrize("name", NO_CLASSIFIERS)
def test_what_is_no_classifier_is_said_in_a_line(name: str) -> None:
    """Of a central and of a local model, before anything starts."""
    MODELS["mine"], message = NO_CLASSIFIERS[name]
    for key in ("central_model", "local_models"):
        with pytest.raises(ConfigError, match=rf"^model 'mine': .*{message}") as caught:
            check_models(make_settings(**{key: "mine"}))
        assert "\n" not in str(caught.value)


def test_a_client_says_what_its_model_lacks_and_not_what_it_is_called() -> None:
    MODELS["s3cr3t"], _ = NO_CLASSIFIERS["tuple"]
    with pytest.raises(OutputError) as caught:
        TorchBlackBox(make_settings(num_clients=2), 0, 2, "s3cr3t").profile()
    assert "s3cr3t" not in str(caught.value)
