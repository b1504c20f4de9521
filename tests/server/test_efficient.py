"""The efficient round's phases, over clients that are plain functions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.config.sections import ImageSettings
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning import distillation
from fedzge_flwr.query.question import Question
from fedzge_flwr.server.build import build_central, build_generator, build_server
from fedzge_flwr.server.clients import ClientAccuracy, ClientAnswer
from fedzge_flwr.server.efficient import EFFICIENT, train_generator
from fedzge_flwr.server.phases import run_round
from fedzge_flwr.server.round import RoundState, SyntheticBatch
from fedzge_flwr.server.state import ServerState
from fedzge_flwr.synthesis import composition, sources
from fedzge_flwr.synthesis.composition import image_counts
from fedzge_flwr.synthesis.patterns import render
from fedzge_flwr.synthesis.procedural import procedural_images
from tests.helpers.federation import FunctionClients, flat, linear_logits, no_report

CONFIG = {
    "num-clients": 2,
    "synthetic-batch-size": 20,
    "latent-dim": 6,
    "generator-width": 4,
    "generator-share": 0.25,
    "image-sources": "bred:0.5,procedural:0.25",
    "estimator": "guided",
    "q": 2,
    "distill-batch-size": 8,
    "central-distill-steps": 3,
    "generator-steps": 2,
    "client-distill-rounds": 0,
    "ensemble": "mean",
}


def make_server(num_rounds: int = 4, **more: Any) -> ServerState:
    settings = from_run_config({**CONFIG, **more})
    return build_server(
        settings,
        build_central(settings),
        build_generator(settings),
        num_rounds=num_rounds,
        device=torch.device("cpu"),
        num_test_images=5,
    )


def run(
    server: ServerState, rounds: int, clients: FunctionClients | None = None
) -> list[RoundState]:
    clients = clients or FunctionClients()
    return [
        run_round(EFFICIENT, server, clients, number, no_report) for number in range(1, rounds + 1)
    ]


def batch_of(state: RoundState) -> SyntheticBatch | None:
    assert state.asked is not None
    return state.asked.generated and state.asked.generated.batch


def test_a_round_asks_base_and_perturbed_images_in_one_query() -> None:
    server, clients = make_server(), FunctionClients()
    (first,) = run(server, 1, clients)
    assert clients.calls == ["ask", "distill", "deliver", "evaluate"]
    (asked,) = clients.queries
    # 5 generated images, 3 copies each, and 15 others.
    assert asked.shape == (3 * 5 + 15, 1, 8, 8)
    assert server.num_queries == {0: 30, 1: 30}
    assert list(first.seconds) == [
        "sample_clients",
        "compose_images",
        "ask_clients",
        "combine_answers",
        "update_generator",
        "remember",
        "distill_central",
        "train_generator",
        "distill_clients",
        "deliver_targets",
        "evaluate_clients",
    ]
    ((images, targets, temperature),) = clients.distilled
    assert (images == np.concatenate((asked[:5], asked[15:]))).all()
    np.testing.assert_allclose(targets, 1.25 * linear_logits(images), rtol=1e-5, atol=1e-6)
    assert temperature == server.settings.distillation.temperature


def test_unperturbed_images_are_bytes_on_both_sides_and_in_the_memory() -> None:
    server, clients = make_server(), FunctionClients()
    run(server, 1, clients)
    images = torch.from_numpy(clients.distilled[0][0])
    levels = PIXEL_RANGE.to_uint8(images)
    assert torch.equal(PIXEL_RANGE.from_uint8(levels), images)
    assert server.memories is not None
    assert torch.equal(server.memories.images.asked, levels)
    torch.testing.assert_close(
        server.memories.images.logits_MK, torch.from_numpy(clients.distilled[0][1])
    )


ALL_SOURCES = {
    "generator-share": 0.2,
    "image-sources": "bred:0.2, evolved:0.2, procedural:0.2, patterns:0.2",
}


def test_codes_are_kept_with_the_answers_on_their_own_images() -> None:
    server, num_codes = make_server(**ALL_SOURCES), 0
    for number in range(1, 4):
        state = run_round(EFFICIENT, server, FunctionClients(), number, no_report)
        assert server.memories is not None
        assert state.asked is not None
        images, codes = server.memories
        num = len(state.asked.codes_ED)
        num_codes += num
        assert 4 < num < 16
        assert (len(images), len(codes)) == (20 * number, num_codes)
        # After 4 generated images those of patterns, whatever the order of the sources.
        drawn = PIXEL_RANGE.to_uint8(render(codes.asked[-num:], (1, 8, 8)))
        newest = slice(20 * number - 16, 20 * number - 16 + num)
        assert torch.equal(images.asked[newest], drawn)
        assert torch.equal(images.logits_MK[newest], codes.logits_MK[-num:])


@pytest.mark.parametrize("memory", [12000, 0])
def test_a_run_goes_on_from_its_snapshot_with_all_sources(memory: int) -> None:
    whole = make_server(**ALL_SOURCES, **{"memory-size": memory})
    run(whole, 2)
    resumed = make_server(**ALL_SOURCES, **{"memory-size": memory})
    resumed.restore(copy.deepcopy(whole.snapshot()))
    assert set(resumed.surprises) == {"bred", "evolved", "procedural", "patterns"}
    assert resumed.surprises == whole.surprises
    asked = []
    for server in (whole, resumed):
        state = run_round(EFFICIENT, server, FunctionClients(), 3, no_report)
        assert state.asked is not None
        asked.append(state.asked.question.base)
    assert np.array_equal(*asked)
    assert torch.equal(flat(whole.central), flat(resumed.central))


def test_by_default_every_query_is_a_label() -> None:
    """No image is asked about that the central model does not learn from."""
    own = ("generator-share", "image-sources", "surprise-power", "estimator", "q")
    defaults = from_run_config({}).to_run_config()
    server, clients = make_server(**{key: defaults[key] for key in own}), FunctionClients()
    run(server, 3, clients)
    assert server.memories is not None
    asked = np.concatenate([PIXEL_RANGE.to_uint8(torch.from_numpy(x)) for x in clients.queries])
    assert np.array_equal(asked, server.memories.images.asked)
    assert set(server.num_queries.values()) == {len(asked)} == {60}
    assert set(server.surprises) == {"evolved", "patterns", "bred", "procedural"}


@pytest.mark.parametrize("power", [0.0, 3.0])
def test_sources_that_surprised_make_more_of_the_next_round(power: float) -> None:
    """Judged from the second round on, by what the central model expected before it learned."""
    server = make_server(**{"surprise-power": power})
    states = run(server, 1)
    assert server.surprises == {}
    first = states[0].asked
    assert first is not None
    assert dict(first.counts) == {"bred": 10, "procedural": 5}
    server.surprises = {"bred": 0.001, "procedural": 0.1}
    state = run_round(EFFICIENT, server, FunctionClients(), 2, no_report)
    assert state.asked is not None
    found = dict(state.asked.counts)
    if not power:
        # Nor is the central model asked what it expected.
        assert found == dict(first.counts)
        assert server.surprises == {"bred": 0.001, "procedural": 0.1}
    else:
        assert sum(found.values()) == 15
        assert found["procedural"] > 10 > 5 > found["bred"] > 0
        assert server.surprises["bred"] != 0.001


def test_memory_grows_to_its_bound_over_rounds() -> None:
    server = make_server(**{"memory-size": 50})
    sizes = []
    for number in range(1, 5):
        run_round(EFFICIENT, server, FunctionClients(), number, no_report)
        assert server.memories is not None
        sizes.append(len(server.memories.images))
    assert sizes == [20, 40, 50, 50]


def test_optimisers_and_schedules_live_through_the_run() -> None:
    server = make_server(num_rounds=2)
    run(server, 2)
    central = next(iter(server.central_optimizer.state.values()))
    generator = next(iter(server.generator_optimizer.state.values()))
    assert int(central["step"]) == 2 * 3
    assert int(generator["step"]) == 2 * (1 + 2)
    for optimizer in (server.central_optimizer, server.generator_optimizer):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_a_step_schedule_counts_rounds() -> None:
    server = make_server(**{"lr-schedule": "step", "lr-step-size": 2, "central-lr": 0.01})
    rates = []
    for number in range(1, 5):
        rates.append(server.central_optimizer.param_groups[0]["lr"])
        run_round(EFFICIENT, server, FunctionClients(), number, no_report)
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


SHARES: list[tuple[float, dict[str, float]]] = [
    (1.0, {"a": 1.0}),
    (1.0, {}),
    (1.0, {"a": 1.0, "b": 1.0}),
    (0.01, {"a": 1.0}),
    (1.0, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}),
    (0.0, {"a": 1.0, "b": 1.0}),
    (0.0, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}),
    (0.0, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}),
    (0.0, {"a": 3.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}),
]


def image_settings(generated: float, shares: dict[str, float], num_images: int) -> ImageSettings:
    sources = ",".join(f"{name}:{share}" for name, share in shares.items())
    config = {
        "generator-share": generated,
        "image-sources": sources,
        "synthetic-batch-size": num_images,
    }
    return from_run_config(config).images


@pytest.mark.parametrize(("generated", "shares"), SHARES)
def test_rounding_makes_neither_more_nor_fewer(generated: float, shares: dict[str, float]) -> None:
    """Halves round to even: two shares of an odd number may both be rounded up."""
    for num_images in range(2, 40):
        counts = image_counts(image_settings(generated, shares, num_images))
        assert counts.generated + sum(counts.others.values()) == num_images
        assert min(counts.others.values(), default=0) >= 0
        assert counts.generated != 1
        assert generated or not counts.generated
        assert list(counts.others) == list(shares)
        # Each has its due, rounded up or down.
        left, total = num_images - counts.generated, sum(shares.values())
        for name, share in shares.items():
            assert abs(counts.others[name] - left * share / total) < 1


@pytest.mark.parametrize(
    ("generated", "shares", "wanted"),
    [
        (0.25, {"a": 0.5, "b": 0.25}, (5, {"a": 10, "b": 5})),
        (0.0, {"a": 0.5, "b": 0.5}, (0, {"a": 10, "b": 10})),
        (0.0, {"a": 1.0}, (0, {"a": 20})),
        (1.0, {}, (20, {})),
        (2.0, {"a": 2.0}, (10, {"a": 10})),
        (0.2, {"a": 0.6, "none": 0.0, "b": 0.2}, (4, {"a": 12, "b": 4})),
        # Batch norm cannot make a single image.
        (0.05, {"a": 0.5, "b": 0.45}, (0, {"a": 11, "b": 9})),
    ],
)
def test_each_source_makes_its_share(
    generated: float, shares: dict[str, float], wanted: tuple[int, dict[str, int]]
) -> None:
    assert image_counts(image_settings(generated, shares, 20)) == wanted


PARTS: dict[str, dict[str, object]] = {
    "memory": {"memory-size": 0},
    "generator": {"generator-share": 0.0},
    "search": {"image-sources": "procedural:1"},
    "screening": {"candidates": 1},
    "class balance": {"class-balance": 0.0},
    "other sources": {"image-sources": ""},
    "zeroth-order": {"estimator": "surrogate"},
    "free steps": {"generator-steps": 0},
    "client distillation": {"client-distill-steps": 0},
    "minibatches": {"distill-batch-size": 0},
}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What the round's parts return, or of the central model's steps the images, by name."""
    calls: dict[str, list[Any]] = {}

    def watch(module: Any, name: str, *, keep_given: bool = False) -> None:
        real = getattr(module, name)

        def seen(*given: Any) -> Any:
            found = real(*given)
            calls[name].append(given[1] if keep_given else found)
            return found

        calls[name] = []
        monkeypatch.setattr(module, name, seen)

    watch(sources, "breed")
    watch(sources, "procedural_images")
    watch(composition, "screen")
    watch(distillation, "class_weights")
    watch(distillation, "distillation_step", keep_given=True)
    return calls


