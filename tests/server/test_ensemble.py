"""How the clients' answers combine, against closed forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedzge_flwr.server.ensemble import (
    ENSEMBLES,
    Answers,
    Combination,
    class_tendency,
    confidence,
    ensemble_weights,
    known_contrasts,
    mean,
    mean_probability,
    median,
    robust_contrasts,
    trimmed_mean,
    update_tendencies,
)

UNIFORM = np.full(3, 1 / 3)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def random_logits(seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(4, 3))).astype("f4")


def answers(**tendencies: np.ndarray) -> Answers:
    logits = {0: random_logits(0, 3.0), 2: random_logits(2, 3.0)}
    given = {0: tendencies.get("first", UNIFORM), 2: tendencies.get("second", UNIFORM)}
    return Answers(logits, {0: 0.25, 2: 0.75}, given)


def test_weights_are_renormalised_over_who_answered() -> None:
    assert ensemble_weights({0: 10, 2: 30}) == {0: 0.25, 2: 0.75}
    assert sum(ensemble_weights({0: 10, 1: 10**6, 2: 30}).values()) == pytest.approx(1.0)
    assert ensemble_weights({4: 0, 2: 0}) == {2: 0.5, 4: 0.5}
    assert list(ensemble_weights({4: 1, 2: 1})) == [2, 4]


def test_mean() -> None:
    given = answers()
    expected = 0.25 * given.logits[0] + 0.75 * given.logits[2]
    np.testing.assert_allclose(mean(given), expected, rtol=1e-6)


def test_mean_probability() -> None:
    given = answers()
    pool = 0.25 * softmax(given.logits[0]) + 0.75 * softmax(given.logits[2])
    np.testing.assert_allclose(np.exp(mean_probability(given)), pool, rtol=1e-5)


def test_confidence_leans_to_the_sure_client() -> None:
    sure, unsure = np.array([[9.0, 0, 0]], "f4"), np.array([[0, 0.1, 0]], "f4")
    given = Answers({0: sure, 1: unsure}, {0: 0.5, 1: 0.5}, {0: UNIFORM, 1: UNIFORM})
    probability = softmax(confidence(given))[0, 0]
    assert probability > softmax(mean_probability(given))[0, 0] + 0.1
    # An unsure client weighs exp(−2·log 3) = 1/9 of a sure one.
    assert probability == pytest.approx((1 + 1 / 27) / (1 + 1 / 9), abs=0.01)


def test_class_tendency_is_the_bayes_posterior_of_the_client() -> None:
    first, second = np.array([0.8, 0.1, 0.1]), np.array([0.1, 0.1, 0.8])
    given = answers(first=first, second=second)
    knowledge = np.stack([0.25 * first, 0.75 * second])
    votes = knowledge / knowledge.sum(axis=0)
    pool = votes[0] * softmax(given.logits[0]) + votes[1] * softmax(given.logits[2])
    pool /= pool.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(class_tendency(given)), pool, rtol=1e-5)


@pytest.mark.parametrize(
    "combine",
    [mean_probability, class_tendency, confidence, known_contrasts, robust_contrasts],
)
def test_pools_soften_each_answer(combine: Combination) -> None:
    given = answers(first=np.array([0.8, 0.1, 0.1]), second=np.array([0.1, 0.1, 0.8]))
    halved = {partition: logits / 2 for partition, logits in given.logits.items()}
    softened = combine(replace(given, temperature=2.0))
    wanted = combine(replace(given, logits=halved))
    np.testing.assert_allclose(softened, wanted, rtol=1e-5, atol=1e-6)
    assert not np.allclose(softened, combine(given))


def test_class_tendency_without_contrast_is_the_mean_probability() -> None:
    given = answers()
    np.testing.assert_allclose(class_tendency(given), mean_probability(given), rtol=1e-5)


def contrasts(logits: np.ndarray) -> np.ndarray:
    return np.asarray(logits - logits[:, :1])


def test_known_contrasts_solves_its_least_squares() -> None:
    """Against a generic solver of the same problem over e and c, image by image."""
    rng = np.random.default_rng(0)
    logits = {m: rng.normal(size=(4, 5)).astype("f4") for m in range(3)}
    tendencies = {m: rng.dirichlet(np.ones(5)) for m in range(3)}
    weights = {0: 0.5, 1: 0.2, 2: 0.3}
    rows, targets = [], []
    for m in range(3):
        for k in range(5):
            root = np.sqrt(weights[m] * tendencies[m][k])
            rows.append(root * np.concatenate([np.eye(5)[k], np.eye(3)[m]]))
            targets.append(root * logits[m][:, k])
    wanted = np.linalg.lstsq(np.stack(rows), np.stack(targets), rcond=None)[0][:5].T
    found = known_contrasts(Answers(logits, weights, tendencies))
    np.testing.assert_allclose(contrasts(found), contrasts(wanted), rtol=1e-4, atol=1e-5)


def test_known_contrasts_of_clients_that_know_all_is_the_mean_of_logits() -> None:
    given = answers()
    np.testing.assert_allclose(
        contrasts(known_contrasts(given)), contrasts(mean(given)), rtol=1e-4, atol=1e-5
    )


def test_known_contrasts_hears_only_who_knows_both_classes() -> None:
    """Who knows 0 and 1, and who knows 1 and 2, together tell 0 from 2; the rest is not heard."""
    truth = np.array([[2.0, 0.5, -1.0], [-3.0, 0.0, 4.0]], "f4")
    first, second = truth + 7, truth - 3
    # Sure, and wrong, of the class that each never saw.
    first[:, 2] += 20
    second[:, 0] -= 20
    tendencies = {0: np.array([0.6, 0.4, 0.0]), 1: np.array([0.0, 0.3, 0.7])}
    given = Answers({0: first, 1: second}, {0: 0.5, 1: 0.5}, tendencies)
    np.testing.assert_allclose(contrasts(known_contrasts(given)), contrasts(truth), atol=0.05)
    assert not np.allclose(contrasts(class_tendency(given)), contrasts(truth), atol=1.0)


def five_that_know_all(seed: int, liar: np.ndarray) -> Answers:
    """Four clients that agree but for noise of 0.1, and a liar, client 2; all know all classes."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=liar.shape)
    logits = {m: (truth + 0.1 * rng.normal(size=liar.shape)).astype("f4") for m in (0, 1, 3, 4)}
    return equals({**logits, 2: liar})


