"""Mistakes in what comes from outside the package: one line that names the part and the fix."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedzge_flwr import (
    DATASETS,
    ENSEMBLES,
    ESTIMATORS,
    LOADERS,
    OBJECTIVES,
    CheckpointFolder,
    ClassifierBlackBox,
    ClientEvaluation,
    DatasetSpec,
    Directions,
    FedZGE,
    FedZGEError,
    FitReport,
    FunctionBlackBox,
    Observer,
    export_onnx,
    generator_objective,
    make_settings,
    register_endpoints,
)
from fedzge_flwr.common.errors import CheckpointError, ConfigError, DataError, DivergenceError
from fedzge_flwr.data.loading import load_split
from tests.helpers.boxes import SHAPE, TINY
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.small_models import mlp

pytestmark = pytest.mark.usefixtures("registries")

WEIGHTS = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32) / 8


def linear(images: Any) -> Any:
    return images.reshape(len(images), -1) @ WEIGHTS


def app_of(make: Callable[[Context], Any] | None = None) -> ClientApp:
    app = ClientApp()
    register_endpoints(
        app, make or (lambda context: FunctionBlackBox(context, linear, SHAPE, 10, 20))
    )
    return app


def run(
    *,
    central: nn.Module | None = None,
    generator: nn.Module | None = None,
    app: ClientApp | None = None,
    arrays: ArrayRecord | None = None,
    num_rounds: int | None = None,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> InProcessGrid:
    central = central or mlp(SHAPE, 10)
    strategy = FedZGE(make_settings(**{**TINY, **settings}), central, generator, **(options or {}))
    grid = InProcessGrid(app or app_of(), {}, 2)
    strategy.start(grid, arrays or ArrayRecord(central.state_dict()), num_rounds)
    return grid


def refused(error: type[Exception], message: str, **given: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        run(**given)
    assert "\n" not in str(caught.value)


class Drawing(nn.Module):
    """A generator that does with its layer's output what it is told."""

    def __init__(self, finish: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(100, 64)
        self.finish = finish

    def forward(self, z: Tensor, y: Tensor) -> Any:
        return self.finish(self.layer(z).tanh().unflatten(1, SHAPE))


@pytest.mark.parametrize(
    ("finish", "error", "message"),
    [
        (
            lambda x: x.flatten(1),
            ConfigError,
            r"generator returned \(4, 64\) for 4 images: return \(4,",
        ),
        (lambda x: x.repeat(1, 3, 1, 1), ConfigError, r"returned \(4, 3, 8, 8\) for 4"),
        (lambda x: [x], ConfigError, "generator returned list for 4 images"),
        (lambda x: x.detach(), ConfigError, "no graph behind them"),
        (
            lambda x: 255 * x,
            ConfigError,
            r"images go from -\d+\.?\d* to \d+\.?\d*: end it in a tanh",
        ),
        (lambda x: x * math.nan, DivergenceError, "generator's images are not finite; lower 'gen"),
    ],
)
def test_generators(finish: Any, error: type[Exception], message: str) -> None:
    refused(error, message, generator=Drawing(finish))


def test_a_generator_that_is_as_it_should() -> None:
    run(generator=Drawing(lambda x: x))


@pytest.mark.parametrize(
    ("central", "message"),
    [
        (
            lambda: mlp(SHAPE, 7),
            r"central model returns \(2, 7\) for 2 images in evaluation mode: return logits \(2",
        ),
        (
            lambda: mlp((1, 9, 9), 10),
            r"takes no float32 images of shape \(2, 1, 8, 8\) in evaluation mode \(Runtime",
        ),
        (
            lambda: mlp(SHAPE, 10).double(),
            r"takes no float32 images of shape .*; its parameters are torch.float64: give model.fl",
        ),
        (lambda: Pair(8, 8), "central model returns a tuple for 2 images in evaluation mode: ret"),
    ],
)
def test_central_models(central: Callable[[], nn.Module], message: str) -> None:
    refused(ConfigError, message, central=central())


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return x, x


def test_initial_arrays_of_another_model() -> None:
    arrays = ArrayRecord(mlp((1, 9, 9), 10).state_dict())
    refused(ConfigError, "initial_arrays are not a state of this central model", arrays=arrays)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda answers: np.full((len(answers.logits[0]), 10), -np.inf), "that are not finite"),
        (lambda answers: answers.logits[0] * np.nan, "that are not finite"),
        (lambda answers: answers.logits[0].T, r"returned shape \(10, \d+\) for logits of shape"),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.25])
def test_ensembles(answer: Any, message: str, share: float) -> None:
    ENSEMBLES["mine"] = answer
    message = "ensemble 'mine' returned .*" + message.removeprefix("returned ")
    refused(ConfigError, message, ensemble="mine", generator_share=share)


