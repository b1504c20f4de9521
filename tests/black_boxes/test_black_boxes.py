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
from sklearn.svm import LinearSVC
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
    make_settings,
    register_endpoints,
)
from fedzge_flwr.black_boxes.classifier import SMALLEST_PROBABILITY, log_probabilities
from fedzge_flwr.black_boxes.contract import EvaluationSplit, State
from fedzge_flwr.black_boxes.judging import right_on_own
from fedzge_flwr.common.errors import ConfigError, DataError
from tests.helpers.boxes import QUERY, SHAPE, context_of, digits, forest, train_a_little
from tests.helpers.inprocess import InProcessGrid
from tests.helpers.small_models import mlp

KINDS = ("module", "sklearn", "onnx", "function")


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
    seen: list[Any] = []

    class Recorder(LogisticRegression):
        def fit(self, inputs: Any, labels: Any) -> Any:
            seen.append(labels)
            return super().fit(inputs, labels)

    images = digits(num=20)
    # The box fits a copy of it.
    box = SklearnBlackBox(context_of(), Recorder(max_iter=5000), images, 10, labels_per_image=50)
    logits = np.tile(np.log([0.7, 0.2, 0.1] + [1e-9] * 7).astype(np.float32), (40, 1))
    asked = np.zeros((40, *SHAPE), np.float32)
    box.distill(1, asked, 2 * logits, 2.0)
    drawn = seen[-1][20:]
    assert len(drawn) == 40 * 50
    shares = np.bincount(drawn, minlength=10) / len(drawn)
    np.testing.assert_allclose(shares[:3], [0.7, 0.2, 0.1], atol=0.04)
    assert (seen[-1][:20] == images.labels_N).all()
    first = list(drawn)
    box.distill(1, asked, 2 * logits, 2.0)
    assert list(seen[-1][20:]) == first
    box.distill(2, asked, 2 * logits, 2.0)
    assert list(seen[-1][20:]) != first


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
        labels_M = np.arange(6)

    FedZGE(settings, central, test_set=Six()).start(
        InProcessGrid(app, {}, 1), ArrayRecord(central.state_dict()), num_rounds=1
    )
    assert "Mine.evaluate returned logits of shape (6, 11) for 6 images and 10 cl" in caplog.text


@pytest.mark.parametrize("node_config", [{}, {"partition-id": "0"}, {"partition-id": -1}])
def test_a_node_without_a_number_is_told_how(node_config: dict[str, Any]) -> None:
    context = Context(1, 2, {"num-partitions": 2, **node_config}, RecordDict(), {})
    with pytest.raises(ConfigError, match=r"node config: 'partition-id' = .*flower-supernode"):
        FunctionBlackBox(context, lambda x: x, SHAPE, 10, 5)


@pytest.mark.parametrize("state_dir", [True, False])
@pytest.mark.parametrize("transport", ["compact", "dense"])
def test_a_federation_of_every_kind(
    makers: Any, transport: str, state_dir: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        transport=transport,
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


@pytest.mark.parametrize("distilled", [0, np.float32(1), np.ones(()), torch.ones(())])
@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (lambda images: np.zeros((len(images), 10)), None),
        (lambda images: torch.zeros(len(images), 10), None),
        (lambda images: np.zeros((len(images), 10)).tolist(), None),
        (lambda images: np.zeros(len(images)), r"\(20,\) for 20 images and 10 cl"),
        (lambda images: np.zeros((len(images), 11)), r"\(20, 11\) for 20 images"),
    ],
)
def test_logits_of_another_type_are_taken_and_of_another_shape_explained(
    answer: Any, distilled: Any, complaint: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    class Mine(ClassifierBlackBox):
        def fit(self, round_: int) -> FitReport:
            return FitReport(num_examples=np.int64(5), loss=np.float32(0.5))

        def logits(self, images_NCHW: Any) -> Any:
            return answer(images_NCHW)

        def distill(self, *_: Any) -> Any:
            return distilled

        def state(self) -> State:
            return {"rounds": np.zeros(1)}

        def load_state(self, state: State) -> None:
            assert state["rounds"].shape == (1,)

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
        InProcessGrid(app, {}, 2), ArrayRecord(central.state_dict()), num_rounds=2
    )
    if complaint is None:
        assert took_part == [[0, 1], [0, 1]]
        assert "it went wrong" not in caplog.text
    else:
        assert took_part == [[0], [0]]
        assert re.search("Mine.logits returned logits of shape " + complaint, caplog.text)