def test_robust_contrasts_of_clients_that_agree_are_what_they_say() -> None:
    """Offsets of their own, tendencies and weights of any kind change nothing."""
    truth = random_logits(0)
    rng = np.random.default_rng(0)
    given = Answers(
        {m: truth + np.float32(5 * m) for m in range(4)},
        ensemble_weights({0: 7, 1: 10**9, 2: 30, 3: 1}),
        {m: rng.dirichlet(np.ones(3)) for m in range(4)},
    )
    found = contrasts(robust_contrasts(given))
    np.testing.assert_allclose(found, contrasts(truth), rtol=1e-5, atol=1e-6)


def test_robust_contrasts_minimise_their_objective() -> None:
    """A fixed point is where the gradient of Σ wₘ s² log(s² + dₘ² + Dₘ) ends.

    Here of a single image, where dₘ² and its means Dₘ are one.
    """
    rng = np.random.default_rng(3)
    logits = {m: rng.normal(size=(1, 4)).astype("f4") for m in range(5)}
    logits[1] += np.array([[3.0, -3.0, 0.0, 0.0]], "f4")
    tendencies = {m: rng.dirichlet(np.ones(4)) for m in range(5)}
    weights = dict.fromkeys(range(5), 0.2)
    found = robust_contrasts(Answers(logits, weights, tendencies))[0].astype("f8")
    logs = {m: np.log(softmax(value.astype("f8")))[0] for m, value in logits.items()}
    lowest = sorted(min(value) for value in logs.values())[2]
    heard = {m: np.maximum(value, lowest) for m, value in logs.items()}

    def distance(e: torch.Tensor, m: int) -> torch.Tensor:
        rest, share = torch.from_numpy(heard[m]) - e, torch.from_numpy(tendencies[m])
        return (share * (rest - (share * rest).sum()) ** 2).sum()

    at = torch.from_numpy(found).requires_grad_()
    distances = torch.stack([distance(at, m) for m in range(5)])
    scale = max(2.385**2 * float(distances.detach().median()), 0.25)
    (gradient,) = torch.autograd.grad(torch.log(scale + 2 * distances).sum(), at)
    largest = torch.autograd.grad(sum(distance(at, m) for m in range(5)), at)[0].abs().max()
    assert gradient.abs().max() < 0.01 * max(float(largest), 1.0)


def test_robust_contrasts_are_as_sure_as_the_clients() -> None:
    """Nothing that honest clients are sure of is cut off: those who distill it would forget it."""
    truth = random_logits(0)
    surer = contrasts(robust_contrasts(equals(dict.fromkeys(range(5), 30 * truth))))
    np.testing.assert_allclose(surer, 30 * contrasts(truth), rtol=1e-4, atol=1e-3)