@pytest.mark.parametrize(
    "total",
    [
        lambda x, z, y, e, c, w: torch.zeros(()),
        lambda x, z, y, e, c, w: generator_objective(x, z, y, e, c, w)["total"].detach(),
    ],
)
def test_objectives_without_a_gradient(total: Any) -> None:
    OBJECTIVES["mine"] = lambda *given: {"total": total(*given)}
    refused(ConfigError, "objective 'mine': 'total' depends on neither", objective="mine")


def test_a_term_does_not_stand_for_a_figure_of_the_run() -> None:
    losses = []

    class Losses(Observer):
        def on_round(self, server: object, current: object, row: Any) -> None:
            losses.append(row.loss)

    OBJECTIVES["mine"] = lambda *given: {
        **generator_objective(*given),
        "central_distillation": torch.tensor(-1.0),
    }
    run(objective="mine", options={"observers": [Losses()]})
    assert len(losses) == 2
    assert all(loss["central_distillation"] > 0 for loss in losses)


@pytest.mark.parametrize(
    ("ask", "tell", "message"),
    [
        (lambda q: q.about(q.base / 2), None, "must ask about the very images"),
        (lambda q: q.about(torch.from_numpy(q.base)), None, r"must return .*: x\.cpu\(\)\.numpy"),
        (lambda q: None, None, "must return a Question whose images are a NumPy array"),
        (
            lambda q: replace(q, directions=Directions.none(SHAPE, len(q.base))),
            None,
            r"asks about 1 copies of an image, and clients expect 3: say so in COPIES\['mine'\]",
        ),
        (
            None,
            lambda e: replace(e, gradient_NCHW=e.gradient_NCHW.flatten(1)),
            r"returned a gradient of shape \(4, 64\) for images of shape \(4, 1, 8, 8\)",
        ),
    ],
)
def test_estimators(ask: Any, tell: Any, message: str) -> None:
    class Mine(ESTIMATORS["per-image"]):  # type: ignore[misc]
        def ask(self, *given: Any) -> Any:
            found = super().ask(*given)
            return ask(found) if ask else found

        def tell(self, *given: Any) -> Any:
            found = super().tell(*given)
            return tell(found) if tell else found

    ESTIMATORS["mine"] = Mine
    refused(ConfigError, "estimator 'mine' " + message, estimator="mine")


def test_directions_from_tensors() -> None:
    drawn = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    for make in (Directions.ternary, Directions.written_out):
        np.testing.assert_array_equal(make(drawn).decoded(), make(drawn.numpy()).decoded())
    drawn[1, 2] = 0
    with pytest.raises(ValueError, match="a direction that is all zeros or not finite"):
        Directions.ternary(drawn)


class Unwell(ClassifierBlackBox):
    """Fails where it is told to."""

    where = ""

    def logits(self, images: Any) -> Any:
        return linear(self._failing("logits", images))

    def fit(self, round_: int) -> FitReport:
        return FitReport(5, self._failing("fit", 0.5))

    def distill(self, *given: Any) -> float:
        return float(self._failing("distill", 0.5))

    def evaluate(self, split: Any) -> ClientEvaluation:
        self._failing("evaluate", None)
        return super().evaluate(split)

    def state(self) -> Any:
        return {"nothing": np.zeros(1)}

    def load_state(self, state: Any) -> None:
        self._failing("load_state", None)

    def _failing(self, where: str, value: Any) -> Any:
        if where == self.where:
            raise KeyError("label")
        return value


@pytest.mark.parametrize("where", ["logits", "fit", "distill", "evaluate", "load_state"])
def test_what_fails_in_a_client_is_named(where: str, caplog: pytest.LogCaptureFixture) -> None:
    """To the server its kind, in the client's own log the whole line."""

    def make(context: Context) -> Any:
        if context.node_config["partition-id"] == 0:
            return FunctionBlackBox(context, linear, SHAPE, 10, 20)
        box = Unwell(context, SHAPE, 10, 20)
        box.where = where
        return box

    run(app=app_of(make), client_evaluation="held-out")
    said = "it went wrong and the model is as before" if where == "distill" else "Unwell failed"
    told = [line for line in caplog.text.splitlines() if re.search(rf"client 1 .*{said}", line)]
    assert told
    assert all("KeyError; the node's own log says why" in line for line in told)
    assert not any("label" in line for line in told)
    assert "Unwell: KeyError: 'label'" in caplog.text


def test_a_factory_that_fails_is_named() -> None:
    def make(context: Context) -> Any:
        raise AssertionError

    refused(
        FedZGEError,
        "the factory of black boxes failed: AssertionError; the node's own log says why$",
        app=app_of(make),
    )


