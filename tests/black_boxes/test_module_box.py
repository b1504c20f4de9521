"""A PyTorch module with training code of one's own as a black box."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedzge_flwr import ImageSet, ModuleBlackBox, make_settings
from fedzge_flwr.black_boxes import node as node_module
from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.common.errors import ConfigError, DataError
from fedzge_flwr.data.partition import client_data
from tests.helpers.boxes import QUERY, SHAPE, TINY, context_of, digits, train_a_little
from tests.helpers.small_models import mlp


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


def test_a_model_may_be_made_when_it_is_needed() -> None:
    """Once a box: what was made is the box's own."""
    made: list[nn.Module] = []

    def make() -> nn.Module:
        torch.manual_seed(0)
        made.append(mlp(SHAPE, 10))
        return made[-1]

    box, other = (
        ModuleBlackBox(context_of(number), make, train_a_little, SHAPE, 10, 50) for number in (0, 1)
    )
    assert made == []
    first = box.logits(QUERY)
    box.fit(1)
    assert len(made) == 1
    assert box._model is made[0]
    assert not np.array_equal(box.logits(QUERY), first)
    assert np.array_equal(other.logits(QUERY), first)
    assert len(made) == 2
    given = ModuleBlackBox(context_of(), made[1], train_a_little, SHAPE, 10, 50)
    assert np.array_equal(given.logits(QUERY), first)


def test_own_images_may_be_read_when_they_are_needed() -> None:
    """And the model then learns what it does from images that are given."""
    read: list[ImageSet] = []

    def own() -> ImageSet:
        read.append(digits(num=30))
        return read[-1]

    states = []
    for given in (own, digits(num=30)):
        torch.manual_seed(0)
        box = ModuleBlackBox(
            context_of(), mlp(SHAPE, 10), None, SHAPE, 10, 30,
            own=given, settings=make_settings(min_local_steps=2, client_distill_steps=2),
        )  # fmt: skip
        if given is own:
            box.logits(QUERY)
            assert read == []
        assert box.fit(1).num_examples == 30
        box.distill(1, QUERY, np.eye(7, 10, dtype=np.float32), 1.5)
        states.append(box.state())
    assert len(read) == 2
    for name, value in states[0].items():
        np.testing.assert_array_equal(states[1][name], value)


def test_the_runs_own_client_is_a_module_with_a_partition() -> None:
    """Training, distillation, rehearsal and seeds have one implementation."""
    assert issubclass(TorchBlackBox, ModuleBlackBox)
    for name in ("fit", "distill", "logits", "state", "close"):
        assert getattr(TorchBlackBox, name) is getattr(ModuleBlackBox, name)


def test_a_module_may_test_itself() -> None:
    box = ModuleBlackBox(
        *(context_of(), mlp(SHAPE, 10), train_a_little, SHAPE, 10, 200),
        test=lambda model: (0.5, 0.25),
        num_test_examples=4,
    )
    outcome = box.evaluate("held-out")
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
    monkeypatch.setattr(node_module, "cap_memory", refused)
    context = context_of()
    context.run_config = settings.to_run_config()
    with pytest.raises(RuntimeError, match="no memory to cap"):
        node_module.torch_black_box(context)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("rehearsal", [True, False])
def test_a_module_distils_as_the_runs_own_client_does(rehearsal: bool) -> None:
    """And trains so: with the same model, images and settings, bit for bit."""
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
    trained = ModuleBlackBox(
        context_of(1), runs._model, None, SHAPE, 10, len(data), own=data, settings=settings
    )
    assert trained.fit(2) == TorchBlackBox(settings, 1, 3).fit(2)
    again = TorchBlackBox(settings, 1, 3)
    again.fit(2)
    for name, value in again.state().items():
        np.testing.assert_array_equal(trained.state()[name], value)
    runs.distill(3, QUERY, np.eye(7, 10, dtype=np.float32), 1.5)
    wanted = runs.state()
    alike = [all(np.array_equal(found[name], wanted[name]) for name in wanted) for found in states]
    assert alike == [True, not rehearsal]


def test_no_steps_of_distillation_are_no_distillation() -> None:
    """By its own settings, whatever the server sends."""
    settings = make_settings(**{**TINY, "client_distill_steps": 0})
    own = digits(num=20)
    box = ModuleBlackBox(
        context_of(), mlp(SHAPE, 10), None, SHAPE, 10, 20, own=own, settings=settings
    )
    before = {name: value.copy() for name, value in box.state().items()}
    images = digits(num=8).inputs_NCHW
    assert box.distill(1, images, np.zeros((8, 10), np.float32), 2.0) == 0.0
    assert all((value == before[name]).all() for name, value in box.state().items())


def test_own_training_draws_from_the_seed() -> None:
    """Whatever torch's default generator has come to, and without moving it; each round anew."""

    def shuffled(round_: int, seed: int, partition: int = 0) -> list[float]:
        drawn: list[float] = []
        box = ModuleBlackBox(
            context_of(partition),
            nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10)),
            lambda model: drawn.extend(torch.rand(2).tolist()),
            SHAPE,
            10,
            5,
            settings=make_settings(seed=seed, client_distill_steps=2),
        )
        torch.manual_seed(round_ + seed + partition)
        before = torch.get_rng_state()
        box.fit(round_)
        before_dropout = len(drawn)
        box.distill(round_, QUERY, np.eye(7, 10, dtype=np.float32), 1.0)
        assert torch.equal(torch.get_rng_state(), before)
        assert before_dropout == 2
        return drawn

    assert shuffled(1, 0) == shuffled(1, 0)
    assert len({tuple(shuffled(*args)) for args in ((1, 0), (2, 0), (1, 1), (1, 0, 1))}) == 4


def test_own_images_that_do_not_suit_the_model() -> None:
    own = digits(num=4)
    wide = ImageSet(np.zeros((2, 1, 8, 9), np.uint8), np.zeros(2, int))
    for images, classes, message in ((wide, 10, "the model's"), (own, 3, "numbered from 0 to 2")):
        given = (context_of(), mlp(SHAPE, 10), None, SHAPE, classes, 4)
        with pytest.raises(DataError, match=message):
            ModuleBlackBox(*given, own=images)
        # Of a function they are looked at when they are needed.
        later = ModuleBlackBox(*given, own=lambda images=images: images)
        with pytest.raises(DataError, match=message):
            later.fit(1)
        later.close()
