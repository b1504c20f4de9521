"""Contract of every registered estimator, distribution of directions and kind of differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedzge_flwr.black_boxes.partition import TorchBlackBox
from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import QuerySettings, Settings
from fedzge_flwr.learning.losses import LossTerms
from fedzge_flwr.query.copies import COPIES, Differences, copies_asked
from fedzge_flwr.query.directions import Directions
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.build import check_names
from fedzge_flwr.zeroth_order.base import Estimate, Estimator, asked_tensors
from fedzge_flwr.zeroth_order.chain_rule import pullbacks
from fedzge_flwr.zeroth_order.estimators import ESTIMATORS
from fedzge_flwr.zeroth_order.guided import orthonormal
from fedzge_flwr.zeroth_order.samplers import DIRECTIONS
from tests.helpers.asked import copies_of

N, SHAPE, K = 2, (1, 2, 2), 4
D = 4
DRAWS, MANY = 20, 200
BlackBox = Callable[[Tensor], Tensor]


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=stream(seed), dtype=torch.float64)


class Problem:
    """A black box, a central model, and a loss that goes through both."""

    chunk = 3

    def __init__(
        self,
        *,
        quadratic: bool = False,
        surrogate: BlackBox | None = None,
        d: int = D,
    ) -> None:
        self.matrix, self.weights, self.quadratic = normal(2, K, d), normal(3, N, K), quadratic
        curvature = normal(4, K, d, d)
        self.curvature = (curvature + curvature.transpose(1, 2)) / 2
        self.central = nn.Sequential(nn.Flatten(), nn.Linear(d, K), nn.Tanh()).double()
        for number, parameter in enumerate(self.central.parameters()):
            parameter.data = normal(20 + number, *parameter.shape)
        self.surrogate = surrogate or self.central

    def black_box(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        linear = flat @ self.matrix.T
        if not self.quadratic:
            return linear
        return linear + torch.einsum("nd,kde,ne->nk", flat, self.curvature, flat) / 2

    def terms(
        self, images_NCHW: Tensor, ensemble_logits_NK: Tensor, central_logits_NK: Tensor
    ) -> LossTerms:
        e = ensemble_logits_NK
        clients = (self.weights * e).sum() + (0.1 * (e**2).sum() if self.quadratic else 0)
        # Neither goes through the clients: what the images do themselves, and the central model.
        direct = images_NCHW.pow(3).sum() + central_logits_NK.square().sum()
        return {"total": (clients + 0.1 * direct) / N}

    def central_logits(self, images_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.central(images_NCHW)
        return logits

    def surrogate_logits(self, images_NCHW: Tensor) -> Tensor:
        return self.surrogate(images_NCHW)

    def gradient(self, x: Tensor, *, clients: bool = True) -> Tensor:
        """∂L/∂x by autograd, through the clients or not."""
        leaf = x.clone().requires_grad_()
        logits = self.black_box(leaf if clients else x)
        (gradient,) = torch.autograd.grad(self.loss(leaf, logits), leaf)
        return gradient

    def loss(self, images_NCHW: Tensor, ensemble_logits_NK: Tensor) -> Tensor:
        central_NK = self.central_logits(images_NCHW)
        return self.terms(images_NCHW, ensemble_logits_NK, central_NK)["total"]


def well_guided(**options: bool) -> Problem:
    """A problem whose surrogate is the black box itself."""
    problem = Problem(**options)
    problem.surrogate = problem.black_box
    return problem


@pytest.fixture(params=sorted(DIRECTIONS))
def directions(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=get_args(Differences))
def differences(request: pytest.FixtureRequest) -> Differences:
    kind: Differences = request.param
    return kind


@pytest.fixture(params=sorted(ESTIMATORS))
def estimator_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Make = Callable[..., Estimator]


@pytest.fixture
def make(estimator_name: str, directions: str, differences: Differences) -> Make:
    def build(q: int = 2, eps: float = 1e-4) -> Estimator:
        return ESTIMATORS[estimator_name](DIRECTIONS[directions], q, eps, differences)

    return build


@pytest.fixture
def x() -> Tensor:
    return normal(1, N, *SHAPE)


def answers(queries: Question, problem: Problem) -> Tensor:
    return torch.stack([problem.black_box(copy) for copy in copies_of(queries)])


def directions_of(queries: Question) -> Tensor:
    """As the estimator has them, in the images' dtype."""
    return asked_tensors(queries, torch.device("cpu"))[1]