def test_all_parts_are_on_by_default(used: dict[str, list[Any]]) -> None:
    """Else that one is off when it is switched off shows nothing."""
    server, clients = make_server(), FunctionClients()
    rounds = run(server, 2, clients)
    assert all(used.values())
    assert server.memories is not None
    assert all(batch_of(state) is not None for state in rounds)
    assert "distill" in clients.calls
    assert len(set(used["class_weights"][-1].tolist())) > 1
    size = server.settings.distillation.distill_batch_size
    assert {len(images) for images in used["distillation_step"]} == {size}
    assert max(clients.queries, key=len).shape[0] > 20


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_switched_off_by_one_key(part: str, used: dict[str, list[Any]]) -> None:
    server, clients = make_server(**PARTS[part]), FunctionClients()
    before = flat(server.central)
    rounds = run(server, 2, clients)
    assert not torch.equal(flat(server.central), before)
    asked = [len(images) for images in clients.queries]
    if part == "memory":
        assert server.memories is None
    elif part == "generator":
        assert all(batch_of(state) is None for state in rounds)
        assert asked == [20, 20]
    elif part == "other sources":
        assert used["procedural_images"] == used["breed"] == []
        assert asked == [20 * (1 + 2)] * 2
    elif part == "search":
        assert used["breed"] == []
    elif part == "screening":
        assert used["screen"] == []
    elif part == "class balance":
        assert all((weights == 1).all() for weights in used["class_weights"])
    elif part == "minibatches":
        # Every image of the memory once, as it lies there.
        assert server.memories is not None
        wanted = PIXEL_RANGE.from_uint8(server.memories.images.asked)
        assert torch.equal(used["distillation_step"][-1], wanted)
    elif part == "zeroth-order":
        assert asked == [20, 20]
    elif part == "client distillation":
        assert "distill" not in clients.calls
    elif part == "free steps":
        state = next(iter(server.generator_optimizer.state.values()))
        assert int(state["step"]) == 2


