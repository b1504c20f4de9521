from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from fedzge_flwr.config.sections import OptimizerSettings, TrainingSettings
from fedzge_flwr.learning.distillation import class_weights, distill, distillation_step
from fedzge_flwr.learning.models.catalogue import build_model
from fedzge_flwr.learning.numerics import exact_float32, reproducible
from fedzge_flwr.learning.predict import evaluate_logits, predict
from fedzge_flwr.learning.training import (
    OwnImages,
    fit,
    local_epochs,
    log_class_prior,
    make_optimizer,
    make_schedule,
    minibatches,
    steps_an_epoch,
)

SHAPE = (1, 8, 8)


@pytest.fixture
def model() -> nn.Module:
    return build_model("cnn", SHAPE, 3)


@pytest.mark.parametrize(
    ("num_images", "sizes"), [(10, [4, 4, 2]), (9, [4, 5]), (2, [2]), (1, [1])]
)
def test_no_batch_of_one_among_several(num_images: int, sizes: list[int]) -> None:
    batches = minibatches(num_images, 4, torch.Generator().manual_seed(0))
    assert [len(batch) for batch in batches] == sizes
    assert sorted(torch.cat(batches).tolist()) == list(range(num_images))


@pytest.mark.parametrize("size", [2, 3, 4, 64])
def test_steps_are_counted_as_they_are_taken(size: int) -> None:
    assert steps_an_epoch(0, size) == 1
    for num_images in range(1, 4 * size):
        batches = minibatches(num_images, size, torch.Generator().manual_seed(0))
        assert steps_an_epoch(num_images, size) == len(batches)


@pytest.mark.parametrize("num_images", [2, 64, 65, 66, 88, 140, 600, 6400, 50_000])
def test_epochs_are_added_up_to_the_fewest_steps_and_no_further(num_images: int) -> None:
    training = TrainingSettings(local_epochs=2, min_local_steps=100, batch_size=64)
    epochs, steps = local_epochs(num_images, training), steps_an_epoch(num_images, 64)
    assert epochs * steps >= 100
    assert epochs == 2 or (epochs - 1) * steps < 100


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "step", "none"])
def test_fit_learns_and_is_a_function_of_its_stream(optimizer: str, schedule: str) -> None:
    settings = OptimizerSettings(optimizer=optimizer, lr_schedule=schedule)  # type: ignore[arg-type]
    labels = torch.arange(60) % 3
    images = (labels[:, None, None, None] * 100).expand(60, *SHAPE).byte().clone()
    images[:, :, ::2] //= 2
    weights, losses = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        model = build_model("cnn", SHAPE, 3)
        loss = fit(
            model,
            OwnImages(images, labels, None),
            epochs=8,
            batch_size=16,
            lr=0.01,
            settings=settings,
            stream=torch.Generator().manual_seed(seed),
        )
        assert not model.training
        losses.append(loss)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[0] < 0.5 * math.log(3)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_fit_refuses_a_single_image(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="1 images; training needs 2"):
        fit(
            model,
            OwnImages(
                torch.zeros(1, *SHAPE, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), None
            ),
            epochs=1,
            batch_size=4,
            lr=0.1,
            settings=OptimizerSettings(),
            stream=torch.Generator(),
        )


def rates(settings: OptimizerSettings, span: int) -> list[float]:
    optimizer = make_optimizer([nn.Parameter(torch.zeros(1))], settings, 0.1)
    schedule = make_schedule(optimizer, settings, [1] * span)
    found = []
    for _ in range(span):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return found


def test_schedules_span_the_phase() -> None:
    cosine = [0.05 * (1 + math.cos(math.pi * t / 4)) for t in range(4)]
    assert rates(OptimizerSettings(lr_schedule="cosine"), 4) == pytest.approx(cosine)
    step = OptimizerSettings(lr_schedule="step", lr_step_size=2, lr_gamma=0.5)
    assert rates(step, 5) == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])
    assert rates(OptimizerSettings(lr_schedule="none"), 3) == [0.1] * 3


