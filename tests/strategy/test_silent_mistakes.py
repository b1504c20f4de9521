"""Mistakes of an app that is adopted, which cost accuracy and stop nothing: one warning each.

What is right says nothing. Each federation is a real one of two clients, over real messages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch
from flwr.app import ArrayRecord, Context
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedzge_flwr import (
    FedZGE,
    FunctionBlackBox,
    ImageSet,
    ModuleBlackBox,
    Normalized,
    Settings,
    make_settings,
    register_endpoints,
    torch_black_box,
)
from fedzge_flwr.common.arrays import FloatArray
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.server.checks import notice_of_size
from tests.helpers.boxes import SHAPE, TINY, context_of, digits
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.small_models import mlp

GIVEN = {**TINY, "client_distill_lr": 0.001, "client_evaluation": "held-out"}
SETTINGS = make_settings(**GIVEN)
MEAN, STD = 0.3, 0.37


class Named(nn.Module):
    """Takes its images by name in training, as models of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(SHAPE, 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        return {"logits": self.inner(pixel_values)}


def adam(model: nn.Module, inputs: Tensor) -> float:
    labels = torch.tensor(digits().labels_N)[: len(inputs)]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        named = isinstance(model, Named)
        found = model(labels=labels, pixel_values=inputs)["logits"] if named else model(inputs)
        loss = nn.functional.cross_entropy(found, labels)
        loss.backward()
        optimizer.step()
    return loss.item()


def unit() -> Tensor:
    """Images as a loader's ``ToTensor`` makes them."""
    return torch.tensor(digits().images_NCHW) / 255


def normalised() -> Tensor:
    return (unit() - MEAN) / STD


def whole(model: nn.Module) -> nn.Module:
    return model


def net_of(model: nn.Module) -> nn.Module:
    assert isinstance(model, Normalized)
    return model.net


def box_of(
    model: nn.Module,
    inputs: Callable[[], Tensor],
    *,
    trained: Callable[[nn.Module], nn.Module] = whole,
    own: bool = True,
    settings: Settings | None = SETTINGS,
    **options: Any,
) -> Callable[[Context], ModuleBlackBox]:
    def make(context: Context) -> ModuleBlackBox:
        return ModuleBlackBox(
            context,
            model,
            lambda found: adam(trained(found), inputs()),
            SHAPE,
            10,
            200,
            own=digits() if own else None,
            settings=settings,
            **options,
        )

    return make


def softmax(images: FloatArray) -> FloatArray:
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    found: FloatArray = scipy.special.softmax(images.reshape(len(images), -1) @ weights, axis=1)
    return found


def plain() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return mlp(SHAPE, 10)


def in_front() -> nn.Module:
    return Normalized(plain(), MEAN, STD)


def in_range() -> Tensor:
    return 2 * unit() - 1


def warnings_of(
    make: Callable[[Context], Any],
    caplog: pytest.LogCaptureFixture,
    central: nn.Module | None = None,
) -> list[str]:
    app = ClientApp()
    register_endpoints(app, make)
    central = central or plain()
    caplog.clear()
    # What distillation costs so small a model is another warning's subject.
    nodes = {
        number: {"partition-id": number, "num-partitions": 2, "max-accuracy-loss": 100.0}
        for number in range(2)
    }
    grid = InProcessGrid(app, {}, 2, node_configs=nodes)
    FedZGE(SETTINGS, central).start(grid, ArrayRecord(central.state_dict()))
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


RIGHT = {
    "images in the range": box_of(plain(), in_range),
    "without own images": box_of(plain(), in_range, own=False),
    "moved and covered": box_of(plain(), lambda: in_range().roll(1, 3) * (torch.rand(8, 8) > 0.1)),
    "a normalising loader": box_of(in_front(), normalised, trained=net_of),
    "the same without own images": box_of(in_front(), normalised, trained=net_of, own=False),
    "the whole in the range": box_of(in_front(), in_range),
    "the settings' training": lambda context: ModuleBlackBox(
        context, plain(), None, SHAPE, 10, 200, own=digits(), settings=SETTINGS
    ),
    "its own test": box_of(plain(), in_range, test=lambda model: (0.5, 0.3), num_test_examples=10),
    "probabilities that are said to be": box_of(
        nn.Sequential(plain(), nn.Softmax(dim=1)), in_range, output="probabilities"
    ),
    "a function's, likewise": lambda context: FunctionBlackBox(
        context, softmax, SHAPE, 10, 200, output="probabilities"
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_warns_of_nothing(name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(RIGHT[name], caplog) == []


_FIX = "wrap the model in fedzge_flwr.Normalized(model, mean, std), and let `train` train its `net`"
MISTAKES: dict[str, tuple[Callable[[Context], Any], tuple[str, ...]]] = {
    "normalised twice": (box_of(in_front(), normalised), ("`train` shows the model", _FIX)),
    "the same without own images": (
        box_of(in_front(), normalised, own=False),
        ("it is asked about such from -0.81 to 1.89", _FIX),
    ),
    "another normalisation": (
        box_of(plain(), normalised),
        ("images from -0.81 to 1.89, of mean 0.0", "as `own` has them", _FIX),
    ),
    "another, without own images": (
        box_of(plain(), normalised, own=False),
        ("images from -0.81 to 1.89; it is asked about such from -1.00 to 1.00", _FIX),
    ),
    "images given by name": (
        box_of(Named(), lambda: normalised()[:150], own=False),
        ("images from -0.81 to 1.89; it is asked about such from -1.00 to 1.00", _FIX),
    ),
    "images in [0, 1]": (box_of(plain(), unit), ("images from 0.00 to 1.00, of mean 0.3", _FIX)),
    "the same, without own images": (
        box_of(plain(), unit, own=False),
        ("images from 0.00 to 1.00; it is asked about such from -1.00 to 1.00", _FIX),
    ),
    "a loader that does not normalise": (
        box_of(in_front(), unit, trained=net_of),
        ("of mean 0.31 and deviation 0.38", "they have 0.0", _FIX),
    ),
    "a test that is far better": (
        lambda context: ModuleBlackBox(
            context,
            plain(),
            lambda model: 0.0,
            SHAPE,
            10,
            200,
            own=digits(),
            test=lambda model: (0.1, 0.99),
            num_test_examples=10,
            settings=SETTINGS,
        ),
        ("a client's own test has 99% right, and the same model ", _FIX),
    ),
    "a softmax": (
        box_of(nn.Sequential(plain(), nn.Softmax(dim=1)), in_range),
        ("round 1: clients 0, 1 answered with probabilities", 'black box output="probabilities"'),
    ),
    "a function's softmax": (
        lambda context: FunctionBlackBox(context, softmax, SHAPE, 10, 200),
        ("round 1: clients 0, 1 answered with probabilities", 'black box output="probabilities"'),
    ),
    "settings of its own": (
        box_of(plain(), in_range, settings=make_settings(**GIVEN, weight_decay=0.001)),
        (
            "clients 0, 1: other settings than this run's of 'weight-decay' (here 0.0005): "
            "give the black box the server's, settings=…",
        ),
    ),
    "no settings": (
        box_of(plain(), in_range, settings=None),
        ("'client-distill-steps' (here 2), 'local-rounds' (here 1)",),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_warning_that_names_the_fix(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, told = MISTAKES[name]
    (warning,) = warnings_of(make, caplog)
    for part in told:
        assert part in warning
    assert "\n" not in warning


def test_a_central_model_that_ends_in_a_softmax(caplog: pytest.LogCaptureFixture) -> None:
    central = nn.Sequential(plain(), nn.Softmax(dim=1))
    (warning,) = warnings_of(RIGHT["images in the range"], caplog, central)
    assert "the central model returns probabilities" in warning
    assert "leave out its softmax" in warning


def test_images_in_the_unit_range_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    images, labels = unit().numpy(), digits().labels_N
    for _ in range(2):
        ImageSet.from_inputs(images, labels)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "the images go from 0.00 to 1.00" in warning
    assert "give 2 * images - 1" in warning


def test_images_of_the_range_are_not(caplog: pytest.LogCaptureFixture) -> None:
    labels = digits().labels_N
    ImageSet.from_inputs(in_range(), labels)
    # All grey, and a single one: it may be bright.
    ImageSet.from_inputs(np.zeros((2, *SHAPE), np.float32), labels[:2])
    ImageSet.from_inputs(unit()[:1], labels[:1])
    assert caplog.records == []


@pytest.mark.parametrize("returned", [{"loss": 1.0}, (1.0, 2.0), "low", np.zeros(2)])
def test_a_training_that_returns_no_loss_is_told_what_to_return(returned: object) -> None:
    box = ModuleBlackBox(context_of(), plain(), lambda model: returned, SHAPE, 10, 200)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError) as error:
        box.fit(1)
    name = type(returned).__name__
    assert str(error.value) == (
        f"`train` returned a {name}: return the round's loss as a number, or None"
    )


@pytest.mark.parametrize(("returned", "loss"), [(None, 0.0), (2, 2.0), (torch.tensor(0.5), 0.5)])
def test_a_loss_is_any_number(returned: object, loss: float) -> None:
    box = ModuleBlackBox(context_of(), plain(), lambda model: returned, SHAPE, 10, 200)  # type: ignore[arg-type,return-value]
    assert box.fit(1).loss == loss


def test_the_apps_own_black_box_learns_by_the_runs_settings(
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = make_settings(
        **{key: value for key, value in TINY.items() if key not in ("image_shape", "num_classes")},
        num_train_images=100,
        num_test_images=20,
    )
    app = ClientApp()
    register_endpoints(app, lambda context: torch_black_box(context, settings))
    central = plain()
    grid = InProcessGrid(app, {}, 2)
    FedZGE(settings, central).start(grid, ArrayRecord(central.state_dict()))
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize(
    ("shape", "number", "told"),
    [
        (
            (3, 224, 224),
            2200,
            "each client gets 331 MB of images a round: 'synthetic-batch-size' = 2200 of "
            "3×224×224; 425 are 64 MB, and take 5 times as many rounds for as many queries",
        ),
        ((3, 224, 224), 400, ""),
        ((3, 32, 32), 2200, ""),
        ((3, 64, 64), 2200, ""),
    ],
)
def test_a_round_of_many_bytes_is_told_before_it_begins(
    shape: tuple[int, int, int], number: int, told: str
) -> None:
    settings = make_settings(image_shape=shape, num_classes=10, synthetic_batch_size=number)
    assert notice_of_size(settings) == told
