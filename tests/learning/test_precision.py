"""``training-precision``: what is multiplied in bfloat16, and what never is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedzge_flwr.config.sections import OptimizerSettings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.distillation import distill, distill_levels
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.training import OwnImages, fit

SHAPE = (1, 6, 6)
KIND = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Watched(nn.Module):
    """A linear classifier with batch norm that notes what it multiplied in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm2d(1), nn.Linear(36, 3)
        self.kinds: list[torch.dtype] = []

    def forward(self, x_NCHW: Tensor) -> Tensor:
        found: Tensor = self.linear(self.norm(x_NCHW).flatten(1))
        self.kinds.append(found.dtype)
        return found


@pytest.fixture
def model() -> Watched:
    torch.manual_seed(3)
    return Watched()


def taught(model: Watched, way: str, name: str, steps: int = 3) -> float:
    """Train a model in one of the three ways, and return the loss that is reported."""
    stream = torch.Generator().manual_seed(5)
    levels = torch.randint(256, (24, *SHAPE), dtype=torch.uint8, generator=stream)
    x_NCHW = PIXEL_RANGE.from_uint8(levels)
    teacher_NK = 3 * x_NCHW.flatten(1)[:, :3]
    settings = OptimizerSettings(training_precision=name, lr_schedule="none")  # type: ignore[arg-type]
    if way == "fit":
        own = OwnImages(levels, teacher_NK.argmax(dim=1), None)
        return fit(
            model, own, epochs=steps, batch_size=24, lr=0.1, settings=settings, stream=stream
        )
    if way == "distill":
        return distill(
            model,
            x_NCHW,
            teacher_NK,
            steps=steps,
            batch_size=0,
            temperature=1.0,
            lr=0.1,
            settings=settings,
            stream=stream,
        )
    return distill_levels(
        model,
        levels,
        teacher_NK,
        torch.optim.Adam(model.parameters(), lr=0.1),
        None,
        steps=steps,
        batch_size=0,
        temperature=1.0,
        settings=settings,
        stream=stream,
        class_balance=0.0,
    )


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", ["fit", "distill", "distill_levels"])
def test_training_multiplies_in_it_and_keeps_float32(model: Watched, way: str, name: str) -> None:
    taught(model, way, name)
    assert set(model.kinds) == {KIND[name]}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert model.norm.running_mean is not None
    assert model.norm.running_mean.dtype == torch.float32
    model.kinds.clear()
    found_NK = predict(model, torch.zeros(4, *SHAPE), 2)
    assert found_NK.dtype == torch.float32
    assert set(model.kinds) == {torch.float32}


@pytest.mark.parametrize("way", ["fit", "distill", "distill_levels"])
def test_each_step_sees_the_weights_of_the_one_before(way: str) -> None:
    """Autocast would keep the weights of the first step if all were within one context."""
    finals, first = {}, {}
    for name in KIND:
        for steps, losses in ((1, first), (60, finals)):
            torch.manual_seed(3)
            losses[name] = taught(Watched(), way, name, steps)
    assert finals["float32"] < 0.5 * first["float32"]
    assert finals["bfloat16"] == pytest.approx(finals["float32"], rel=0.1, abs=0.01)
    assert finals["bfloat16"] != finals["float32"]
