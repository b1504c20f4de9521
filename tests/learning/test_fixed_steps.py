"""A fixed step around a model: what it computes, and whose the state is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize

from fedzge_flwr import MODELS, Normalized, Rescaled, export_onnx
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.learning.around import Around, inputs_within, model_within
from fedzge_flwr.learning.fixed_steps import OfProbabilities
from fedzge_flwr.learning.models.catalogue import build_model, model_ways, rebuild_model
from fedzge_flwr.learning.tensors import load_arrays, plain_state, state_arrays

SHAPE = (3, 8, 8)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
X = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10)
    ).eval()


def wrapped(inner: nn.Module) -> list[nn.Module]:
    return [
        Normalized(inner, MEAN, STD),
        Rescaled(inner, 2.0),
        OfProbabilities(inner),
        Normalized(Rescaled(inner, 2.0), MEAN, STD),
    ]


def test_normalized_is_torchvisions_normalize() -> None:
    model, unit = net(), 2 * X - 1
    wanted = model(Normalize(MEAN, STD)(X))
    torch.testing.assert_close(Normalized(model, MEAN, STD)(unit), wanted, rtol=1e-4, atol=1e-5)
    one = model(Normalize([0.3] * 3, [0.2] * 3)(X))
    torch.testing.assert_close(Normalized(model, 0.3, 0.2)(unit), one, rtol=1e-4, atol=1e-5)
    as_tensors = Normalized(model, torch.tensor(MEAN), torch.tensor(STD))
    torch.testing.assert_close(as_tensors(unit), wanted, rtol=1e-4, atol=1e-5)


def test_probabilities_become_logits_of_the_same_softmax() -> None:
    model = nn.Sequential(net(), nn.Softmax(dim=1))
    found = OfProbabilities(model)(X)
    torch.testing.assert_close(found.softmax(dim=1), model(X))
    impossible = OfProbabilities(nn.Sequential(net(), nn.Hardtanh(0.0, 1e-9)))
    assert torch.isfinite(impossible(X)).all()


def test_rescaled_multiplies_whatever_logits_come_in() -> None:
    class InADict(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": x.flatten(1)[:, :10]}

    torch.testing.assert_close(Rescaled(InADict(), 0.5)(X), X.flatten(1)[:, :10] / 2)


@pytest.mark.parametrize("which", range(4))
def test_a_state_is_the_models_own(which: int) -> None:
    """So that a file of one loads into the other, nested and copied ones too."""
    inner, given = net(), net()
    for tensor in given.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(0.5)
    model = wrapped(inner)[which]
    assert list(model.state_dict()) == list(inner.state_dict())
    for target in (model, copy.deepcopy(model), wrapped(inner)[which]):
        target.load_state_dict(given.state_dict())
        for name, tensor in model_within(target).state_dict().items():
            assert torch.equal(tensor, given.state_dict()[name])
    outer = nn.Sequential(wrapped(net())[which], nn.Identity())
    outer.load_state_dict(nn.Sequential(model, nn.Identity()).state_dict(), assign=True)
    assert torch.equal(outer(X), model(X))
    load_arrays(model, state_arrays(net()))
    assert list(plain_state(model)) == list(inner.state_dict())


def test_an_error_names_what_the_models_own_state_lacks() -> None:
    state = net().state_dict()
    state["3.weights"] = state.pop("3.weight")
    with pytest.raises(RuntimeError) as error:
        Normalized(net(), MEAN, STD).load_state_dict(state)
    assert 'Missing key(s) in state_dict: "3.weight"' in str(error.value)
    assert 'Unexpected key(s) in state_dict: "3.weights"' in str(error.value)


def test_a_compiled_model_within_has_plain_names() -> None:
    model = Normalized(torch.compile(net()), MEAN, STD)
    assert list(plain_state(model)) == list(net().state_dict())
    load_arrays(model, state_arrays(net()))


def test_what_the_model_within_is_given() -> None:
    inner = net()
    model = Normalized(Rescaled(inner, 3.0), MEAN, STD)
    assert model_within(model) is inner
    wanted = Normalize(MEAN, STD)((X + 1) / 2)
    torch.testing.assert_close(inputs_within(model, X), wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(inputs_within(inner, X), X)


@pytest.mark.usefixtures("registries")
def test_a_registered_model_may_be_one() -> None:
    """Whatever a message's rebuilding does, it keeps the mean that is in no state."""
    MODELS["normalised"] = lambda shape, num_classes: Normalized(net(), MEAN, STD)
    model_ways("normalised", SHAPE, 10)
    model = build_model("normalised", SHAPE, 10).eval()
    again = rebuild_model("normalised", SHAPE, 10, dict(model.state_dict())).eval()
    assert isinstance(again, Around)
    torch.testing.assert_close(again(X), model(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mean", "std", "problem"),
    [
        (0.5, 0.0, "std above 0"),
        (0.5, (0.2, -0.1, 0.2), "std above 0"),
        (float("nan"), 0.5, "give finite numbers"),
        ((0.1, 0.2), (0.1, 0.2, 0.3), "mean is of 2 channels and std of 3"),
    ],
)
def test_what_is_no_normalisation_is_refused(mean: object, std: object, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Normalized(net(), mean, std)  # type: ignore[arg-type]


@pytest.mark.parametrize("by", [0.0, -1.0, float("inf"), float("nan")])
def test_what_is_no_scale_is_refused(by: float) -> None:
    with pytest.raises(ConfigError, match="give a number above 0"):
        Rescaled(net(), by)


def test_it_is_written_as_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = Rescaled(Normalized(net(), MEAN, STD), 2.0)
    export_onnx(model, tmp_path / "model.onnx", SHAPE)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {"images": X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(X), rtol=1e-3, atol=1e-4)