@pytest.mark.parametrize(("batch_size", "an_epoch"), [(4, 3), (0, 1), (12, 1), (64, 1)])
def test_distillation_steps_its_rate_after_epochs(batch_size: int, an_epoch: int) -> None:
    """Twelve images: three batches of four, or the full batch, are an epoch, and then it stands."""
    settings = OptimizerSettings(
        optimizer="sgd", momentum=0.0, lr_schedule="step", lr_step_size=1, lr_gamma=1e-9
    )
    images = torch.randn(12, *SHAPE, generator=torch.Generator().manual_seed(1))
    answers = torch.randn(12, 3, generator=torch.Generator().manual_seed(2))

    def after(steps: int) -> torch.Tensor:
        torch.manual_seed(0)
        student = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        distill(
            student,
            images,
            answers,
            steps=steps,
            batch_size=batch_size,
            temperature=1.0,
            lr=0.1,
            settings=settings,
            stream=torch.Generator().manual_seed(3),
        )
        return student[1].weight.detach().clone()

    found = [after(steps) for steps in (an_epoch, an_epoch + 1, an_epoch + 5)]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-6)
    if an_epoch > 1:
        assert not torch.allclose(after(an_epoch - 1), found[0], atol=1e-4)


def test_sgd_takes_momentum_and_weight_decay() -> None:
    settings = OptimizerSettings(optimizer="sgd", momentum=0.7, weight_decay=0.02)
    group = make_optimizer([nn.Parameter(torch.zeros(1))], settings, 0.1).param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["lr"]) == (0.7, 0.02, 0.1)


def test_distill_moves_the_student_to_the_teacher(model: nn.Module) -> None:
    x = torch.randn(30, *SHAPE)
    teacher = 3 * torch.randn(30, 3)

    def run(steps: int, batch_size: int) -> float:
        return distill(
            model,
            x,
            teacher,
            steps=steps,
            batch_size=batch_size,
            temperature=2.0,
            lr=0.01,
            settings=OptimizerSettings(),
            stream=torch.Generator().manual_seed(0),
        )

    first = run(1, 0)
    middle = run(30, 0)
    assert middle < 0.6 * first
    # Minibatches of 8 of 30 images.
    assert run(60, 8) < 0.1 * first
    assert not model.training


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_distillation_evens_out_the_classes_of_the_answers(model: nn.Module, power: float) -> None:
    """Of 100 images the teacher calls 80 class 0, 20 class 1, none class 2."""
    x = (torch.arange(100.0) >= 80).float().reshape(100, 1, 1, 1).expand(100, *SHAPE).contiguous()
    teacher = torch.zeros(100, 3)
    teacher[:80, 0] = teacher[80:, 1] = 2.0
    weights = class_weights(teacher, power)
    ratio = ((0.8 + 0.01) / (0.2 + 0.01)) ** power
    torch.testing.assert_close(weights[99] / weights[0], torch.tensor(ratio))
    drawn: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: drawn.append(inputs[0][:, 0, 0, 0]))
    distill(
        model,
        x,
        teacher,
        steps=100,
        batch_size=32,
        temperature=1.0,
        lr=0.0,
        settings=OptimizerSettings(),
        stream=torch.Generator().manual_seed(0),
        class_balance=power,
    )
    wanted = 20 * ratio / (20 * ratio + 80)
    assert float(torch.cat(drawn).mean()) == pytest.approx(wanted, abs=0.03)
    assert drawn[0].tolist() != drawn[1].tolist()


def test_predict_leaves_no_trace_and_ignores_batching(model: nn.Module) -> None:
    """A query must not leak into batch norm's statistics, nor depend on its neighbours."""
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = 5 + 3 * torch.randn(20, *SHAPE)
    whole = predict(model, x, 20)
    one_by_one = predict(model, x, 1)
    torch.testing.assert_close(whole, one_by_one, rtol=1e-5, atol=1e-5)
    assert whole.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("host", ["legacy", "precision"])
