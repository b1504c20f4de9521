from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.models.catalogue import MODELS, build_model, rebuild_model
from fedzge_flwr.learning.tensors import state_arrays
from fedzge_flwr.server.build import check_names
from fedzge_flwr.synthesis.generators import (
    GENERATORS,
    ConditionalGenerator,
    UnconditionalGenerator,
)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_every_model_takes_grey_and_colour(name: str, shape: tuple[int, int, int]) -> None:
    model = build_model(name, shape, 7).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", ["cnn", "cnn5", "resnet18", "resnet18-3x3"])
def test_digits_are_large_enough_to_train_on(name: str) -> None:
    model = build_model(name, (1, 8, 8), 10).train()
    model(torch.randn(2, 1, 8, 8)).sum().backward()


def test_a_unit_of_the_cnn_that_says_nothing_can_still_learn() -> None:
    """Below 0 on all images: a unit that were 0 there would have no gradient from then on."""
    model = build_model("cnn", (1, 8, 8), 10).eval()
    (hidden, _) = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        hidden.bias.fill_(-100.0)
    model(torch.randn(4, 1, 8, 8)).square().sum().backward()
    assert hidden.weight.grad is not None
    assert (hidden.weight.grad.abs().sum(dim=1) > 0).all()


def test_five_convolutions_are_narrow_ones_of_a_vgg() -> None:
    """9·(3·32 + 32·64 + 64² + 64·128 + 128²) weights, 2·416 of batch norm, 2,048·10 + 10 linear."""
    model = build_model("cnn5", (3, 32, 32), 10)
    assert sum(p.numel() for p in model.parameters()) == 277_344 + 832 + 20_490
    kinds = [type(layer) for layer in model.modules()]
    assert [kinds.count(kind) for kind in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)] == [5, 5, 3]


def test_resnet_is_torchvisions() -> None:
    """The number of parameters of the published ResNet-18 for 1,000 classes and colour images."""
    model = build_model("resnet18", (3, 224, 224), 1000)
    assert sum(p.numel() for p in model.parameters()) == 11_689_512


def test_what_leaves_as_safetensors_is_plain_torchvisions(tmp_path: Path) -> None:
    """The FAQ's recipe: no code of ours, the same answers."""
    ours = build_model("resnet18", (3, 32, 32), 10)
    ours(torch.randn(8, 3, 32, 32))  # running statistics that are not the initial ones
    save_file(state_arrays(ours), tmp_path / "central.safetensors")
    plain = torchvision.models.resnet18(num_classes=10)
    plain.load_state_dict(load_file(tmp_path / "central.safetensors"))
    images = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        # Another memory layout adds up in another order.
        torch.testing.assert_close(plain.eval()(images), ours.eval()(images), atol=1e-4, rtol=1e-4)


def test_small_stem_keeps_the_resolution() -> None:
    model = build_model("resnet18-3x3", (1, 32, 32), 10)
    assert isinstance(model.maxpool, nn.Identity)
    assert model.conv1(torch.zeros(1, 1, 32, 32)).shape[-1] == 32


def test_unknown_model_lists_the_known() -> None:
    with pytest.raises(
        ConfigError, match=r"no model named 'vgg'; known: cnn, cnn5, gabor-linear, resnet18"
    ):
        build_model("vgg", (1, 8, 8), 10)


def test_generator_has_the_papers_size() -> None:
    generator = ConditionalGenerator((3, 32, 32), 10, latent_dim=100, width=64)
    assert sum(p.numel() for p in generator.parameters()) == pytest.approx(2.04e6, rel=0.005)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_generator_fills_the_shared_range(shape: tuple[int, int, int]) -> None:
    generator = ConditionalGenerator(shape, 10, latent_dim=6, width=4)
    x = generator(torch.randn(64, 6), torch.arange(64) % 10).detach()
    assert x.shape == (64, *shape)
    assert float(x.min()) >= PIXEL_RANGE.low
    assert float(x.max()) <= PIXEL_RANGE.high
    # A tanh that was not scaled to the range would stay in half of it, or leave it.
    assert float(x.max() - x.min()) > 0.5 * (PIXEL_RANGE.high - PIXEL_RANGE.low)


