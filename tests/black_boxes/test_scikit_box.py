"""scikit-learn's classifiers: one for each client of a process, and which are taken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import (
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, RidgeClassifier, SGDClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier

from fedzge_flwr import SklearnBlackBox
from fedzge_flwr.common.errors import ConfigError
from tests.helpers.boxes import QUERY, context_of, digits

TEACHER = np.eye(7, 10, dtype=np.float32) * 9


class Duck:
    """A classifier that is no estimator of scikit-learn's: it has no parameters to clone."""

    classes_ = np.arange(10)

    def __init__(self) -> None:
        self.fits = 0

    def fit(self, inputs: Any, labels: Any) -> Duck:
        self.fits += 1
        return self

    def predict_proba(self, inputs: Any) -> Any:
        return np.full((len(inputs), 10), 0.1 / self.fits)


class Gapless(DecisionTreeClassifier):
    """Takes labels as XGBoost's classifier does."""

    def fit(self, inputs: Any, labels: Any) -> Gapless:
        if set(labels) != set(range(len(set(labels)))):
            raise ValueError(f"Invalid classes inferred from unique values of `y`: {set(labels)}")
        super().fit(inputs, labels)
        return self


def test_a_classifier_that_takes_labels_without_gaps_alone() -> None:
    """A client lacks classes: it answers for those that it has, also after it was kept."""
    images = digits()
    own = images.take(np.flatnonzero(np.isin(images.labels_N, (2, 5, 9))))
    box = SklearnBlackBox(context_of(), Gapless(random_state=0), own, 10)
    box.fit(1)
    assert (box.logits(own.inputs_NCHW).argmax(axis=1) == own.labels_N).all()
    again = SklearnBlackBox(context_of(), Gapless(random_state=0), own, 10)
    again.load_state(box.state())
    assert np.array_equal(again.logits(QUERY), box.logits(QUERY))
    # With an ensemble's labels of all classes there is no gap any more.
    teacher = np.eye(10, dtype=np.float32) * 99
    again.distill(1, np.resize(QUERY, (10, *QUERY.shape[1:])), teacher, 1.0)
    assert (again.logits(own.inputs_NCHW).argmax(axis=1) == own.labels_N).mean() > 0.9


SHARED: dict[str, Callable[[], Any]] = {
    "warm start": lambda: LogisticRegression(warm_start=True, max_iter=3),
    "warm network": lambda: MLPClassifier((8,), warm_start=True, max_iter=2, random_state=0),
    "RandomState": lambda: RandomForestClassifier(5, random_state=np.random.RandomState(0)),
    "within a pipeline": lambda: make_pipeline(
        StandardScaler(), LogisticRegression(warm_start=True, max_iter=2)
    ),
    "no estimator": Duck,
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.filterwarnings("ignore")
def test_a_client_does_not_depend_on_whom_the_process_served_before(name: str) -> None:
    """With a classifier that is made once in a process, as most tutorials do."""

    def answers(classifier: Any, partition: int) -> Any:
        images = digits()
        own = images.take(np.arange(partition, len(images), 2))
        box = SklearnBlackBox(context_of(partition), classifier, own, 10)
        box.fit(1)
        first = box.logits(QUERY)
        box.distill(1, QUERY, TEACHER, 1.5)
        box.state()
        return first, box.logits(QUERY)

    alone = answers(SHARED[name](), 1)
    classifier = SHARED[name]()
    answers(classifier, 0)
    for wanted, found in zip(alone, answers(classifier, 1), strict=True):
        np.testing.assert_array_equal(wanted, found)
    for attribute in ("classes_", "steps_", "coef_", "estimators_", "coefs_"):
        assert attribute not in vars(classifier)


TAKEN: dict[str, Callable[[], Any]] = {
    # It has `predict_proba` once it is fitted.
    "stacking": lambda: StackingClassifier(
        [("a", GaussianNB()), ("b", DecisionTreeClassifier(random_state=0))]
    ),
    "stacking in a pipeline": lambda: make_pipeline(
        StandardScaler(), StackingClassifier([("a", GaussianNB())])
    ),
    "soft voting": lambda: VotingClassifier([("a", GaussianNB())], voting="soft"),
    "search": lambda: GridSearchCV(GaussianNB(), {"var_smoothing": [1e-3]}, cv=2),
    "calibrated SVC": lambda: CalibratedClassifierCV(SVC(), cv=2),
    "calibrated ridge": lambda: CalibratedClassifierCV(RidgeClassifier(), cv=2),
    "log loss": lambda: SGDClassifier(loss="log_loss", random_state=0),
}


@pytest.mark.parametrize("name", TAKEN)
def test_classifiers_with_probabilities_are_taken(name: str) -> None:
    box = SklearnBlackBox(context_of(), TAKEN[name](), digits(), 10)
    assert box.fit(1).num_examples == 200
    images = digits()
    right = box.logits(images.inputs_NCHW).argmax(axis=1) == images.labels_N
    assert right.mean() > 0.7
    again = SklearnBlackBox(context_of(), TAKEN[name](), digits(), 10)
    again.load_state(box.state())
    np.testing.assert_array_equal(again.logits(QUERY), box.logits(QUERY))


@pytest.mark.parametrize(
    "make",
    [
        SVC,
        LinearSVC,
        RidgeClassifier,
        lambda: SGDClassifier(loss="hinge"),
        lambda: VotingClassifier([("a", GaussianNB())], voting="hard"),
        lambda: StackingClassifier([("a", GaussianNB())], final_estimator=RidgeClassifier()),
        lambda: make_pipeline(StandardScaler(), LinearSVC()),
    ],
)
def test_what_has_no_probabilities_is_told_what_gives_them(make: Callable[[], Any]) -> None:
    """And the advice is one that works, in this version of scikit-learn, without a warning."""
    with pytest.raises(ConfigError, match=r"predict_proba \(SVC and others get it in Calibrated"):
        SklearnBlackBox(context_of(), make(), digits(), 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        box = SklearnBlackBox(context_of(), CalibratedClassifierCV(make(), cv=2), digits(), 10)
        if type(make()).__name__ in ("SVC", "LinearSVC", "RidgeClassifier"):
            assert box.fit(1).num_examples == 200


def test_a_state_of_nothing_is_the_unfitted_classifier() -> None:
    """As after a first distillation that went wrong."""
    box = SklearnBlackBox(context_of(), GaussianNB(), digits(), 10)
    before, state = box.logits(QUERY), box.state()
    box.fit(1)
    box.load_state(state)
    np.testing.assert_array_equal(box.logits(QUERY), before)
    assert box.state() == {}


def test_what_is_fitted_for_good_stays_so() -> None:
    fitted = GaussianNB().fit(digits().inputs_NCHW.reshape(200, -1), digits().labels_N)
    box = SklearnBlackBox(context_of(), FrozenEstimator(fitted), digits(), 10)
    box.fit(1)
    np.testing.assert_allclose(
        box.logits(QUERY).argmax(axis=1), fitted.predict(QUERY.reshape(7, -1))
    )