def test_exact_float32_is_restored(host: str) -> None:
    """Whichever of torch's two interfaces the host program has used."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if host == "legacy":
            matmul.allow_tf32 = True
        else:
            matmul.fp32_precision = "tf32"
        with exact_float32():
            assert matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_reproducible_is_restored() -> None:
    assert not torch.backends.cudnn.deterministic
    with reproducible():
        assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.deterministic


def test_evaluate_logits() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    outcome = evaluate_logits(logits, torch.tensor([0, 1, 1]))
    assert outcome.accuracy == pytest.approx(2 / 3)
    wanted = (math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(3))) / 3
    assert outcome.loss == pytest.approx(wanted, rel=1e-5)


def fitted_linear(own: OwnImages, num_classes: int, **more: Any) -> nn.Module:
    """Fit a linear classifier by 300 full-batch steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), num_classes))
    fit(
        model,
        own,
        epochs=300,
        batch_size=len(own.labels_N),
        settings=OptimizerSettings(lr_schedule="none"),
        stream=torch.Generator().manual_seed(0),
        **more,
    )
    return model


def test_logit_adjustment_frees_the_model_of_class_frequencies() -> None:
    """On images without content, plain training learns the frequencies, adjusted training none."""
    labels = torch.tensor([0] * 45 + [1] * 5)
    images = torch.zeros(50, *SHAPE, dtype=torch.uint8)
    prior = log_class_prior(labels, 3)
    torch.testing.assert_close(prior, torch.tensor([0.91, 0.11, 0.01]).log())
    answers = []
    for log_prior in (None, prior):
        model = fitted_linear(OwnImages(images, labels, log_prior), 3, lr=0.003)
        answers.append(predict(model, images[:1], 1)[0])
    plain, adjusted = answers
    assert float(plain[0] - plain[1]) == pytest.approx(math.log(9), abs=0.1)
    assert float(adjusted[0] - adjusted[1]) == pytest.approx(
        math.log(9) - math.log(0.91 / 0.11), abs=0.1
    )
    # A class without images is pushed down by less.
    assert float(adjusted[0] - adjusted[2]) < float(plain[0] - plain[2]) - 1


def test_a_loss_with_no_prior_for_an_unseen_class_leaves_it_alone() -> None:
    labels = torch.tensor([0, 0, 1])
    own = OwnImages(torch.zeros(3, *SHAPE, dtype=torch.uint8), labels, None)
    for unseen, touched in ((0.01, True), (0.0, False)):
        logits = torch.zeros(3, 4, requires_grad=True)
        prior = log_class_prior(labels, 4, unseen)
        own._replace(log_prior_K=prior).loss(logits, labels).backward()
        assert logits.grad is not None
        assert bool(logits.grad[:, :2].abs().sum() > 0)
        assert torch.isfinite(logits.grad).all()
        assert bool(logits.grad[:, 2:].abs().sum() > 0) is touched


def test_mixup_trains_on_mixtures_of_images_and_labels() -> None:
    """Between two classes' images, the model learns the share of each."""
    images = torch.zeros(64, *SHAPE, dtype=torch.uint8)
    images[32:] = 255
    labels = torch.tensor([0] * 32 + [1] * 32)
    # 191 is three quarters of the way from black to white.
    asked = torch.tensor([191, 255], dtype=torch.uint8)[:, None, None, None].expand(2, *SHAPE)
    answers = []
    for mixup in (False, True):
        model = fitted_linear(OwnImages(images, labels, None), 2, lr=0.01, mixup=mixup)
        answers.append(predict(model, asked, 2).softmax(dim=1)[:, 1].tolist())
    plain, mixed = answers
    assert plain[0] > 0.95
    assert mixed[0] == pytest.approx(0.75, abs=0.1)
    assert mixed[1] > 0.85