def test_generator_depends_on_the_label() -> None:
    generator = ConditionalGenerator((1, 8, 8), 10, latent_dim=6, width=4).eval()
    z = torch.randn(1, 6)
    assert not torch.equal(generator(z, torch.tensor([0])), generator(z, torch.tensor([1])))


def test_an_unconditional_generator_depends_on_the_noise_alone() -> None:
    generator = UnconditionalGenerator((1, 8, 8), 10, latent_dim=6, width=4).eval()
    z = torch.randn(2, 6)
    images = generator(z, torch.tensor([0, 0]))
    assert torch.equal(images, generator(z, torch.tensor([7, 3])))
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize("shape", [(1, 30, 30), (3, 5, 7), (3, 9, 4)])
def test_any_sides(name: str, shape: tuple[int, int, int]) -> None:
    generator = GENERATORS[name](shape, 10, latent_dim=6, width=4)
    images = generator(torch.randn(3, 6), torch.arange(3))
    assert images.shape == (3, *shape)


def test_an_unknown_generator_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="no generator named 'gan'; known: conditional, uncond"):
        check_names(from_run_config({"generator": "gan"}))
    with pytest.raises(ConfigError, match="no estimator named 'adjoint'; known: batch-difference"):
        check_names(from_run_config({"estimator": "adjoint"}))


def test_an_image_of_other_sides_is_the_middle_of_a_larger_one() -> None:
    small, large = (
        ConditionalGenerator((1, side, side), 10, latent_dim=6, width=4).eval() for side in (6, 8)
    )
    small.load_state_dict(large.state_dict())
    z, y = torch.randn(2, 6), torch.tensor([1, 2])
    assert torch.equal(small(z, y), large(z, y)[:, :, 1:7, 1:7])


def test_pixel_range_round_trip() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    images = PIXEL_RANGE.from_uint8(values)
    assert (float(images[0]), float(images[-1])) == pytest.approx(
        (PIXEL_RANGE.low, PIXEL_RANGE.high)
    )
    assert torch.equal(PIXEL_RANGE.to_uint8(images), values)
    unit = torch.tensor([-1.0, 0.0, 1.0])
    middle = (PIXEL_RANGE.low + PIXEL_RANGE.high) / 2
    assert PIXEL_RANGE.from_unit(unit).tolist() == [PIXEL_RANGE.low, middle, PIXEL_RANGE.high]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_rebuilt_model_is_the_same(name: str) -> None:
    model = build_model(name, (3, 32, 32), 5).eval()
    state = {key: tensor.clone().contiguous() for key, tensor in model.state_dict().items()}
    again = rebuild_model(name, (3, 32, 32), 5, state).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(images), again(images))
    assert again.state_dict().keys() == state.keys()


def test_rebuilt_models_share_nothing() -> None:
    states = [build_model("cnn", (1, 8, 8), 3).state_dict() for _ in range(2)]
    first, second = (rebuild_model("cnn", (1, 8, 8), 3, state) for state in states)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.fill_(9.0)
    assert all((value != 9.0).any() for value in second.state_dict().values() if value.ndim)
    third = rebuild_model("cnn", (1, 8, 8), 3, {k: v.clone() for k, v in states[1].items()})
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in third.state_dict().items())


def test_another_model_may_take_a_name_over(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (3, 5):
        monkeypatch.setitem(
            MODELS,
            "mine",
            lambda shape, classes, width=width: nn.Sequential(
                nn.Flatten(), nn.Linear(1, width), nn.Linear(width, classes)
            ),
        )
        state = build_model("mine", (1, 1, 1), 2).state_dict()
        assert rebuild_model("mine", (1, 1, 1), 2, state)[2].weight.shape == (2, width)


class Awkward(nn.Module):
    """Keeps a buffer out of its state, and reads a value while it is built."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, num_classes)
        self.register_buffer("scale", torch.full((1,), 3.0), persistent=False)
        self.bound = float(self.linear.weight.abs().max().item())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.linear(x.flatten(1))


def test_rebuilding_a_model_that_cannot_be_built_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "awkward", lambda shape, num_classes: Awkward(num_classes))
    model = build_model("awkward", (1, 2, 2), 3)
    again = rebuild_model("awkward", (1, 2, 2), 3, model.state_dict())
    x = torch.randn(2, 1, 2, 2)
    assert torch.equal(model(x), again(x))
