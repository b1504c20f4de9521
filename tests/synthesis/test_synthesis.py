"""Procedural images, memory and search: shapes, ranges, seeds, and that the search finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.learning.distillation import class_weights
from fedzge_flwr.synthesis.memory import Memory
from fedzge_flwr.synthesis.procedural import procedural_images
from fedzge_flwr.synthesis.screening import class_demand, screen
from fedzge_flwr.synthesis.search import breed, jitter


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_bytes(x: Tensor) -> Tensor:
    return PIXEL_RANGE.to_uint8(x)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 10, 14)])
def test_procedural_images_are_diverse_and_in_range(shape: tuple[int, int, int]) -> None:
    x = procedural_images(60, shape, stream())
    assert x.shape == (60, *shape)
    assert x.dtype == torch.float32
    assert float(x.min()) >= PIXEL_RANGE.low
    assert float(x.max()) <= PIXEL_RANGE.high
    # Dark, bright and in between; flat ones are few, and hardly two are the same.
    means = x.mean(dim=(1, 2, 3))
    assert float(means.std()) > 0.2
    assert int((x.flatten(1).std(dim=1) < 0.05).sum()) < 10
    assert len({image.numpy().tobytes() for image in x}) > 50


def test_procedural_images_are_a_function_of_the_stream() -> None:
    first, again, other = (procedural_images(20, (1, 12, 12), stream(n)) for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert procedural_images(0, (1, 12, 12), stream()).shape == (0, 1, 12, 12)


def test_memory_keeps_the_newest() -> None:
    memory = Memory(5)
    assert len(memory) == 0
    with pytest.raises(ValueError, match="empty"):
        _ = memory.asked
    for first in (0, 3, 6):
        images = torch.arange(first, first + 3, dtype=torch.uint8).reshape(3, 1, 1, 1)
        memory.add(images, images.flatten(1).float() * 10)
    assert memory.asked.flatten().tolist() == [4, 5, 6, 7, 8]
    assert memory.logits_MK.flatten().tolist() == [40, 50, 60, 70, 80]
    # What was forgotten is freed.
    assert memory.asked.untyped_storage().nbytes() == 5


def test_demand_is_inverse_to_what_was_answered() -> None:
    common, rare = [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]
    demand = class_demand(torch.tensor([common] * 8 + [rare] * 2))
    assert float(demand.sum()) == pytest.approx(1.0)
    # Shares of about 0.8, 0.2 and 0, each a hundredth more.
    assert float(demand[1] / demand[0]) == pytest.approx(0.81 / 0.21, rel=0.02)
    assert int(demand.argmax()) == 2


def test_class_weights_even_out_what_a_model_answers() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0]] * 8 + [[0.0, 9.0, 0.0]] * 2)
    assert class_weights(logits, 0.0).tolist() == [1.0] * 10
    weights = class_weights(logits, 1.0)
    assert float(weights[9] / weights[0]) == pytest.approx(0.81 / 0.21)


def test_screening_evens_out_classes_and_chooses_nothing_twice() -> None:
    logits = torch.zeros(300, 3)
    logits[:240, 0] = logits[240:, 1] = 5.0
    chosen = screen(logits, 100, stream())
    assert len(set(chosen.tolist())) == len(chosen) == 100
    # A fifth of the candidates, and as good as half of those chosen.
    assert 35 <= int((chosen >= 240).sum()) <= 55
    assert torch.equal(chosen, screen(logits, 100, stream()))
    assert not torch.equal(chosen, screen(logits, 100, stream(1)))


def filled_memory() -> Memory:
    memory = Memory(1000)
    x = procedural_images(200, (1, 8, 8), stream(3))
    memory.add(as_bytes(x), brightness_logits(x))
    return memory


def brightness_logits(x: Tensor) -> Tensor:
    """Class 2, bright, is rare among blind images; 0 is dark, 1 the rest."""
    mean = x.mean(dim=(1, 2, 3))
    return 12 * torch.stack((-mean - 0.3, torch.zeros_like(mean), mean - 0.6), dim=1)


def test_search_finds_what_blind_images_hardly_show() -> None:
    memory = filled_memory()
    blind = brightness_logits(procedural_images(400, (1, 8, 8), stream(4)))
    bred = brightness_logits(breed(memory, 400, stream(4)))
    share_blind, share_bred = (
        float((logits.argmax(dim=1) == 2).double().mean()) for logits in (blind, bred)
    )
    assert share_blind < 0.25
    assert share_bred > 1.5 * share_blind


def test_bred_images_are_new_in_range_and_a_function_of_the_stream() -> None:
    memory = filled_memory()
    first, again, other = (breed(memory, 50, stream(n)) for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (50, 1, 8, 8)
    assert float(first.min()) >= PIXEL_RANGE.low
    assert float(first.max()) <= PIXEL_RANGE.high
    known = {image.numpy().tobytes() for image in memory.asked}
    # But for plain ones, which moving and mirroring does not change.
    assert len(known & {image.numpy().tobytes() for image in as_bytes(first)}) < 5


def test_breeding_needs_one_image_only_and_serves_colour() -> None:
    memory = Memory(10)
    memory.add(torch.full((1, 3, 8, 8), 7, dtype=torch.uint8), torch.zeros(1, 5))
    assert breed(memory, 6, stream()).shape == (6, 3, 8, 8)


def test_jitter_moves_images_and_keeps_plain_ones() -> None:
    x = procedural_images(30, (1, 16, 16), stream())
    assert not torch.equal(jitter(x, stream()), x)
    plain = torch.full((4, 2, 9, 9), 0.25)
    torch.testing.assert_close(jitter(plain, stream()), plain)