@pytest.mark.parametrize(
    ("wanted", "fraction", "rounds"),
    [
        (0, 1.0, [1, 2, 3, 4]),
        (0, 0.5, [1, 2, 3, 4]),
        (1, 1.0, [4]),
        (2, 1.0, [3, 4]),
        (1, 0.5, [3, 4]),
        (3, 0.5, [1, 2, 3, 4]),
        (9, 1.0, [1, 2, 3, 4]),
    ],
)
def test_clients_distill_at_the_end(wanted: int, fraction: float, rounds: list[int]) -> None:
    """As many rounds each, on average, if only some take part in a round."""
    more = {"client-distill-rounds": wanted, "fraction-train": fraction}
    server, clients = make_server(**more), FunctionClients()
    distilling = []
    for number in range(1, 5):
        before = clients.calls.count("distill")
        current = run_round(EFFICIENT, server, clients, number, no_report)
        if clients.calls.count("distill") > before:
            distilling.append(number)
        # What nobody distills is not combined.
        assert current.answered is not None
        assert (current.answered.peer_logits_NK is not None) == (number in rounds)
    assert distilling == rounds
    assert clients.foretold == [number in rounds for number in range(1, 5)]


def test_answers_are_softened_before_they_are_combined() -> None:
    """Both where answers are learned from and where the ensemble is scored."""

    class Opinionated(FunctionClients):
        def evaluate(self, *given: Any) -> dict[int, ClientAccuracy]:
            logits_MK = np.arange(50, dtype=np.float32).reshape(5, 10)
            return {number: ClientAccuracy(5, 0.5, logits_MK) for number in (0, 1)}

    outcomes = {}
    for temperature in (1.0, 4.0):
        more = {"ensemble": "mean-probability", "answer-temperature": temperature}
        state = run(make_server(1, **more), 1, Opinionated())[0]
        assert state.answered is not None
        assert state.evaluated.ensemble_logits_MK is not None
        outcomes[temperature] = (state.answered.logits_NK, state.evaluated.ensemble_logits_MK)
    for sharp, soft in zip(outcomes[1.0], outcomes[4.0], strict=True):
        assert np.ptp(soft, axis=1).mean() < np.ptp(sharp, axis=1).mean()