def test_a_client_that_answers_fewer_images_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def make(context: Context) -> Any:
        most = 22 if context.node_config["partition-id"] == 0 else 1000
        return FunctionBlackBox(context, linear, SHAPE, 10, 20, max_query_images=most)

    run(app=app_of(make))
    assert re.search(r"2\d images with copies; at most 22 here \(the black box's max", caplog.text)


def test_a_client_without_the_common_test_set_is_told_how(caplog: pytest.LogCaptureFixture) -> None:
    class Six:
        labels_M = np.arange(6)

    run(client_evaluation="test", options={"test_set": Six()})
    assert "FunctionBlackBox has no common test set: give it one (`evaluation`" in caplog.text


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (None, r"no loader \(`LOADERS`\) of a data set named 'mine'"),
        (lambda *_: ("images", "labels"), "mine: its loader returned tuple for split 'test'"),
        (lambda folder, *_: np.load(folder / "no.npz"), r"mine: no test images in .*\(\[Errno 2\]"),
        (lambda folder, *_: folder.parent.read_bytes(), r"test images in .* loaded \(IsADirectory"),
        (lambda *_: {}["y"], r"mine: test images in .* cannot be loaded \(KeyError: 'y'\); mend"),
    ],
)
def test_data_sets(load: Any, message: str, tmp_path: Path) -> None:
    DATASETS["mine"] = DatasetSpec(3, SHAPE)
    if load is not None:
        LOADERS["mine"] = load
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        load_split(make_settings(dataset="mine", data_dir=str(tmp_path / "no")).data, "test")
    assert "\n" not in str(caught.value)


def test_image_shapes() -> None:
    assert make_settings(image_shape=(2, 8, 9), num_classes=3).data.spec.image_shape == (2, 8, 9)
    for shape in (8, (3, 32)):
        with pytest.raises(
            ConfigError, match=r"image_shape = .*: give \(channels, height, width\)"
        ):
            make_settings(image_shape=shape, num_classes=3)  # type: ignore[arg-type]


def test_export_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x\.onnx: there is no such folder; make it"):
        export_onnx(mlp(SHAPE, 10), tmp_path / "no" / "x.onnx", SHAPE)
    export_onnx(nn.Flatten(), tmp_path / "x.onnx", SHAPE)


def test_a_checkpoint_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """Before any client is asked."""
    folder = CheckpointFolder(tmp_path / "no" / "checkpoints")
    sent: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InProcessGrid, "push_messages", lambda self, messages: sent.extend(messages))
        refused(
            CheckpointError,
            r"checkpoints cannot be kept in .*no/checkpoints \(No such file.*: make the folder",
            options={"checkpoints": folder},
        )
    assert sent == []


def test_going_on_with_another_number_of_rounds(tmp_path: Path) -> None:
    """Schedules span the run: a longer one would see its learning rates rise again."""
    folder = CheckpointFolder(str(tmp_path / "checkpoints"))
    run(num_rounds=2, options={"checkpoints": folder})
    for number in (1, 4):
        refused(
            CheckpointError,
            f"the run to resume has 2 rounds, this one {number}: go on with as many",
            num_rounds=number,
            options={"resume_from": folder.newest()},
        )
    run(num_rounds=2, options={"resume_from": folder.newest()})
    refused(ValueError, "num_rounds = -1: give 0 or more", num_rounds=-1)


class Closing(Observer):
    """Fails when it is closed, or in a round."""

    def __init__(self, *, fails: str = "") -> None:
        self.fails, self.closed = fails, 0

    def on_round(self, *given: object) -> None:
        if self.fails == "round":
            raise RuntimeError("in a round")

    def on_end(self, server: object, error: BaseException | None) -> None:
        self.closed += 1
        if self.fails == "end":
            raise RuntimeError("at the end")


@pytest.mark.parametrize("fails", ["end", "round", "start"])
def test_every_observer_is_closed(fails: str) -> None:
    first, second = Closing(fails=fails), Closing()
    given: dict[str, Any] = {"options": {"observers": [first, second]}}
    if fails == "start":
        given["arrays"] = ArrayRecord(mlp((1, 9, 9), 10).state_dict())
    message = {"end": "at the end", "round": "in a round", "start": "initial_arrays"}[fails]
    with pytest.raises(Exception, match=message):
        run(**given)
    assert first.closed == second.closed == 1


def test_a_second_start_is_the_same_run() -> None:
    """It begins with the generator that was given."""
    torch.manual_seed(0)
    central, generator = mlp(SHAPE, 10), Drawing(lambda x: x)
    arrays = ArrayRecord(central.state_dict())
    strategy = FedZGE(make_settings(**TINY), central, generator)
    ends = [
        strategy.start(InProcessGrid(app_of(), {}, 2), arrays).arrays.to_torch_state_dict()
        for _ in range(2)
    ]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name])