def test_who_lied_when_it_said_a_class_is_not_believed_of_that_class() -> None:
    """Client 2 lies of class 1 on 30 images; of the last it says class 1, a little, or class 2."""

    def moved(lies: bool, said: int) -> float:
        truth = np.tile(np.array([1.0, 0.0, 0.0], "f4"), (60, 1))
        told = truth.copy()
        told[:30, 1] += 9.0 * lies
        given = dict.fromkeys((0, 1, 3, 4), truth)
        told[-1, said] += 2.0
        found = contrasts(robust_contrasts(equals({**given, 2: told})))
        return float(found[-1, said] - (truth[-1, said] - truth[-1, 0]))

    assert moved(True, 1) < 0.7 * moved(False, 1)
    assert moved(True, 2) > 1.2 * moved(True, 1)


@settings(max_examples=60, deadline=None)
@drawn(
    seed=st.integers(0, 2**32 - 1),
    liar=arrays(np.float32, (6, 3), elements=st.floats(-1e6, 1e6, width=32)),
)
def test_one_of_five_cannot_move_robust_contrasts_far(seed: int, liar: np.ndarray) -> None:
    """Whatever it answers, about what the other four know too."""
    given = five_that_know_all(seed, liar)
    honest = {m: value for m, value in given.logits.items() if m != 2}
    moved = contrasts(robust_contrasts(given)) - contrasts(robust_contrasts(equals(honest)))
    assert np.abs(moved).max() < 0.5


def test_one_of_five_decides_known_contrasts() -> None:
    """What the test above would say of the ensemble without bounds."""
    liar = np.tile(np.array([50.0, -50.0, 0.0], "f4"), (6, 1))
    moved = contrasts(known_contrasts(five_that_know_all(0, liar)))
    assert moved[:, 1].max() < -10