def test_clients_distill_the_answers_as_they_are_and_the_server_softened_ones() -> None:
    learned = {}
    for temperature in (1.0, 4.0):
        more = {"ensemble": "mean-probability", "answer-temperature": temperature}
        server, clients = make_server(1, **more), FunctionClients()
        run(server, 1, clients)
        assert server.memories is not None
        learned[temperature] = (server.memories.images.logits_MK.numpy(), clients.distilled[0][1])
    for sharp in (learned[1.0][0], learned[4.0][1]):
        np.testing.assert_array_equal(sharp, learned[1.0][1])
    assert np.ptp(learned[4.0][0], axis=1).mean() < np.ptp(learned[1.0][0], axis=1).mean()


def test_the_central_model_screens_candidates_from_the_second_round_on() -> None:
    """Then the images asked about are more even in its classes than unscreened ones."""
    asked: dict[int, list[Any]] = {}
    for candidates in (1, 8):
        clients = FunctionClients()
        server = make_server(
            2,
            **{
                "candidates": candidates,
                "synthetic-batch-size": 200,
                "generator-share": 0.0,
                # Until the central model has classes of its own, screening has little to go by.
                "central-distill-steps": 60,
            },
        )
        run_round(EFFICIENT, server, clients, 1, no_report)
        central = copy.deepcopy(server.central)
        run_round(EFFICIENT, server, clients, 2, no_report)
        asked[candidates] = clients.queries
        with torch.no_grad():
            classes = central(torch.from_numpy(clients.queries[1])).argmax(dim=1)
        asked[candidates].append(int(torch.bincount(classes, minlength=10).max()))
    assert np.array_equal(asked[1][0], asked[8][0])
    assert asked[8][2] < 0.8 * asked[1][2]