def test_a_client_without_images_answers_with_all_classes_alike() -> None:
    nothing = digits(num=0)
    box = SklearnBlackBox(context_of(), forest(), nothing, 10)
    assert box.fit(1) == FitReport(0, 0.0)
    np.testing.assert_allclose(box.logits(QUERY), np.full((7, 10), -np.log(10)), rtol=1e-6)
    assert box.distill(1, QUERY, np.eye(7, 10, dtype=np.float32) * 20, 1.0) == 0.0
    # It has learned from the others' answers alone.
    assert (box.logits(QUERY).argmax(axis=1) == np.arange(7)).mean() > 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SklearnBlackBox(context_of(), LinearSVC(), digits(), 10),
            "LinearSVC: give an inst",
        ),
        (
            lambda: SklearnBlackBox(context_of(), RandomForestClassifier, digits(), 10),
            "classifier RandomForestClassifier: give an instance",
        ),
        (
            lambda: SklearnBlackBox(context_of(), forest(), digits(), 10, distillation="no"),
            "distillation = 'no': give one of 'sampled-labels', 'none'",
        ),
        (
            lambda: SklearnBlackBox(context_of(), forest(), digits(), 10, labels_per_image=0),
            "labels_per_image = 0: give at least 1",
        ),
        (
            lambda: FunctionBlackBox(
                context_of(), np.sin, SHAPE, 10, 5, evaluation={"Test": digits()}
            ),
            "evaluation = 'Test': give one of 'test', 'held-out'",
        ),
        (
            lambda: ModuleBlackBox(
                context_of(),
                mlp(SHAPE, 10),
                train_a_little,
                SHAPE,
                10,
                5,
                test=lambda _: (1.0, 0.5),
            ),
            "num_test_examples: say on how many images `test` evaluates",
        ),
        (
            lambda: ModuleBlackBox(context_of(), mlp(SHAPE, 10), None, SHAPE, 10, 5),
            "train = None: give `own`, the images that the model is trained on",
        ),
        (
            lambda: Forgetful(context_of(), SHAPE, 10, 5),
            "Forgetful trains or distills but does not",
        ),
    ],
)
def test_bad_arguments_are_one_clear_line(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make()
    assert "\n" not in str(caught.value)


class Forgetful(ClassifierBlackBox):
    def fit(self, round_: int) -> FitReport:
        return FitReport(5, 0.5)

    def logits(self, images_NCHW: Any) -> Any:
        return np.zeros((len(images_NCHW), 10))


def function_box(**options: Any) -> FunctionBlackBox:
    given = {"image_shape": SHAPE, "num_classes": 3, "num_examples": 5, **options}
    return FunctionBlackBox(context_of(), lambda x: x.reshape(len(x), -1)[:, :3], **given)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"num_examples": -1}, "num_examples = -1: give a number of images, at least 0"),
        ({"num_classes": 0}, "num_classes = 0: give at least 2"),
        ({"image_shape": (8, 8)}, "image_shape = (8, 8): give (C, H, W), three numbers from 1"),
        ({"image_shape": (1, 8, 0)}, "image_shape = (1, 8, 0): give (C, H, W)"),
        ({"image_shape": 8}, "image_shape = 8: give (C, H, W)"),
    ],
)
def test_what_a_black_box_is_of(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as error:
        function_box(**options)
    assert str(error.value).startswith(problem)
    assert function_box(image_shape=[1, 8, 8]).image_shape == SHAPE


@pytest.mark.parametrize("split", ["test", "held-out"])
@pytest.mark.parametrize(
    ("shape", "labels", "problem"),
    [
        (SHAPE, [1, 2, 3], "labels go from 1 to 3; 3 classes are numbered from 0 to 2"),
        (SHAPE, [-1, 0, 1], "labels go from -1 to 1; 3 classes"),
        ((1, 8, 9), [0, 1, 2], "images are of shape (1, 8, 9), the model's (1, 8, 8)"),
    ],
)
def test_what_it_is_evaluated_on_suits_it(
    split: EvaluationSplit, shape: tuple[int, int, int], labels: list[int], problem: str
) -> None:
    """Class -1 was the last one, and the loss a wrong one."""
    images = ImageSet(np.zeros((3, *shape), np.uint8), np.array(labels))
    with pytest.raises(DataError) as error:
        function_box(evaluation={split: images})
    assert str(error.value).startswith(f"evaluation, '{split}': {problem}")
    right = ImageSet(np.zeros((3, *SHAPE), np.uint8), np.arange(3))
    assert function_box(evaluation={split: right}).evaluate(split).num_examples == 3


def test_probabilities_that_are_no_table() -> None:
    box = FunctionBlackBox(
        context_of(), lambda x: np.ones(len(x)), SHAPE, 3, 5, output="probabilities"
    )
    with pytest.raises(DataError, match=r"what the function returns has shape \(7,\); .*\(N, K\)"):
        box.logits(QUERY)


def test_sets_without_images_are_judged_by_nothing() -> None:
    """Their images have a shape of their own, if any."""
    some, none = digits(num=6), ImageSet(np.zeros((0, 1, 1, 1), np.uint8), np.zeros(0, int))

    def logits(images_NCHW: Any) -> Any:
        assert images_NCHW.shape[1:] == SHAPE
        return np.zeros((len(images_NCHW), 10), np.float32)

    assert len(right_on_own(logits, some, none, 10)) == 6
    assert len(right_on_own(logits, none, some, 10)) == 6
    assert len(right_on_own(logits, none, none, 10)) == 0
