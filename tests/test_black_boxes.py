"""Black boxes of other libraries, alone, behind the endpoints, and in a federation."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch import nn

from fedzge_flwr import (
    BlackBox,
    ClassifierBlackBox,
    ClientEvaluation,
    FedZGE,
    FitReport,
    FunctionBlackBox,
    ImageSet,
    ModuleBlackBox,
    Observer,
    OnnxBlackBox,
    RoundRow,
    SklearnBlackBox,
    export_onnx,
    make_settings,
    register_endpoints,
    torch_blackbox,
)
from fedzge_flwr.black_boxes.base import SMALLEST_PROBABILITY, log_probabilities
from fedzge_flwr.blackbox import EvaluationSplit
from fedzge_flwr.data import client_data, load_split
from fedzge_flwr.errors import ConfigError, DataError
from fedzge_flwr.question import from_levels
from fedzge_flwr.torch_blackbox import TorchBlackBox
from tests.inprocess import InProcessGrid
from tests.small_models import mlp

SHAPE = (1, 8, 8)
QUERY = np.random.default_rng(1).uniform(-1, 1, (7, *SHAPE)).astype(np.float32)


def context_of(partition: int = 0, **node_config: Any) -> Context:
    config = {"partition-id": partition, "num-partitions": 3, **node_config}
    return Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})


def digits(split: Any = "train", num: int = 200, classes: int = 10) -> ImageSet:
    images = load_split(make_settings().data, split)
    chosen = np.flatnonzero(images.labels_N < classes)[:num]
    return ImageSet(images.images_NCHW[chosen], images.labels_N[chosen])


def forest() -> RandomForestClassifier:
    return RandomForestClassifier(20, random_state=0)


def train_a_little(model: nn.Module) -> float:
    images = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    inputs, labels = torch.from_numpy(images.inputs_NCHW), torch.tensor(images.labels_N)
    model.train()
    for _ in range(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = mlp(SHAPE, 10)
    train_a_little(model)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, path, SHAPE)
    torch.save(model.state_dict(), path.with_suffix(".pt"))
    return path


@pytest.fixture
def makers(onnx_file: Path) -> dict[str, Callable[[Context], ClassifierBlackBox]]:
    def module(context: Context) -> ModuleBlackBox:
        torch.manual_seed(3)
        return ModuleBlackBox(
            context,
            mlp(SHAPE, 10),
            train_a_little,
            SHAPE,
            10,
            200,
            test=lambda model: (0.5, 0.25),
            num_test_examples=4,
        )

    return {
        "module": module,
        "sklearn": lambda context: SklearnBlackBox(context, forest(), digits(), 10),
        "onnx": lambda context: OnnxBlackBox(context, onnx_file, SHAPE, 10, 50),
        "function": lambda context: FunctionBlackBox(
            context, lambda x: x.reshape(len(x), -1)[:, :10].astype(np.float64), SHAPE, 10, 5
        ),
    }


KINDS = ("module", "sklearn", "onnx", "function")


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_answered_as_if_alone(kind: str, makers: Any) -> None:
    box = makers[kind](context_of())
    box.fit(1)
    together = box.logits(QUERY)
    assert together.dtype == np.float32
    assert together.shape == (7, 10)
    alone = np.concatenate([box.logits(image[None]) for image in QUERY])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert np.ptp(together) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_taken_up_by_another_box(kind: str, makers: Any) -> None:
    trained = makers[kind](context_of())
    trained.fit(1)
    trained.distill(1, QUERY, 5 * np.eye(10, dtype=np.float32)[:7], 1.0)
    again = makers[kind](context_of())
    again.load_state({name: np.array(value) for name, value in trained.state().items()})
    assert (again.logits(QUERY) == trained.logits(QUERY)).all()


@pytest.mark.parametrize("kind", ["module", "sklearn"])
def test_a_teacher_is_learned_from(kind: str, makers: Any) -> None:
    """Images that the teacher is sure of are classified its way, which nothing else teaches."""
    box = makers[kind](context_of())
    box.fit(1)
    images = np.random.default_rng(5).uniform(-1, 1, (300, *SHAPE)).astype(np.float32)
    wanted = (images.mean(axis=(1, 2, 3)) > 0).astype(np.int64)
    teacher = 20 * np.eye(10, dtype=np.float32)[wanted]
    before = (box.logits(images).argmax(axis=1) == wanted).mean()
    assert box.distill(1, images, teacher, 1.0) > 0
    assert (box.logits(images).argmax(axis=1) == wanted).mean() > max(0.85, before + 0.2)


def test_sampled_labels_follow_the_teachers_probabilities() -> None:
    class Recorder(LogisticRegression):
        def fit(self, inputs: Any, labels: Any) -> Any:
            self.seen = labels
            return super().fit(inputs, labels)

    images = digits(num=20)
    recorder = Recorder(max_iter=5000)
    box = SklearnBlackBox(context_of(), recorder, images, 10, labels_per_image=50)
    logits = np.tile(np.log([0.7, 0.2, 0.1] + [1e-9] * 7).astype(np.float32), (40, 1))
    asked = np.zeros((40, *SHAPE), np.float32)
    box.distill(1, asked, 2 * logits, 2.0)
    drawn = recorder.seen[20:]
    assert len(drawn) == 40 * 50
    shares = np.bincount(drawn, minlength=10) / len(drawn)
    np.testing.assert_allclose(shares[:3], [0.7, 0.2, 0.1], atol=0.04)
    assert (recorder.seen[:20] == images.labels_N).all()
    first = list(drawn)
    box.distill(1, asked, 2 * logits, 2.0)
    assert list(recorder.seen[20:]) == first
    box.distill(2, asked, 2 * logits, 2.0)
    assert list(recorder.seen[20:]) != first


def test_a_classifier_may_ignore_the_others() -> None:
    box = SklearnBlackBox(context_of(), forest(), digits(), 10, distillation="none")
    box.fit(1)
    before = pickle.dumps(box.logits(QUERY))
    assert box.distill(1, QUERY, np.eye(10, dtype=np.float32)[:7], 1.0) == 0.0
    assert pickle.dumps(box.logits(QUERY)) == before


@pytest.mark.parametrize(
    "classifier", [forest(), LogisticRegression(), HistGradientBoostingClassifier()]
)
def test_a_client_of_one_class_answers_with_it_until_it_distils(classifier: Any) -> None:
    own = ImageSet(digits().images_NCHW[:20], np.full(20, 3))
    box = SklearnBlackBox(context_of(), classifier, own, 10)
    assert np.ptp(box.logits(QUERY)) > 0
    report = box.fit(1)
    assert (report.num_examples, report.loss) == (20, 0.0)
    assert (box.logits(QUERY).argmax(axis=1) == 3).all()
    again = SklearnBlackBox(context_of(), classifier, own, 10)
    again.load_state(box.state())
    assert np.array_equal(again.logits(QUERY), box.logits(QUERY))
    # Nobody knows another class: there is still nothing to fit.
    threes = np.tile(50 * np.eye(10, dtype=np.float32)[3], (len(QUERY), 1))
    assert box.distill(1, QUERY, threes, 1.0) == 0.0
    images = np.concatenate((np.full((60, *SHAPE), 1, "f4"), np.full((60, *SHAPE), -1, "f4")))
    teacher = 50 * np.eye(10, dtype=np.float32)[np.repeat([5, 7], 60)]
    box.distill(2, images, teacher, 1.0)
    assert box.logits(images[[0, -1]]).argmax(axis=1).tolist() == [5, 7]


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_beyond_the_classes(label: int) -> None:
    own = ImageSet(digits().images_NCHW[:3], np.array([0, label, 1]))
    with pytest.raises(DataError, match=r"labels go from .* from 0 to 9"):
        SklearnBlackBox(context_of(), forest(), own, 10)


def test_clients_of_one_process_do_not_share_a_model_that_was_given_once() -> None:
    """Else one begins from what another has trained on its own images."""
    model = mlp(SHAPE, 10)
    first, second = (
        ModuleBlackBox(context_of(number), model, train_a_little, SHAPE, 10, 50)
        for number in (0, 1)
    )
    before = second.logits(QUERY)
    first.fit(1)
    assert not np.array_equal(first.logits(QUERY), before)
    assert np.array_equal(second.logits(QUERY), before)
    later = ModuleBlackBox(context_of(2), model, train_a_little, SHAPE, 10, 50)
    assert np.array_equal(later.logits(QUERY), before)


def test_classes_that_a_client_has_no_image_of_are_improbable() -> None:
    box = SklearnBlackBox(context_of(), forest(), digits(classes=4), 10)
    assert (box.logits(QUERY) == box.logits(QUERY)[0, 0]).all()
    box.fit(1)
    logits = box.logits(QUERY)
    assert np.allclose(logits[:, 4:], np.log(SMALLEST_PROBABILITY))
    assert (np.exp(logits[:, :4]).sum(axis=1) > 0.99).all()


def test_log_probabilities() -> None:
    found = log_probabilities(np.array([[0.25, 0.75], [0.0, 1.0]]), np.array([2, 0]), 3)
    low = SMALLEST_PROBABILITY
    np.testing.assert_allclose(
        found, np.log([[0.75, low, 0.25], [1.0, low, low]]).astype(np.float32), rtol=1e-6
    )


@pytest.mark.parametrize("split", ["test", "held-out"])
def test_evaluation_is_on_what_was_given_for_it(split: Any) -> None:
    images = digits("test", 60)
    given = {split: images}
    box = SklearnBlackBox(context_of(), forest(), digits(), 10, evaluation=given)
    box.fit(1)
    outcome = box.evaluate(split)
    logits = torch.from_numpy(box.logits(images.inputs_NCHW))
    labels = torch.tensor(images.labels_N)
    assert outcome.num_examples == 60
    assert outcome.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert outcome.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert len(outcome.logits_NK) == (60 if split == "test" else 0)
    other = box.evaluate("held-out" if split == "test" else "test")
    assert (other.num_examples, other.logits_NK.shape) == (0, (0, 10))


def test_a_module_may_test_itself(makers: Any) -> None:
    outcome = makers["module"](context_of()).evaluate("held-out")
    assert (outcome.num_examples, outcome.loss, outcome.accuracy) == (4, 0.5, 0.25)


@pytest.mark.parametrize("kind", ["module", "run's own"])
def test_torch_has_the_clients_threads_until_the_box_is_closed(kind: str) -> None:
    settings = make_settings(client_threads=2, num_clients=3)
    before = torch.get_num_threads()
    box = (
        TorchBlackBox(settings, 0, 3)
        if kind == "run's own"
        else ModuleBlackBox(
            context_of(), mlp(SHAPE, 10), train_a_little, SHAPE, 10, 200, settings=settings
        )
    )
    assert torch.get_num_threads() == 2 != before
    box.close()
    assert torch.get_num_threads() == before


def test_a_box_that_cannot_be_made_leaves_torch_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(device: torch.device, share: float) -> None:
        raise RuntimeError("no memory to cap")

    settings = make_settings(client_threads=2, num_clients=3)
    before = torch.get_num_threads()
    with pytest.raises(ConfigError, match="cnm"):
        TorchBlackBox(settings, 0, 3, "cnm")
    assert torch.get_num_threads() == before
    monkeypatch.setattr(torch_blackbox, "cap_memory", refused)
    context = context_of()
    context.run_config = settings.to_run_config()
    with pytest.raises(RuntimeError, match="no memory to cap"):
        torch_blackbox.torch_black_box(context)
    assert torch.get_num_threads() == before


def test_an_onnx_model_answers_as_the_model_that_it_was(onnx_file: Path) -> None:
    model = mlp(SHAPE, 10)
    model.load_state_dict(torch.load(onnx_file.with_suffix(".pt"), weights_only=True))
    images = np.random.default_rng(2).uniform(-1, 1, (600, *SHAPE)).astype(np.float32)
    with torch.inference_mode():
        wanted = model(torch.from_numpy((images + 1) / 2)).numpy()
    box = OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50, prepare=lambda x: (x + 1) / 2)
    np.testing.assert_allclose(box.logits(images), wanted, atol=1e-5)
    assert box.logits(images[:0]).shape == (0, 10)


def test_an_onnx_model_of_one_batch_size_and_another_float_answers_any_number(
    tmp_path: Path,
) -> None:
    """As ``torch.onnx.export`` writes it unless it is told otherwise."""
    model = mlp(SHAPE, 10).double().eval()
    path = tmp_path / "fixed.onnx"
    torch.onnx.export(
        model, (torch.zeros(4, *SHAPE).double(),), str(path), dynamo=True, verbose=False
    )
    box = OnnxBlackBox(context_of(), path, SHAPE, 10, 50)
    for images in (QUERY, QUERY[:4], QUERY[:1], QUERY[:0]):
        with torch.inference_mode():
            wanted = model(torch.from_numpy(images).double()).float().numpy()
        found = box.logits(images)
        assert found.dtype == np.float32
        assert found.shape == (len(images), 10)
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_images_that_an_onnx_model_does_not_take(onnx_file: Path) -> None:
    def flat(images: Any) -> Any:
        return images.reshape(len(images), -1)

    box = OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50, prepare=flat)
    with pytest.raises(
        DataError, match=r"'images' is tensor\(float\) of shape .*\(7, 64\)"
    ) as caught:
        box.logits(QUERY)
    assert "\n" not in str(caught.value)
    assert "prepare" in str(caught.value)


def test_bad_onnx_files(onnx_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where a file lies is told to the node's own log; what is raised goes to the server."""
    bad = tmp_path / "bad.onnx"
    for _ in range(2):
        with pytest.raises(DataError, match="ONNX model cannot be read; its own log") as caught:
            OnnxBlackBox(context_of(), bad, SHAPE, 10, 50)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
        bad.write_bytes(b"no model")
    assert caplog.text.count(f"{bad}: not an ONNX model that can be read") == 2
    box = OnnxBlackBox(context_of(), onnx_file, SHAPE, 7, 50)
    with pytest.raises(DataError, match=r"shape \(7, 10\) for 7 images and 7 classes"):
        box.logits(QUERY)


