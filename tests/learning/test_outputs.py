"""What classifiers return, and what they are called in a state."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from fedzge_flwr import ModuleBlackBox, export_onnx, make_settings
from fedzge_flwr.common.errors import ConfigError, OutputError
from fedzge_flwr.learning.outputs import check_aside, check_model, logits_of
from fedzge_flwr.learning.predict import predict
from fedzge_flwr.learning.tensors import load_plain, plain_state, state_arrays, unwrapped
from tests.helpers.boxes import QUERY, SHAPE, context_of, digits
from tests.helpers.small_models import mlp


class ModelOutput(OrderedDict[str, Tensor]):
    """As Hugging Face has it: a dict whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Heads(NamedTuple):
    logits: Tensor
    aux_logits: Tensor


class Returning(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = mlp(SHAPE, 10), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


WRAPS: dict[str, Any] = {
    "tensor": lambda y: y,
    "Hugging Face": lambda y: ModelOutput(loss=y.sum(), logits=y),
    "dict": lambda y: {"logits": y, "features": y},
    "heads": lambda y: Heads(y, y),
    "half": lambda y: y.half(),
    "bfloat16": lambda y: y.bfloat16(),
    "double": lambda y: y.double(),
}


@pytest.mark.parametrize("name", WRAPS)
def test_logits_are_taken_from_what_has_them(name: str) -> None:
    """Asked, trained and distilled, as if they were returned alone."""
    model = Returning(WRAPS[name])
    plain = unwrapped(model.inner)
    own = digits(num=40)
    settings = make_settings(min_local_steps=2, client_distill_steps=2)
    boxes = [
        ModuleBlackBox(context_of(), each, None, SHAPE, 10, 40, own=own, settings=settings)
        for each in (model, plain)
    ]
    states = []
    for box in boxes:
        assert box.profile().num_examples == 40
        box.fit(1)
        box.distill(1, QUERY, np.eye(7, 10, dtype=np.float32), 1.5)
        assert box.logits(QUERY).dtype == np.float32
        states.append(box.logits(QUERY))
    exact = name not in ("half", "bfloat16")
    np.testing.assert_allclose(*states, atol=1e-6 if exact else 0.1)


def test_torchvisions_heads_in_training_mode() -> None:
    model = torchvision.models.googlenet(
        num_classes=3, aux_logits=True, init_weights=False, weights=None
    )
    assert isinstance(model.train()(torch.zeros(2, 3, 64, 64)), tuple)
    check_model(model, (3, 64, 64), 3)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((torch.zeros(1), 2), "a tuple"),
        ([torch.zeros(1)], "a list"),
        ({"out": torch.zeros(1)}, "a dict without 'logits'"),
        (ModelOutput(loss=torch.zeros(1)), "a ModelOutput without 'logits'"),
        (None, "a NoneType"),
        (np.zeros(3), "a ndarray"),
    ],
)
def test_what_has_no_logits(found: object, said: str) -> None:
    with pytest.raises(OutputError, match=f"the model returns {said}: return logits"):
        logits_of(found)


def test_a_model_that_is_checked_stays_as_it_is() -> None:
    """Running statistics, gradients, mode and torch's generator included."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.5), mlp(SHAPE, 10))
    uncopied = nn.Sequential(nn.BatchNorm2d(1), mlp(SHAPE, 10))
    uncopied.held = model[2](torch.zeros(2, *SHAPE))  # a tensor with a past cannot be copied
    for each in (model, uncopied):
        for training in (True, False):
            each.train(training)
            before = {name: value.clone() for name, value in each.state_dict().items()}
            drawn = torch.get_rng_state()
            with check_aside(each) as checked:
                check_model(checked, SHAPE, 10)
            assert each.training == training
            assert torch.equal(torch.get_rng_state(), drawn)
            assert all(parameter.grad is None for parameter in each.parameters())
            for name, value in each.state_dict().items():
                assert torch.equal(value, before[name])


def test_a_client_says_at_once_what_its_model_lacks() -> None:
    def box(model: Any) -> ModuleBlackBox:
        return ModuleBlackBox(context_of(), model, lambda _: 0.0, SHAPE, 10, 5)

    with pytest.raises(OutputError, match="the client's model returns a tuple for 2 images in ev"):
        box(Returning(lambda y: (y, y))).profile()
    with pytest.raises(OutputError, match="the client's model has no parameters to train"):
        box(nn.Flatten()).profile()
    once = mlp(SHAPE, 10)
    with pytest.raises(ConfigError, match="gives the same one each time, which all clients of"):
        box(lambda: once).profile()
    held = mlp(SHAPE, 10)
    held.held = held(torch.zeros(2, *SHAPE))
    with pytest.raises(ConfigError, match=r"cannot be copied \(RuntimeError: Only .*: give a fun"):
        box(held).logits(QUERY)


def wrapped() -> dict[str, nn.Module]:
    inside = nn.Sequential(torch.compile(mlp(SHAPE, 12), backend="eager"), nn.Linear(12, 10))
    return {
        "compiled": torch.compile(mlp(SHAPE, 10), backend="eager"),
        "parallel": nn.DataParallel(mlp(SHAPE, 10)),
        "both": nn.DataParallel(torch.compile(mlp(SHAPE, 10), backend="eager")),
        "inside": inside,
    }


@pytest.mark.parametrize("name", ["compiled", "parallel", "both", "inside"])
def test_wrappers_leave_no_trace_in_names(name: str) -> None:
    model = wrapped()[name]
    plain = mlp(SHAPE, 10) if name != "inside" else nn.Sequential(mlp(SHAPE, 12), nn.Linear(12, 10))
    state = plain_state(model)
    assert state_arrays(model).keys() == state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    images = torch.from_numpy(QUERY)
    assert torch.equal(predict(plain, images, 4), predict(model, images, 4))
    # The other way round, and names of a wrapped model into any.
    for into in (*([wrapped()[name]]), mlp(SHAPE, 10) if name != "inside" else plain):
        for given in (state, model.state_dict()):
            load_plain(into, given)
            assert torch.equal(predict(into, images, 4), predict(model, images, 4))


def test_a_part_that_is_called_module_keeps_its_name() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    own = Own()
    assert set(plain_state(own)) == {"module.weight", "module.bias"}
    load_plain(own, plain_state(own))


def test_onnx_of_a_model_that_returns_an_object(tmp_path: Any) -> None:
    import onnxruntime

    model = Returning(WRAPS["dict"])
    export_onnx(model, tmp_path / "model.onnx", SHAPE)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(["logits"], {"images": QUERY})
    np.testing.assert_allclose(found, predict(model, torch.from_numpy(QUERY), 9), atol=1e-5)