def run(
    estimator: Estimator, x: Tensor, problem: Problem, rng: torch.Generator
) -> tuple[Question, Estimate]:
    queries = estimator.ask(x, rng, problem)
    return queries, estimator.tell(queries, answers(queries, problem), problem)


def error_of_mean(make: Make, x: Tensor, problem: Problem, eps: float) -> float:
    """The relative error of the estimate: of an unbiased one, in the mean over 4,000 directions."""
    exact = problem.gradient(x)
    if not make().unbiased:
        mean = run(make(eps=eps), x, problem, stream(5))[1].gradient_NCHW
    else:
        rng, estimator = stream(5), make(q=MANY, eps=eps)
        draws = [run(estimator, x, problem, rng)[1].gradient_NCHW for _ in range(DRAWS)]
        mean = torch.stack(draws).mean(dim=0)
    return float((mean - exact).norm() / exact.norm())


def problem_for(estimator: Estimator, **options: bool) -> Problem:
    """An unbiased estimator must cope with any surrogate, another with a perfect one."""
    return Problem(**options) if estimator.unbiased else well_guided(**options)


# A direction's deviation is at most about √(N·d)·‖g‖: twice that of the mean, or rounding.
def tolerance(estimator: Estimator) -> float:
    return 2 * (N * D / (DRAWS * MANY)) ** 0.5 if estimator.unbiased else 1e-6


def forward_bias(problem: Problem, x: Tensor, q: int, eps: float) -> float:
    """Bound the relative error of forward slopes along q orthonormal directions, by curvature.

    Each is off by ε/2·uᵀ(Σₖ ∂L/∂eₖ Hₖ)u at most.
    """
    e = problem.black_box(x).requires_grad_()
    (weights_NK,) = torch.autograd.grad(problem.loss(x, e), e)
    hessians = torch.einsum("nk,kde->nde", weights_NK, problem.curvature)
    largest = torch.linalg.matrix_norm(hessians, ord=2)
    return float(eps / 2 * q**0.5 * largest.norm() / problem.gradient(x).norm())


def test_scale_and_direction_on_a_linear_black_box(make: Make, x: Tensor) -> None:
    error = error_of_mean(make, x, problem_for(make()), eps=1e-4)
    assert error < tolerance(make())


@pytest.mark.parametrize("eps", [1e-3, 1e-1])
def test_bias_on_a_quadratic_black_box(
    make: Make, differences: Differences, x: Tensor, eps: float
) -> None:
    """Forward slopes of a biased estimator are off by O(ε) of the curvature; nothing else is.

    An unbiased one's directions are as often negative: in the mean the curvature falls out. What
    remains of the paper's is the O(ε²) of the whole loss's third derivative.
    """
    problem = problem_for(make(), quadratic=True)
    error = error_of_mean(make, x, problem, eps)
    biased = not make().unbiased and differences == "forward"
    assert error < tolerance(make()) + (forward_bias(problem, x, 2, eps) if biased else 0.0)


def test_forward_slopes_of_a_biased_estimator_are_off_in_proportion_to_eps(x: Tensor) -> None:
    def build(q: int = 2, eps: float = 1e-4) -> Estimator:
        return ESTIMATORS["guided"](DIRECTIONS["sphere"], q, eps, "forward")

    small, large = (
        error_of_mean(build, x, well_guided(quadratic=True), eps) for eps in (1e-3, 1e-1)
    )
    assert large == pytest.approx(100 * small, rel=0.05)
    assert small > 1e-5


def test_same_stream_same_queries_and_estimate(make: Make, x: Tensor) -> None:
    first, again, other = (run(make(), x, Problem(), stream(seed)) for seed in (7, 7, 8))
    assert torch.equal(copies_of(first[0]), copies_of(again[0]))
    assert torch.equal(first[1].gradient_NCHW, again[1].gradient_NCHW)
    if make().unbiased:
        assert not torch.equal(first[1].gradient_NCHW, other[1].gradient_NCHW)


@pytest.mark.parametrize("q", [1, 4])
def test_asks_exactly_the_declared_queries(
    make: Make, estimator_name: str, directions: str, differences: Differences, x: Tensor, q: int
) -> None:
    queries = make(q=q).ask(x, stream(0), Problem())
    # Without building an estimator: clients limit messages by it.
    copies = copies_asked(estimator_name, q, differences)
    assert len(queries.images_BCHW) == queries.num_images == copies * N
    assert copies_of(queries).shape == (queries.copies, *x.shape) == (copies, *x.shape)
    assert torch.equal(copies_of(queries)[0], x)
    settings = from_run_config(
        {
            "estimator": estimator_name,
            "directions": directions,
            "differences": differences,
            "q": q,
            "synthetic-batch-size": 7,
        }
    )
    assert most_asked(settings) == 7 * copies