def test_an_onnx_model_that_ends_in_a_softmax(onnx_file: Path, tmp_path: Path) -> None:
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(SHAPE, 10)
            self.inner.load_state_dict(torch.load(onnx_file.with_suffix(".pt")))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.inner(images), dim=1)

    path = tmp_path / "softmax.onnx"
    export_onnx(Softmax(), path, SHAPE)
    logits = OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50).logits(QUERY)
    found = OnnxBlackBox(context_of(), path, SHAPE, 10, 50, output="probabilities").logits(QUERY)
    wanted = torch.log_softmax(torch.from_numpy(logits), dim=1).clamp_min(np.log(1e-4)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    with pytest.raises(DataError, match="first output is no probabilities: it goes from -"):
        OnnxBlackBox(context_of(), onnx_file, SHAPE, 10, 50, output="probabilities").logits(QUERY)


def test_evaluation_logits_of_another_shape_are_explained(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(FunctionBlackBox):
        def evaluate(self, split: EvaluationSplit) -> ClientEvaluation:
            return ClientEvaluation(6, 0.5, 0.5, np.zeros((6, 11), np.float32))

    app = ClientApp()
    register_endpoints(
        app, lambda context: Mine(context, lambda x: np.zeros((len(x), 10)), SHAPE, 10, 5)
    )
    settings = make_settings(
        image_shape=SHAPE,
        num_classes=10,
        num_clients=1,
        synthetic_batch_size=20,
        generator_share=0.0,
        central_distill_steps=2,
        client_evaluation="test",
    )
    central = mlp(SHAPE, 10)

    class Six:
        num_images = 6

        def accuracy(self, logits_MK: Any) -> float:
            raise AssertionError("there are none")

    FedZGE(settings, central, test_set=Six()).start(
        InProcessGrid(app, {}, 1), ArrayRecord(central.state_dict()), num_rounds=1
    )
    assert "Mine.evaluate returned logits of shape (6, 11) for 6 images and 10 cl" in caplog.text


@pytest.mark.parametrize("node_config", [{}, {"partition-id": "0"}, {"partition-id": -1}])
def test_a_node_without_a_number_is_told_how(node_config: dict[str, Any]) -> None:
    context = Context(1, 2, {"num-partitions": 2, **node_config}, RecordDict(), {})
    with pytest.raises(ConfigError, match=r"node config: 'partition-id' = .*flower-supernode"):
        FunctionBlackBox(context, lambda x: x, SHAPE, 10, 5)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 1, 8, 8), np.float32), np.zeros(2, int), "images are float32 of shape"),
        (np.zeros((2, 8, 8), np.uint8), np.zeros(2, int), "give uint8 (N, C, H, W)"),
        (np.zeros((2, 1, 8, 8), np.uint8), np.zeros(3, int), r"of shape (3,) for 2 images"),
        (np.zeros((2, 1, 8, 8), np.uint8), np.zeros(2), "labels are float64"),
    ],
)
def test_images_that_do_not_fit_their_labels(images: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        ImageSet(images, labels)
    assert message in str(caught.value)


@pytest.mark.parametrize("state_dir", [True, False])
@pytest.mark.parametrize("exchanges", ["one", "phases"])
def test_a_federation_of_every_kind(
    makers: Any, exchanges: str, state_dir: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All take part in every phase; none but the trees may fail to move at a small step."""
    if state_dir:
        monkeypatch.setenv("FEDZGE_STATE_DIR", str(tmp_path))
    else:
        monkeypatch.delenv("FEDZGE_STATE_DIR", raising=False)
    app = ClientApp()

    def make(context: Context) -> BlackBox:
        box: BlackBox = makers[KINDS[int(context.node_config["partition-id"])]](context)
        return box

    register_endpoints(app, make)
    settings = make_settings(
        image_shape=SHAPE,
        num_classes=10,
        num_clients=4,
        num_server_rounds=2,
        synthetic_batch_size=40,
        generator_share=0.25,
        central_distill_steps=2,
        client_distill_rounds=0,
        exchanges=exchanges,
        server_threads=1,
    )
    central = mlp(SHAPE, 10)
    rows = []

    class Notes(Observer):
        def on_round(self, server: object, current: object, row: RoundRow) -> None:
            rows.append(row)

    strategy = FedZGE(settings, central, observers=[Notes()])
    grid = InProcessGrid(app, {}, 4)
    result = strategy.start(
        grid,
        ArrayRecord(central.state_dict()),
        2,
        evaluate_fn=lambda *_: MetricRecord({"accuracy": 0.5}),
    )
    assert [row.round for row in rows] == [1, 2]
    for row in rows:
        assert not row.missing
        assert list(row.participants) == [0, 1, 2, 3]
        assert set(row.unmoved) <= {1}
    again = mlp(SHAPE, 10)
    again.load_state_dict(result.arrays.to_torch_state_dict())
    assert len(list(tmp_path.glob("*/client-*"))) == (4 if state_dir else 0)


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda images: np.zeros((len(images), 10)), None),
        (lambda images: torch.zeros(len(images), 10), None),
        (lambda images: np.zeros(len(images)), r"\(20,\) for 20 images and 10 cl"),
        (lambda images: np.zeros((len(images), 11)), r"\(20, 11\) for 20 images"),
    ],
)
def test_logits_of_another_type_are_taken_and_of_another_shape_explained(
    answer: Any, complaint: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    class Mine(ClassifierBlackBox):
        def fit(self, round_: int) -> FitReport:
            return FitReport(num_examples=np.int64(5), loss=np.float32(0.5))

        def logits(self, images_NCHW: Any) -> Any:
            return answer(images_NCHW)

    def make(context: Context) -> BlackBox:
        if context.node_config["partition-id"] == 1:
            return Mine(context, SHAPE, 10, np.int64(5))
        return FunctionBlackBox(context, lambda x: np.zeros((len(x), 10)), SHAPE, 10, 5)

    app = ClientApp()
    register_endpoints(app, make)
    settings = make_settings(
        image_shape=SHAPE,
        num_classes=10,
        num_clients=2,
        synthetic_batch_size=20,
        generator_share=0.0,
        central_distill_steps=2,
    )
    central = mlp(SHAPE, 10)
    took_part = []

    class Notes(Observer):
        def on_round(self, server: object, current: object, row: RoundRow) -> None:
            took_part.append(sorted(set(row.participants) - set(row.missing)))

    FedZGE(settings, central, observers=[Notes()]).start(
        InProcessGrid(app, {}, 2), ArrayRecord(central.state_dict()), num_rounds=1
    )
    if complaint is None:
        assert took_part == [[0, 1]]
    else:
        assert took_part == [[0]]
        assert re.search("Mine.logits returned logits of shape " + complaint, caplog.text)


@pytest.mark.parametrize("rehearsal", [True, False])
def test_a_module_distils_as_the_runs_own_client_does(rehearsal: bool) -> None:
    """With the same model, images and settings, bit for bit: own images are rehearsed, or not."""
    settings = make_settings(
        num_clients=3, alpha=0.1, num_train_images=200, client_distill_steps=4,
        distill_batch_size=5, client_rehearsal=rehearsal, seed=2, q=1,
    )  # fmt: skip
    runs = TorchBlackBox(settings, 1, 3)
    data = client_data(settings.data, 3, 2, 1, hold_out=False).train
    assert len(np.unique(data.labels_N)) < 10
    states = []
    for own in (data, None):
        box = ModuleBlackBox(
            context_of(1), runs._model, lambda model: 0.0, SHAPE, 10, len(data),
            own=own, settings=settings,
        )  # fmt: skip
        box.distill(3, QUERY, np.eye(7, 10, dtype=np.float32), 1.5)
        states.append(box.state())
    runs.distill(3, QUERY, np.eye(7, 10, dtype=np.float32), 1.5)
    wanted = runs.state()
    alike = [all(np.array_equal(found[name], wanted[name]) for name in wanted) for found in states]
    assert alike == [True, not rehearsal]


def test_own_images_that_do_not_suit_the_model() -> None:
    own = digits(num=4)
    wide = ImageSet(np.zeros((2, 1, 8, 9), np.uint8), np.zeros(2, int))
    for images, classes, message in ((wide, 10, "the model's"), (own, 3, "numbered from 0 to 2")):
        with pytest.raises(DataError, match=message):
            ModuleBlackBox(
                context_of(), mlp(SHAPE, 10), train_a_little, SHAPE, classes, 4, own=images
            )


def test_images_from_what_a_model_is_given() -> None:
    images = digits(num=30)
    again = ImageSet.from_inputs(
        torch.from_numpy(images.inputs_NCHW), torch.tensor(images.labels_N)
    )
    np.testing.assert_array_equal(again.images_NCHW, images.images_NCHW)
    np.testing.assert_array_equal(again.labels_N, images.labels_N)
    near = ImageSet.from_inputs(np.array([[[[-1.0004, 1.0004, 0.0]]]]), [1])
    assert near.images_NCHW.tolist() == [[[[0, 255, 128]]]]
    for wrong in (images.images_NCHW, 2 * images.inputs_NCHW):
        with pytest.raises(DataError, match=r"images go from .*: give them in \[-1, 1\]"):
            ImageSet.from_inputs(wrong, images.labels_N)


def test_an_image_set_is_read_only_and_the_arrays_given_are_not() -> None:
    pixels, labels = np.zeros((2, 1, 8, 8), np.uint8), np.array([1, 2], np.int32)
    images = ImageSet(pixels, labels)
    assert images.labels_N.dtype == np.int64
    for array in (images.images_NCHW, images.labels_N, images.take(np.array([1])).images_NCHW):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    pixels[0], labels[0] = 1, 1


def test_labelled_images_are_what_queries_are() -> None:
    images = digits(num=3)
    assert (images.inputs_NCHW == from_levels(images.images_NCHW)).all()