def test_two_of_ten_cannot_move_robust_contrasts_far() -> None:
    """Two that answer the same, on some images only."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 5))
    logits = {m: (truth + 0.2 * rng.normal(size=truth.shape)).astype("f4") for m in range(10)}
    wanted = contrasts(robust_contrasts(equals(logits)))
    for liar in (3, 8):
        logits[liar][:4] = np.array([50.0, -50.0, 0, 0, 0], "f4")
    moved = np.abs(contrasts(robust_contrasts(equals(logits))) - wanted)
    assert moved.max() < 0.5
    assert moved[4:].max() < 0.1


def test_who_alone_knows_a_class_decides_about_it_alone() -> None:
    """Clients 1 and 2 know classes 0 and 1; client 0 says that it knows 2 too, and lies of it."""
    truth = np.tile(np.array([[1.0, 0.0, -1.0]], "f4"), (4, 1))
    lie = truth + np.array([[0.0, 0.0, 90.0]], "f4")
    both, all_three = np.array([0.5, 0.5, 0.0]), np.full(3, 1 / 3)
    given = Answers(
        {0: lie, 1: truth, 2: truth},
        dict.fromkeys(range(3), 1 / 3),
        {0: all_three, 1: both, 2: both},
    )
    found = contrasts(robust_contrasts(given))
    assert abs(found[0, 1] - (-1.0)) < 0.2
    assert found[0, 2] > 0


def test_size_of_an_answer_and_claims_buy_nothing_of_robust_contrasts() -> None:
    """Logits of ±50 and of ±10⁶ are one; so are claims of the median and of 10⁹ examples."""
    fifty = np.tile(np.array([-50.0, 50.0, 0.0], "f4"), (6, 1))
    given = five_that_know_all(1, fifty)
    wanted = robust_contrasts(given)
    logits = {**given.logits, 2: fifty * np.float32(20_000)}
    weights = ensemble_weights({0: 9, 1: 9, 2: 10**9, 3: 9, 4: 9})
    np.testing.assert_allclose(robust_contrasts(replace(given, logits=logits)), wanted, atol=1e-6)
    np.testing.assert_allclose(robust_contrasts(replace(given, weights=weights)), wanted, atol=1e-6)


def test_half_of_an_even_number_of_clients_buy_nothing_by_claims() -> None:
    given = equals({m: random_logits(m, 3.0) for m in range(4)})
    claims = ensemble_weights({0: 9, 1: 9, 2: 10**9, 3: 10**9})
    found = robust_contrasts(replace(given, weights=claims))
    np.testing.assert_allclose(found, robust_contrasts(given), atol=1e-6)


def test_the_table_is_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = equals({m: random_logits(m, 3.0) for m in range(5)})
    wanted = robust_contrasts(given)
    monkeypatch.setattr("fedzge_flwr.server.contrasts._CHUNK", 1)
    np.testing.assert_allclose(robust_contrasts(given), wanted, rtol=1e-6)


def test_clients_that_know_different_classes_are_heard_on_their_own() -> None:
    """Two clients of two classes each, each overconfident on what it never saw."""
    labels = np.array([0, 1, 2, 3])
    first = np.array([[8, 0, 0, 0], [0, 8, 0, 0], [6, 0, 0, 0], [0, 6, 0, 0]], "f4")
    second = np.array([[0, 0, 9, 0], [0, 0, 0, 9], [0, 0, 8, 0], [0, 0, 0, 8]], "f4")
    second[:2] += np.array([[5, 0, 0, 0], [0, 5, 0, 0]], "f4")
    logits = {0: first, 1: second}
    tendencies: dict[int, np.ndarray] = {}
    update_tendencies(tendencies, logits)
    given = Answers(logits, {0: 0.4, 1: 0.6}, tendencies)
    assert (mean_probability(given).argmax(axis=1) != labels).any()
    weighted = class_tendency(given)
    assert (weighted[:, :2].max(axis=1) > weighted[:, 2:].max(axis=1)).sum() >= 1


def test_tendencies_are_running_means_of_probabilities() -> None:
    tendencies: dict[int, np.ndarray] = {}
    update_tendencies(tendencies, {1: random_logits(5)})
    first = softmax(random_logits(5)).mean(axis=0)
    np.testing.assert_allclose(tendencies[1], first)
    update_tendencies(tendencies, {1: random_logits(6), 3: random_logits(7)})
    second = softmax(random_logits(6)).mean(axis=0)
    np.testing.assert_allclose(tendencies[1], 0.5 * first + 0.5 * second)
    assert set(tendencies) == {1, 3}
    assert tendencies[3].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(ENSEMBLES))
def test_every_combination_keeps_an_ensemble_of_one(name: str) -> None:
    logits = random_logits(1, 3.0)
    combined = ENSEMBLES[name](Answers({5: logits}, {5: 1.0}, {5: np.array([0.6, 0.3, 0.1])}))
    assert combined.dtype == np.float32
    np.testing.assert_allclose(softmax(combined), softmax(logits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(ENSEMBLES))
def test_every_combination_is_finite_for_extreme_answers(name: str) -> None:
    logits = {0: np.array([[500.0, -500, 0]], "f4"), 1: np.array([[-500.0, 500, 0]], "f4")}
    tendencies = {0: np.array([1.0, 0, 0]), 1: np.array([0.0, 1, 0])}
    combined = ENSEMBLES[name](Answers(logits, {0: 0.5, 1: 0.5}, tendencies))
    assert np.isfinite(combined).all()


@pytest.mark.parametrize("name", sorted(ENSEMBLES))
def test_sums_do_not_depend_on_who_came_first(name: str) -> None:
    logits = {n: random_logits(n, 10.0) for n in range(5)}
    weights = dict(enumerate((0.1, 0.3, 1e-9, 0.4, 0.2)))
    tendencies: dict[int, np.ndarray] = {}
    update_tendencies(tendencies, logits)
    results = set()
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 4, 1, 0, 2)):
        given = Answers(
            {n: logits[n] for n in order},
            {n: weights[n] for n in order},
            {n: tendencies[n] for n in order},
        )
        results.add(ENSEMBLES[name](given).tobytes())
    assert len(results) == 1


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, none below log 1e-8."""
    shifted = logits.astype("f8") - logits.astype("f8").max(axis=-1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return np.asarray(np.maximum(logs, np.log(1e-8)))


def equals(logits: dict[int, np.ndarray], temperature: float = 1.0) -> Answers:
    """Answers of clients whose tendencies and numbers of examples tell nothing."""
    share = 1 / len(logits)
    num_classes = next(iter(logits.values())).shape[1]
    tendency = np.full(num_classes, 1 / num_classes)
    return Answers(
        logits, dict.fromkeys(logits, share), dict.fromkeys(logits, tendency), temperature
    )


TRIMMED = {1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 2, 7: 2, 10: 2, 11: 3, 20: 4}
"""How many of so many clients are left out on each side: a fifth, rounded up, if any remain."""


@pytest.mark.parametrize(("num_clients", "trimmed"), TRIMMED.items())
def test_robust_combinations_by_number_of_clients(num_clients: int, trimmed: int) -> None:
    logits = {m: random_logits(m, 3.0) for m in range(num_clients)}
    ordered = np.sort([softmax(logits[m] / 2) for m in logits], axis=0)
    given = equals(logits, temperature=2.0)
    wanted = ordered[trimmed : num_clients - trimmed].mean(axis=0)
    np.testing.assert_allclose(np.exp(trimmed_mean(given)), wanted, rtol=1e-5)
    np.testing.assert_allclose(np.exp(median(given)), np.median(ordered, axis=0), rtol=1e-5)
    assert trimmed_mean(given).dtype == median(given).dtype == np.float32


def test_trimmed_mean_of_three_and_four_is_their_median() -> None:
    for num_clients in (3, 4):
        given = equals({m: random_logits(m, 3.0) for m in range(num_clients)})
        assert np.array_equal(trimmed_mean(given), median(given))


@pytest.mark.parametrize("combine", [median, trimmed_mean])
def test_claimed_examples_and_common_shifts_buy_nothing(combine: Combination) -> None:
    given = equals({m: random_logits(m, 3.0) for m in range(5)})
    claims = ensemble_weights({0: 10**9, 1: 9, 2: 9, 3: 9, 4: 9})
    assert np.array_equal(combine(replace(given, weights=claims)), combine(given))
    shifted = {m: logits + np.float32(1000 * m) for m, logits in given.logits.items()}
    np.testing.assert_allclose(
        combine(replace(given, logits=shifted)), combine(given), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("combine", [median, trimmed_mean, robust_contrasts])
def test_who_has_no_examples_is_not_heard_by_robust_combinations(combine: Combination) -> None:
    logits = {m: random_logits(m, 3.0) for m in range(4)}
    some = {m: value for m, value in logits.items() if m != 1}
    weights = ensemble_weights({0: 7, 1: 0, 2: 7, 3: 7})
    assert np.array_equal(combine(replace(equals(logits), weights=weights)), combine(equals(some)))
    nobody = ensemble_weights(dict.fromkeys(logits, 0))
    assert np.array_equal(combine(replace(equals(logits), weights=nobody)), combine(equals(logits)))


ANY_LOGITS = arrays(
    np.float32, (4, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


@pytest.mark.parametrize("combine", [median, trimmed_mean])
@settings(max_examples=40, deadline=None)
@drawn(
    num_honest=st.integers(2, 9),
    place=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
    garbage=ANY_LOGITS,
    temperature=st.floats(0.1, 10),
)
def test_one_client_cannot_move_the_ensemble_out_of_the_others_range(
    combine: Combination,
    num_honest: int,
    place: int,
    seed: int,
    garbage: np.ndarray,
    temperature: float,
) -> None:
    """Whatever it answers, class by class; and nothing overflows, since warnings are errors."""
    culprit = place % (num_honest + 1)
    logits = {
        m: garbage if m == culprit else random_logits(seed + m, 5.0) for m in range(num_honest + 1)
    }
    found = combine(equals(logits, temperature))
    honest = [
        log_softmax(value.astype("f8") / temperature) for m, value in logits.items() if m != culprit
    ]
    assert np.isfinite(found).all()
    assert (found >= np.min(honest, axis=0) - 1e-5).all()
    assert (found <= np.max(honest, axis=0) + 1e-5).all()


@pytest.mark.parametrize(("num_clients", "liars"), [(10, 2), (6, 2), (11, 3)])
def test_as_many_liars_as_are_trimmed_are_borne(num_clients: int, liars: int) -> None:
    logits = {m: random_logits(m, 3.0) for m in range(num_clients)}
    honest = np.stack([log_softmax(logits[m]) for m in range(liars, num_clients)])
    for m in range(liars):
        logits[m] = np.tile(np.array([3e38, -3e38, 0], "f4"), (4, 1))
    for combine in (median, trimmed_mean):
        found = combine(equals(logits))
        assert (found >= honest.min(axis=0) - 1e-5).all()
        assert (found <= honest.max(axis=0) + 1e-5).all()


def test_tendencies_of_huge_answers_are_finite() -> None:
    tendencies: dict[int, np.ndarray] = {}
    update_tendencies(tendencies, {0: np.array([[3e38, -3e38, 3e38], [0, 0, -3e38]], "f4")})
    np.testing.assert_allclose(tendencies[0], [0.5, 0.25, 0.25])
