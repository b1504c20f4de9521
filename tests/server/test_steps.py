from __future__ import annotations

import pytest

from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.server.steps import central_steps
from fedzge_flwr.synthesis.memory import most_kept


def steps(num_rounds: int, images: int, size: int, mean: int) -> tuple[int, ...]:
    settings = from_run_config(
        {
            "synthetic-batch-size": images,
            "memory-size": size,
            "central-distill-steps": mean,
        }
    )
    return central_steps(settings, num_rounds)


def test_a_round_takes_steps_as_its_memory_has_answers() -> None:
    assert steps(4, 20, 1000, 5) == (2, 4, 6, 8)
    # A full memory grows no more: 20, 40, 50 and 50 answers.
    assert steps(4, 20, 50, 40) == (20, 40, 50, 50)


@pytest.mark.parametrize("size", [0, 2, 20])
def test_rounds_of_their_own_answers_alone_are_alike(size: int) -> None:
    assert steps(5, 20, size, 7) == (7,) * 5


@pytest.mark.parametrize("num_rounds", [1, 2, 12, 100])
@pytest.mark.parametrize("mean", [3, 300])
def test_the_mean_is_what_the_key_says(num_rounds: int, mean: int) -> None:
    found = steps(num_rounds, 2200, 10**6, mean)
    assert len(found) == num_rounds
    # No round goes without a step, of however many.
    assert abs(sum(found) - mean * num_rounds) <= num_rounds / (2 * mean)
    shares = [2 * mean * round_ / (num_rounds + 1) for round_ in range(1, num_rounds + 1)]
    assert all(abs(f - max(share, 1)) <= 1 for f, share in zip(found, shares, strict=True))


def test_large_images_fill_a_memory_sooner() -> None:
    """26,573 of 3 × 224 × 224 bytes are 4 GB."""
    assert most_kept(100_000, (3, 224, 224)) == 26_573
    assert most_kept(100_000, (3, 32, 32)) == 100_000
    assert most_kept(0, (3, 224, 224)) == 0