def most_asked(settings: Settings) -> int:
    """Images of a query that a client of this app answers."""
    box = TorchBlackBox(settings, 0, 10)
    box.close()
    return box.max_query_images


def test_an_estimator_from_outside_may_ask_another_number_of_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"estimator": "mine", "q": 3, "synthetic-batch-size": 7}
    assert copies_asked("mine", 3, "forward") == 4
    assert most_asked(from_run_config(config)) == 28
    monkeypatch.setitem(COPIES, "mine", lambda q, two_sided: 2 * q + two_sided)
    assert copies_asked("mine", 3, "forward") == 6
    assert most_asked(from_run_config({**config, "differences": "central"})) == 49


def test_the_settings_know_every_registered_name() -> None:
    fields = QuerySettings.model_fields
    for name in ESTIMATORS:
        check_names(from_run_config({"estimator": name}))
    for name in DIRECTIONS:
        check_names(from_run_config({"directions": name}))
    with pytest.raises(ConfigError, match="no distribution of directions named 'cube'"):
        check_names(from_run_config({"directions": "cube"}))
    assert get_args(fields["differences"].annotation) == get_args(Differences)


def test_gives_float64_and_detached_terms_and_leaves_no_gradient_behind(
    make: Make, x: Tensor
) -> None:
    problem = Problem()
    queries, estimate = run(make(), x.requires_grad_(False), problem, stream(0))
    assert estimate.gradient_NCHW.dtype == torch.float64
    assert estimate.gradient_NCHW.shape == x.shape
    assert not estimate.gradient_NCHW.requires_grad
    assert not copies_of(queries).requires_grad
    wanted = problem.loss(x, problem.black_box(x))
    assert not estimate.base["total"].requires_grad
    torch.testing.assert_close(estimate.base["total"], wanted.detach())
    assert all(parameter.grad is None for parameter in problem.central.parameters())


@pytest.mark.parametrize("estimator_name", sorted(set(ESTIMATORS) - {"batch-difference"}))
def test_what_needs_no_client_is_exact(make: Make) -> None:
    """All but the paper's take it by autograd: clients that never change their mind add nothing."""
    x = normal(1, N, 1, 3, 4)
    problem = Problem(surrogate=lambda images: 0 * images.flatten(1)[:, :K], d=12)
    queries = make().ask(x, stream(0), problem)
    constant = problem.black_box(x).expand(queries.copies, N, K)
    found = make().tell(queries, constant, problem).gradient_NCHW
    torch.testing.assert_close(found, problem.gradient(x, clients=False), rtol=1e-12, atol=1e-15)


def test_central_differences_are_exact_on_a_quadratic() -> None:
    points = normal(1, N, *SHAPE)
    directions = Directions.written_out(normal(2, 5, N, *SHAPE).float().numpy())
    u = torch.from_numpy(directions.decoded()).double()
    slopes = {}
    for kind in get_args(Differences):
        queries = Question(points.numpy(), directions, 0.1, kind)
        values = copies_of(queries).square().sum(dim=(2, 3, 4))
        slopes[kind] = queries.slopes(values)
    exact = 2 * (points * u).sum(dim=(2, 3, 4))
    torch.testing.assert_close(slopes["central"], exact)
    torch.testing.assert_close(slopes["forward"], exact + 0.1 * u.square().sum(dim=(2, 3, 4)))


def test_directions_have_unit_norm_and_isotropic_covariance(directions: str) -> None:
    u = torch.from_numpy(DIRECTIONS[directions](4000, 3, SHAPE, stream(0)).decoded())
    assert u.dtype == torch.float32
    flat = u.flatten(2)
    torch.testing.assert_close(flat.norm(dim=2), torch.ones(4000, 3), rtol=1e-6, atol=1e-6)
    rows = flat.reshape(-1, D)
    covariance = rows.T @ rows / len(rows)
    assert float((covariance - torch.eye(D) / D).abs().max()) < 0.01
    assert float(rows.mean(0).abs().max()) < 0.02
    # One direction per image, not one for the batch.
    assert not torch.equal(u[0, :1].expand(3, *SHAPE), u[0])


