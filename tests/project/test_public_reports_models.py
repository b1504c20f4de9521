"""What was reported to other projects of models and of their wrappers, tried on this one.

Each row names its report: a project on GitHub and the number of its issue or pull request.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.calibration import CalibratedClassifierCV
from sklearn.ensemble import RandomForestClassifier, StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import GaussianNB
from sklearn.semi_supervised import SelfTrainingClassifier
from sklearn.svm import SVC
from torch import Tensor, nn

from fedzge_flwr import MODELS, ModuleBlackBox, SklearnBlackBox, TorchBlackBox, make_settings
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.learning.outputs import check_model, logits_of
from fedzge_flwr.learning.tensors import load_plain, plain_state
from fedzge_flwr.server.build import check_models
from tests.helpers.boxes import QUERY, SHAPE, context_of, digits
from tests.helpers.small_models import mlp

pytestmark = pytest.mark.usefixtures("registries")

SETTINGS: dict[str, Any] = {
    "num_clients": 2,
    "num_train_images": 100,
    "local_models": "theirs",
    "min_local_steps": 2,
    "local_epochs": 1,
    "client_distill_steps": 2,
}


class Sub(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class TiedModules(nn.Module):
    """Two modules that hold one parameter."""

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(64, 64) / 8)
        self.embed, self.proj = Sub(weight), Sub(weight)
        self.out = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out((x.flatten(1) @ self.embed.weight).relu() @ self.proj.weight.T)


class SharedMemory(nn.Module):
    """Two parameters in one memory, as splitting a layer makes them."""

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = nn.Parameter(self.first.weight.detach())
        self.out = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(self.first(x.flatten(1)).relu()))


class TiedEmbeddings(nn.Module):
    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(64, num_classes, bias=False)
        self.embedding = nn.Embedding(num_classes, 64, _weight=self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1)) + self.embedding.weight.sum() * 0


class Viewing(nn.Module):
    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 32, 3), nn.Linear(32 * 36, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv(x))
        return self.out(h.view(h.size(0), -1))


class Hybrid(nn.Module):
    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.flat = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.deep = nn.Conv3d(4, 8, 3, padding=1, bias=False)
        self.out = nn.Linear(8 * 64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.flat(x)
        return self.out(self.deep(h.reshape(*h.shape[:3], 4, 2)).flatten(1))


class LazyMLP(nn.Module):
    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.LazyLinear(10), nn.LazyLinear(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x.flatten(1)).relu())


class ReadsItself(nn.Module):
    """Cannot be built without values, and holds a tensor that is no buffer."""

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, num_classes)
        self.scale = 1.0 / float(self.linear.weight.abs().max())
        self.shift = torch.randn(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.linear(x.flatten(1)) + self.shift


def normed(*_: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = torch.nn.utils.weight_norm(nn.Linear(64, 10))
    return nn.Sequential(nn.Flatten(), layer)


def goes_on(build: Callable[[Any, int], nn.Module]) -> Callable[[], None]:
    """A round of messages: what is loaded is what was, and is trained as it would have been."""

    def check() -> None:
        MODELS["theirs"] = build
        settings = make_settings(**SETTINGS)
        check_models(settings)
        first = TorchBlackBox(settings, 0, 2)
        first.profile()
        first.fit(1)
        second = TorchBlackBox(settings, 0, 2)
        second.load_state({name: np.array(value) for name, value in first.state().items()})
        np.testing.assert_allclose(first.logits(QUERY), second.logits(QUERY), atol=1e-5)
        for box in (first, second):
            box.fit(2)
            box.distill(2, QUERY, np.eye(7, 10, dtype=np.float32), 1.5)
        np.testing.assert_allclose(first.logits(QUERY), second.logits(QUERY), atol=1e-3)
        tensors = [[*box._model.parameters()] for box in (first, second)]
        assert len(tensors[0]) == len(tensors[1])
        memories = [{t.untyped_storage().data_ptr() for t in each} for each in tensors]
        assert len(memories[0]) == len(memories[1])

    return check


def refused(build: Callable[[Any, int], Any], said: str) -> Callable[[], None]:
    """One line at the start, of a central and of a local model."""

    def check() -> None:
        MODELS["theirs"] = build
        for key in ("central_model", "local_models"):
            with pytest.raises(ConfigError, match=f"^model 'theirs': the model {said}") as caught:
                check_models(make_settings(**{**SETTINGS, "local_models": "cnn", key: "theirs"}))
            assert "\n" not in str(caught.value)

    return check


def names(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], None]:
    """A wrapped model's state is the plain one's, and loads into either."""

    def check() -> None:
        wrapped, plain = wrap(mlp(SHAPE, 10)), mlp(SHAPE, 10)
        state = plain_state(wrapped)
        plain.load_state_dict(state)
        for into in (wrap(mlp(SHAPE, 10)), mlp(SHAPE, 10)):
            for given in (state, wrapped.state_dict()):
                load_plain(into, given)
                assert all(torch.equal(plain_state(into)[name], state[name]) for name in state)

    return check


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[no-any-return]


class Returning(nn.Module):
    def __init__(self, wrap: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.inner, self.wrap = mlp(SHAPE, 10), wrap

    def forward(self, x: Tensor) -> object:
        return self.wrap(self, self.inner(x))


class SequenceClassifierOutput(dict[str, Any]):
    """As the library has it: entries are attributes, those that are None left out."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class Misspelt(nn.Module):
    """Its layers are made in a method that nobody calls."""

    def _init_(self) -> None:
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :10]