def test_mixup_repeats_with_its_stream(model: nn.Module) -> None:
    images = torch.randint(256, (20, *SHAPE), generator=torch.Generator().manual_seed(1))
    losses = {
        fit(
            copy.deepcopy(model),
            OwnImages(images.to(torch.uint8), torch.arange(20) % 3, None),
            epochs=2,
            batch_size=8,
            lr=0.01,
            settings=OptimizerSettings(),
            stream=torch.Generator().manual_seed(seed),
            mixup=True,
        )
        for seed in (0, 0, 1)
    }
    assert len(losses) == 2


def test_a_steps_gradient_is_cut_to_its_norm() -> None:
    torch.manual_seed(0)
    x, teacher, first = torch.randn(8, 4), 9 * torch.randn(8, 3), nn.Linear(4, 3)

    def moved(max_norm: float) -> torch.Tensor:
        model = copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        distillation_step(model, x, teacher, optimizer, 1.0, None, max_norm)
        pairs = zip(model.parameters(), first.parameters(), strict=True)
        return torch.cat([(after - before).detach().flatten() for after, before in pairs])

    whole = moved(0.0)
    assert whole.norm() > 0.1
    torch.testing.assert_close(moved(0.01), 0.01 * whole / whole.norm(), rtol=1e-3, atol=1e-7)
    assert torch.equal(moved(1e6), whole)


def test_rehearsal_keeps_what_distillation_alone_forgets() -> None:
    """Own images are classified as before, while the teacher's answers elsewhere are learned."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    own = (70 * labels[:, None, None, None] + torch.randint(30, (60, *SHAPE), generator=stream)).to(
        torch.uint8
    )
    x = torch.rand(90, *SHAPE, generator=stream) * 2 - 1
    teacher = torch.zeros(90, 3)
    teacher[:, 2] = 6.0
    accuracies, answers = [], []
    for rehearsed in (None, OwnImages(own, labels, None)):
        torch.manual_seed(0)
        model = build_model("cnn", SHAPE, 3)
        arguments = {"lr": 0.005, "settings": OptimizerSettings(), "stream": stream}
        fit(model, OwnImages(own, labels, None), epochs=30, batch_size=20, **arguments)
        before = evaluate_logits(predict(model, own, 60), labels).accuracy
        assert before > 0.95
        distill(
            model,
            x,
            teacher,
            steps=60,
            batch_size=30,
            temperature=1.0,
            rehearsed=rehearsed,
            **arguments,
        )
        accuracies.append(evaluate_logits(predict(model, own, 60), labels).accuracy)
        answers.append(float((predict(model, x, 90).argmax(dim=1) == 2).float().mean()))
    assert accuracies[0] < 0.7
    assert accuracies[1] > 0.95
    assert min(answers) > 0.9


def test_rehearsal_adjusts_for_class_frequencies() -> None:
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 0, 0, 1])
    prior = log_class_prior(labels, 3)
    plain = OwnImages(torch.zeros(4, *SHAPE, dtype=torch.uint8), labels, None)
    assert float(plain.loss(logits, labels)) == pytest.approx(math.log(3))
    adjusted = plain._replace(log_prior_K=prior).loss(logits, labels)
    assert float(adjusted) == pytest.approx(
        float(-(0.75 * prior[0] + 0.25 * prior[1] - prior.logsumexp(0)))
    )


class Cramped(nn.Module):
    """A model with memory for so many images."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.linear, self.most = nn.Linear(64, 3), most
        self.asked: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        logits: torch.Tensor = self.linear(x.flatten(1))
        return logits


def test_batches_are_halved_when_memory_runs_out(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Cramped(most=3), torch.randn(11, *SHAPE)
    logits = predict(model, x, 8)
    assert model.asked == [8, 4, 2, 2, 2, 2, 2, 1]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: 4 images at a time from here on",
        "out of memory: 2 images at a time from here on",
    ]
    with torch.inference_mode():
        torch.testing.assert_close(logits, model.linear(x.flatten(1)))
    with pytest.raises(torch.OutOfMemoryError):
        predict(Cramped(most=0), x, 8)