def test_rademacher_directions_are_these_on_every_machine() -> None:
    directions = DIRECTIONS["rademacher"](2, 1, (1, 3, 3), stream(2026))
    assert directions.payload_QGP.nbytes == 0
    u = torch.from_numpy(directions.decoded())
    signs = "".join("+" if value > 0 else "-" for value in u.flatten().tolist())
    assert signs == "++-+-+-++--+-+-+--"
    assert (u.abs() == torch.tensor(1 / 3)).all()


def test_paper_estimator_shares_one_difference_among_the_images(x: Tensor) -> None:
    """ĝ = (d/q) Σⱼ (L(x+εuⱼ) − L(x))/ε · uⱼ: for q = 1 one multiple of u."""
    problem = Problem()
    estimator = ESTIMATORS["batch-difference"](DIRECTIONS["sphere"], 1, 1e-4, "forward")
    queries, estimate = run(estimator, x, problem, stream(0))
    ratio = estimate.gradient_NCHW / directions_of(queries)[0]
    torch.testing.assert_close(ratio, ratio[0, 0, 0, 0].expand_as(ratio))
    base, moved = (problem.loss(x, problem.black_box(x)) for x in copies_of(queries))
    torch.testing.assert_close(ratio[0, 0, 0, 0], D * (moved - base).detach() / queries.eps)


def test_per_image_estimate_takes_nothing_from_other_images(x: Tensor) -> None:
    """Other images' perturbed answers change nothing: that is what it has over the paper's."""
    problem = Problem()
    estimator = ESTIMATORS["per-image"](DIRECTIONS["sphere"], 3, 1e-4, "forward")
    queries = estimator.ask(x, stream(0), problem)
    logits = answers(queries, problem)
    before = estimator.tell(queries, logits, problem).gradient_NCHW
    logits[1:, 1:] += 1.0
    after = estimator.tell(queries, logits, problem).gradient_NCHW
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def guided(q: int, differences: Differences = "forward") -> Estimator:
    return ESTIMATORS["guided"](DIRECTIONS["sphere"], q, 1e-4, differences)


def rounded(directions_QNCHW: Tensor) -> Tensor:
    return torch.from_numpy(Directions.ternary(directions_QNCHW.float().numpy()).decoded()).double()


def test_guided_directions_begin_with_the_surrogates_gradient(
    directions: str, differences: Differences, x: Tensor
) -> None:
    problem = Problem()
    estimator = ESTIMATORS["guided"](DIRECTIONS[directions], 3, 1e-4, differences)
    u = directions_of(estimator.ask(x, stream(0), problem))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((problem.weights * problem.central(leaf)).sum(), leaf)
    assert torch.equal(u[0], rounded(gradient[None])[0])
    torch.testing.assert_close(u.flatten(2).norm(dim=2), torch.ones(3, N).double())


def test_guided_rows_are_those_of_the_likeliest_classes() -> None:
    """As nearly as a direction may be sent: each row, less what lies along those before it."""
    x, problem = normal(1, N, 1, 3, 3), Problem(d=9)
    matrix = normal(4, K, 9)
    problem.surrogate = lambda images: images.flatten(1) @ matrix.T
    u = directions_of(guided(3).ask(x, stream(0), problem))
    rows = matrix - matrix.mean(dim=0)
    likely = problem.surrogate(x).argsort(dim=1, descending=True)[:, :2].T
    gradient = problem.weights @ matrix
    wanted = orthonormal(torch.cat((gradient[None], rows[likely])), normal(9, 3, N, 9))
    assert torch.equal(u, rounded(wanted.reshape(3, N, 1, 3, 3)))


@pytest.mark.parametrize("q", [1, 3])
def test_guided_estimate_has_the_measured_slopes(
    differences: Differences, x: Tensor, q: int
) -> None:
    """Whatever the surrogate, the estimate is right in every direction that was asked about."""
    problem = Problem()
    queries, estimate = run(guided(q, differences), x, problem, stream(0))
    wrong = (estimate.gradient_NCHW - problem.gradient(x)).flatten(1)
    u = directions_of(queries).flatten(2)
    torch.testing.assert_close(
        torch.einsum("qnd,nd->qn", u, wrong), torch.zeros(q, N).double(), rtol=0, atol=1e-9
    )


