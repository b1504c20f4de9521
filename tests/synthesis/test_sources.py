"""What every source of images keeps to, and what those that learn from answers learn."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedzge_flwr.common.errors import ConfigError
from fedzge_flwr.config.parsing import from_run_config
from fedzge_flwr.images.pixels import PIXEL_RANGE
from fedzge_flwr.server.build import build_sources, check_names
from fedzge_flwr.synthesis.composition import Composition
from fedzge_flwr.synthesis.memory import Memories
from fedzge_flwr.synthesis.patterns import render
from fedzge_flwr.synthesis.sources import SOURCES, Proposed, Source

SHAPES = [(1, 8, 8), (3, 10, 14)]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brightness_logits(x_NCHW: Tensor) -> Tensor:
    """A black box of three classes: dark, bright, and what is never shown."""
    mean_N = x_NCHW.mean(dim=(1, 2, 3))
    return torch.stack((-4 * mean_N, 4 * mean_N, torch.full_like(mean_N, -3.0)), dim=1)


def told_of(shape: tuple[int, int, int], num: int) -> Memories:
    """Memories of as many patterns as of other images, with a black box's answers to them."""
    memories = Memories.of(1000)
    coded = SOURCES["patterns"](num, shape, memories, stream(1))
    plain = SOURCES["procedural"](num, shape, memories, stream(2))
    x_NCHW = torch.cat((plain.images_NCHW, coded.images_NCHW))
    assert coded.codes_ND is not None
    levels = PIXEL_RANGE.to_uint8(x_NCHW)
    memories.add(levels, brightness_logits(x_NCHW), coded.codes_ND, num)
    return memories


@pytest.fixture(params=sorted(SOURCES))
def source(request: pytest.FixtureRequest) -> Source:
    return SOURCES[request.param]


@pytest.mark.parametrize("num_told", [0, 1, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_source_makes_as_many_images_as_it_is_asked_for(
    source: Source, shape: tuple[int, int, int], num_told: int
) -> None:
    """Also while nothing was told: the first round asks as every other."""
    told = told_of(shape, num_told) if num_told else Memories.of(5)
    for num in (1, 2, 33):
        images_NCHW, codes_ND = source(num, shape, told, stream())
        assert images_NCHW.shape == (num, *shape)
        assert images_NCHW.dtype == torch.float32
        assert float(images_NCHW.min()) >= PIXEL_RANGE.low
        assert float(images_NCHW.max()) <= PIXEL_RANGE.high
        if codes_ND is not None:
            assert len(codes_ND) == num
            assert torch.equal(render(codes_ND, shape), images_NCHW)


@pytest.mark.parametrize("num_told", [0, 40])
def test_a_source_is_a_function_of_what_it_was_told_and_of_the_stream(
    source: Source, num_told: int
) -> None:
    """Nothing else is read, kept or changed: a run goes on as if it had never stopped."""
    shape = (1, 8, 8)
    told = told_of(shape, num_told) if num_told else Memories.of(5)
    before = [memory.snapshot() for memory in told]
    kept = [None if found is None else [part.clone() for part in found] for found in before]
    torch.manual_seed(0)
    state = torch.default_generator.get_state()
    first = source(20, shape, told, stream(1)).images_NCHW
    assert torch.equal(torch.default_generator.get_state(), state)
    torch.manual_seed(1)
    again, other = (source(20, shape, told, stream(n)).images_NCHW for n in (1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for memory, parts in zip(told, kept, strict=True):
        found = memory.snapshot()
        assert (found is None) == (parts is None)
        assert all(torch.equal(*pair) for pair in zip(found or (), parts or (), strict=True))


@pytest.mark.parametrize("name", ["bred", "evolved"])
def test_a_source_that_learns_makes_more_of_what_is_answered_least(name: str) -> None:
    """Here bright images: a tenth of what was told. A third class is demanded, and never found."""
    shape = (1, 8, 8)
    told, all_ = Memories.of(1000), told_of(shape, 200)
    assert all_.images.snapshot()
    for memory, found in zip(told, all_, strict=True):
        bright_M = found.logits_MK.argmax(dim=1) == 1
        rare = bright_M.nonzero()[: int((~bright_M).sum()) // 9, 0]
        chosen = torch.cat(((~bright_M).nonzero()[:, 0], rare))
        memory.add(found.asked[chosen], found.logits_MK[chosen])
    images_NCHW = SOURCES[name](300, shape, told, stream()).images_NCHW
    bright = (brightness_logits(images_NCHW).argmax(dim=1) == 1).double().mean()
    assert float(bright) > 0.2


def composition(sources: dict[str, Source], chooser: nn.Module | None = None) -> Composition:
    return Composition(sources, (1, 8, 8), told_of((1, 8, 8), 40), chooser, 3, stream())


class Bright(nn.Module):
    """A chooser that tells dark from bright."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return brightness_logits(x_NCHW)


def test_patterns_come_first_with_their_codes_whatever_the_order_is() -> None:
    """Also where the central model chooses among candidates."""
    for chooser in (None, Bright().eval()):
        counts = {"procedural": 5, "evolved": 4, "bred": 3, "patterns": 2}
        images_NCHW, codes_ED, of_which = composition(SOURCES, chooser).drawn(counts)
        order = ["evolved", "patterns", "procedural", "bred"]
        assert list(of_which.items()) == [(name, counts[name]) for name in order]
        assert images_NCHW.shape == (14, 1, 8, 8)
        assert torch.equal(render(codes_ED, (1, 8, 8)), images_NCHW[:6])
    nothing = composition(SOURCES).drawn({"bred": 0})
    assert nothing.images_NCHW.shape == (0, 1, 8, 8)
    assert len(nothing.codes_ED) == 0


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.zeros(4, 1, 8, 8), r"float32 images of shape \(4, 1, 8, 8\); .* of \(5, 1, 8, 8\)"),
        (torch.zeros(5, 8, 8, 1), r"float32 images of shape \(5, 8, 8, 1\)"),
        (torch.zeros(5, 1, 8, 8, dtype=torch.float64), "float64 images"),
        (torch.full((5, 1, 8, 8), 200.0), r"pixel values outside \[-1, 1\] or not finite"),
        (torch.full((5, 1, 8, 8), float("nan")), "or not finite"),
    ],
)
def test_a_source_from_outside_is_checked(made: Tensor, message: str) -> None:
    strange: dict[str, Source] = {"mine": lambda *asked: Proposed(made)}
    with pytest.raises(ConfigError, match=f"source 'mine' proposed .*{message}"):
        composition(strange).drawn({"mine": 5})


def test_the_setting_names_sources_by_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """One from outside as the package's own; an unknown one is refused by name."""

    def grey(
        num: int, image_shape: tuple[int, int, int], told: Memories, generator: torch.Generator
    ) -> Proposed:
        return Proposed(torch.zeros(num, *image_shape))

    monkeypatch.setitem(SOURCES, "grey", grey)
    settings = from_run_config({"image-sources": " grey : 3, patterns:1, bred:0"})
    assert settings.images.source_shares == {"grey": 3.0, "patterns": 1.0}
    assert build_sources(settings) == {"grey": grey, "patterns": SOURCES["patterns"]}
    unknown = from_run_config({"image-sources": "gray:1"})
    with pytest.raises(
        ConfigError,
        match="no source of images named 'gray'; known: bred, evolved, grey, independent",
    ):
        check_names(unknown)