def is_taken(wrap: Callable[[nn.Module, Tensor], object]) -> Callable[[], None]:
    def check() -> None:
        model = Returning(wrap)
        check_model(model, SHAPE, 10)
        images = torch.from_numpy(QUERY)
        assert torch.equal(logits_of(model.eval()(images)), model.inner(images))

    return check


def copied_model_is_refused() -> None:
    model = normed()
    model(torch.from_numpy(QUERY))
    box = ModuleBlackBox(context_of(), model, lambda _: 0.0, SHAPE, 10, 5)
    with pytest.raises(ConfigError, match=r"the model cannot be copied .*: give a function"):
        box.logits(QUERY)


def made_model_is_taken() -> None:
    box = ModuleBlackBox(context_of(), normed, None, SHAPE, 10, 20, own=digits(num=20))
    assert box.profile().num_examples == 20
    assert box.logits(QUERY).shape == (7, 10)
    box.load_state(box.state())


def probabilities(make: Callable[[], Any]) -> Callable[[], None]:
    def check() -> None:
        box = SklearnBlackBox(context_of(), make(), digits(num=100), 10)
        box.fit(1)
        assert np.isfinite(box.logits(QUERY)).all()

    return check


def alone_or_second(make: Callable[[], Any]) -> Callable[[], None]:
    """A client learns the same, whomever its process served before."""

    def check() -> None:
        def answers(classifier: Any, num: int) -> Any:
            box = SklearnBlackBox(context_of(), classifier, digits(num=num), 10)
            box.fit(1)
            return box.logits(QUERY)

        alone, once = answers(make(), 60), make()
        answers(once, 100)
        np.testing.assert_array_equal(answers(once, 60), alone)

    return check


def svc_is_told_what_helps() -> None:
    with pytest.raises(ConfigError, match=r"classifier SVC: .* CalibratedClassifierCV\(classifier"):
        SklearnBlackBox(context_of(), SVC(), digits(num=100), 10)
    probabilities(lambda: CalibratedClassifierCV(SVC(), cv=2))()


A_TUPLE = "returns a tuple for 2 images in evaluation mode: return logits"
STACKED = [("nb", GaussianNB())]

REPORTS: dict[str, Callable[[], None]] = {
    # Tied weights, memory layouts, values that are in no state.
    "pytorch/pytorch#188346": goes_on(TiedModules),
    "TransformerLensOrg/TransformerLens#1725": goes_on(SharedMemory),
    "pytorch/pytorch#62264": goes_on(TiedEmbeddings),
    "denisyarats/drq#27": goes_on(Viewing),
    "pytorch/pytorch#77821": goes_on(Hybrid),
    "pytorch/pytorch#150404": goes_on(LazyMLP),
    "hiyouga/LlamaFactory#3062": goes_on(ReadsItself),
    "pytorch/pytorch#28594": copied_model_is_refused,
    "locuslab/deq#23": made_model_is_taken,
    "pytorch/pytorch#102981": goes_on(normed),
    # Names that wrappers give.
    "rasbt/LLMs-from-scratch#580": names(compiled),
    "karpathy/nanoGPT#325": names(lambda model: compiled(nn.DataParallel(compiled(model)))),
    "huggingface/pytorch-image-models#2003": names(lambda model: compiled(nn.DataParallel(model))),
    "FareedKhan-dev/train-llm-from-scratch#36": names(
        lambda model: nn.DataParallel(compiled(model))
    ),
    # What models return.
    "huggingface/transformers#11862": is_taken(
        lambda _, y: SequenceClassifierOutput(loss=y.sum(), logits=y)
    ),
    "huggingface/transformers#886": refused(lambda *_: Returning(lambda _, y: (y,)), A_TUPLE),
    "huggingface/pytorch-image-models#879": refused(
        lambda *_: Returning(lambda m, y: (y, y) if m.training else y),
        "returns a tuple for 2 images in training mode: return logits",
    ),
    "sail-sg/volo#33": refused(lambda *_: Returning(lambda _, y: (y, y, (1, 2, 3))), A_TUPLE),
    # What cannot be trained.
    "pytorch/pytorch#50402": refused(lambda *_: nn.Module(), "has no parameters to train: give"),
    "mikeizbicki/cmc-csci181-deeplearning#7": refused(
        lambda *_: Misspelt(), "has no parameters to train: give a module that has some"
    ),
    "lxztju/pytorch_classification#13": refused(
        lambda *given: mlp(*given).requires_grad_(False), "has no parameters to train"
    ),
    # scikit-learn: what a process shares, and what has probabilities once it is fitted.
    "scikit-learn/scikit-learn#26148": alone_or_second(
        lambda: RandomForestClassifier(5, random_state=np.random.RandomState(0))
    ),
    "scikit-learn/scikit-learn#22041": alone_or_second(
        lambda: RandomForestClassifier(5, warm_start=True, random_state=0)
    ),
    "koaning/scikit-lego#501": probabilities(lambda: StackingClassifier(STACKED, cv=2)),
    "scikit-learn/scikit-learn#19119": probabilities(
        lambda: SelfTrainingClassifier(
            StackingClassifier(STACKED, final_estimator=LogisticRegression(max_iter=500), cv=2)
        )
    ),
    "rasbt/mlxtend#633": svc_is_told_what_helps,
}


@pytest.mark.parametrize("source", REPORTS)
@pytest.mark.filterwarnings("ignore:y contains no unlabeled samples")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_reports_of_others(source: str) -> None:
    REPORTS[source]()