def test_guided_with_directions_that_span_everything_is_exact_whatever_the_surrogate(
    differences: Differences,
) -> None:
    x, problem = normal(1, N, 1, 3, 3), Problem(d=9)
    queries, estimate = run(guided(9, differences), x, problem, stream(0))
    ranks = torch.linalg.matrix_rank(directions_of(queries).flatten(2).transpose(0, 1))
    assert ranks.tolist() == [9, 9]
    torch.testing.assert_close(estimate.gradient_NCHW, problem.gradient(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("q", [1, 2, 3])
def test_guided_counts_directions_that_coincide_once(x: Tensor, q: int) -> None:
    """Two may, once they are rounded."""
    problem, estimator = Problem(), guided(2 * q)
    once = guided(q).ask(x, stream(0), problem)
    payload = once.directions.payload_QGP
    twice = Question(x.numpy(), Directions(np.concatenate((payload, payload)), SHAPE), once.eps)
    estimates = [
        estimator.tell(queries, answers(queries, problem), problem).gradient_NCHW
        for queries in (once, twice)
    ]
    torch.testing.assert_close(*estimates)


def test_guided_scales_the_surrogate_to_what_was_measured(x: Tensor) -> None:
    """A surrogate that is right but for its scale gives the exact gradient from one direction."""
    problem = well_guided()
    problem.surrogate = lambda images: 0.2 * problem.black_box(images)
    # The asked direction must not be the whole answer already: another gradient was foreseen.
    estimator = guided(1)
    queries = estimator.ask(x, stream(0), problem)
    payload = np.roll(queries.directions.payload_QGP, 1, axis=1)
    turned = Question(x.numpy(), Directions(payload, SHAPE), queries.eps)
    found = estimator.tell(turned, answers(turned, problem), problem).gradient_NCHW
    torch.testing.assert_close(found, problem.gradient(x), rtol=1e-6, atol=1e-9)


def test_guided_without_guidance_is_random_and_finite(x: Tensor) -> None:
    problem = Problem(surrogate=lambda images: 0 * images.flatten(1))
    (queries, estimate), (other, _) = (run(guided(2), x, problem, stream(seed)) for seed in (0, 1))
    assert not np.array_equal(queries.directions.payload_QGP, other.directions.payload_QGP)
    assert torch.isfinite(estimate.gradient_NCHW).all()


def test_orthonormal_replaces_a_guide_that_repeats_another() -> None:
    guide, spare = normal(1, 1, N, D), normal(2, 3, N, D)
    u = orthonormal(torch.cat((guide, 2 * guide)), spare)
    torch.testing.assert_close(
        torch.einsum("qnd,pnd->nqp", u, u), torch.eye(3).double().expand(N, 3, 3)
    )


def test_pullbacks_are_the_same_in_chunks() -> None:
    problem, images, cotangents = Problem(), normal(1, 70, *SHAPE), normal(2, 2, 70, K)
    found = pullbacks(problem.central, images, cotangents, 16)
    leaf = images.clone().requires_grad_()
    logits = problem.central(leaf)
    for number in range(2):
        (wanted,) = torch.autograd.grad(logits, leaf, cotangents[number], retain_graph=True)
        torch.testing.assert_close(found[number], wanted)


def test_pullbacks_go_on_with_fewer_images_when_memory_runs_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    problem, images, cotangents = Problem(), normal(1, 20, *SHAPE), normal(2, 2, 20, K)
    asked = []

    def fits_four(x: Tensor) -> Tensor:
        asked.append(len(x))
        if len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        logits: Tensor = problem.central(x)
        return logits

    found = pullbacks(fits_four, images, cotangents, 16)
    torch.testing.assert_close(found, pullbacks(problem.central, images, cotangents, 16))
    assert asked == [16, 8, 4, 4, 4, 4, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory: 8 images at a time from here on",
        "out of memory: 4 images at a time from here on",
    ]


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_how_many_images_are_differentiated_at_once_is_no_matter(name: str) -> None:
    estimates = []
    for chunk in (1, 2, N):
        problem = Problem()
        problem.chunk = chunk
        estimator = ESTIMATORS[name](DIRECTIONS["rademacher"], 2, 0.1)
        stream = torch.Generator().manual_seed(0)
        queries = estimator.ask(normal(5, N, *SHAPE), stream, problem)
        answers = torch.stack([problem.black_box(x) for x in copies_of(queries)])
        estimates.append(estimator.tell(queries, answers, problem).gradient_NCHW)
    torch.testing.assert_close(estimates[0], estimates[2])
    torch.testing.assert_close(estimates[1], estimates[2])