def test_class_balance_changes_what_the_central_model_is_shown() -> None:
    centrals = []
    for balance in (0.0, 0.0, 1.0):
        server = make_server(**{"class-balance": balance})
        run(server, 1)
        centrals.append(flat(server.central))
    assert torch.equal(centrals[0], centrals[1])
    assert not torch.equal(centrals[0], centrals[2])


def test_central_model_learns_the_ensemble() -> None:
    more = {"synthetic-batch-size": 120, "central-distill-steps": 40, "distill-batch-size": 32}
    server = make_server(num_rounds=6, **{**more, "generator-steps": 1, "temperature": 1.0})
    unseen = procedural_images(200, (1, 8, 8), torch.Generator().manual_seed(99))
    run(server, 6)
    with torch.no_grad():
        answers = server.central(unseen).argmax(dim=1).numpy()
    wanted = linear_logits(unseen.numpy()).argmax(axis=1)
    assert float((answers == wanted).mean()) > 0.6


def test_free_steps_move_the_generator_but_not_the_central_model() -> None:
    server = make_server()
    generator, central = flat(server.generator), flat(server.central)
    statistics = {name: value.clone() for name, value in server.central.state_dict().items()}
    train_generator(server, 1)
    assert not torch.equal(flat(server.generator), generator)
    assert torch.equal(flat(server.central), central)
    for name, value in server.central.state_dict().items():
        assert torch.equal(value, statistics[name]), name
    assert all(parameter.grad is None for parameter in server.central.parameters())


def test_same_seed_same_round_whatever_happened_to_global_randomness() -> None:
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        server = make_server(seed=seed)
        run(server, 2)
        states.append(flat(server.central))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_answers_of_who_left_the_round_are_in_no_target() -> None:
    class OneSilent(FunctionClients):
        def ask(
            self, round_: int, partitions: Any, question: Question, *, to_distill: bool
        ) -> dict[int, ClientAnswer]:
            return {1: super().ask(round_, partitions, question, to_distill=to_distill)[1]}

    clients = OneSilent()
    run(make_server(), 1, clients)
    ((images, targets, _),) = clients.distilled
    np.testing.assert_allclose(targets, 2 * linear_logits(images), rtol=1e-5, atol=1e-6)
