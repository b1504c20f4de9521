"""Directions are the same on every machine, in few bytes, and nothing else is taken for them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fedzge_flwr.query.directions import SEEDS, Directions

SHAPE = (1, 2, 3)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def through_bytes(directions: Directions) -> np.ndarray:
    payload = np.frombuffer(directions.payload_QGP.tobytes(), dtype=np.uint8)
    payload = payload.reshape(directions.payload_QGP.shape)
    return Directions(payload, directions.image_shape, directions.seed).decoded()


def test_written_out_directions_stay_as_they_are() -> None:
    u = normal(2, 3, *SHAPE)
    directions = Directions.written_out(u)
    assert directions.payload_QGP.shape == (2, 3, 4 * 6)
    assert np.array_equal(through_bytes(directions), u)


def test_signs_from_a_seed_are_these_on_every_machine() -> None:
    u = Directions.from_seed(2, 5, SHAPE, 2026).decoded()
    signs = "".join("+" if value > 0 else "-" for value in u.flatten())
    assert signs == "+++-++------++-+++-+-++-+----++--+-++--+-+++-++--+-+------++"
    assert (np.abs(u) == np.float32(1 / np.sqrt(6))).all()
    # More than one word of bits, of the last possible seed.
    last = Directions.from_seed(1, 1, (3, 32, 32), SEEDS - 1).decoded()
    assert np.packbits(last.flatten() > 0)[-8:].tolist() == [165, 0, 244, 7, 163, 65, 231, 233]


def test_seeded_directions_take_no_bytes_and_differ_by_seed() -> None:
    first, again, other = (Directions.from_seed(3, 4, SHAPE, seed) for seed in (1, 1, 2))
    assert first.payload_QGP.shape == (3, 4, 0)
    assert np.array_equal(through_bytes(first), again.decoded())
    assert not np.array_equal(first.decoded(), other.decoded())
    rows = first.decoded().reshape(12, 6)
    assert len(np.unique(rows, axis=0)) > 6


@pytest.mark.parametrize("kind", [normal, np.zeros])
def test_ternary_directions_are_the_nearest_of_all(kind: object) -> None:
    """By trying all 3⁶ − 1 of them."""
    u = normal(2, 4, *SHAPE) if kind is normal else np.tile(normal(1, 1, *SHAPE), (2, 4, 1, 1, 1))
    if kind is not normal:
        # Equal sizes and zeros among them.
        u[0, 0] = [[[1, -1, 0], [0, 0, 1]]]
        u[1, 1] = -1.0
    directions = Directions.ternary(u)
    assert directions.payload_QGP.shape == (2, 4, 2)
    found = through_bytes(directions).reshape(8, 6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-6)
    every = np.array([t for t in product((-1, 0, 1), repeat=6) if any(t)], dtype=float)
    every /= np.linalg.norm(every, axis=1, keepdims=True)
    rows = u.reshape(8, 6)
    best = (rows @ every.T).max(axis=1)
    np.testing.assert_allclose((rows * found).sum(axis=1), best, rtol=1e-6)


def test_ternary_directions_decode_to_themselves() -> None:
    once = Directions.ternary(normal(3, 5, 2, 3, 4))
    assert np.array_equal(Directions.ternary(once.decoded()).payload_QGP, once.payload_QGP)
    assert once.decoded().shape == (3, 5, 2, 3, 4)


@pytest.mark.parametrize("num_directions", [0, 2])
def test_no_directions_and_no_images(num_directions: int) -> None:
    for directions in (
        Directions.none(SHAPE, 3),
        Directions.from_seed(num_directions, 0, SHAPE, 1),
        Directions.ternary(np.zeros((num_directions, 0, *SHAPE), dtype=np.float32)),
    ):
        num, images, _ = directions.payload_QGP.shape
        assert directions.decoded().shape == (num, images, *SHAPE)


def spoiled(payload: np.ndarray, value: int, at: int) -> Directions:
    payload = payload.copy()
    payload[1, 2, at] = value
    return Directions(payload, SHAPE)


TERNARY = Directions.ternary(normal(2, 3, *SHAPE)).payload_QGP
FLOATS = Directions.written_out(np.full((2, 3, *SHAPE), np.float32(np.finfo("f4").max))).payload_QGP
BAD = {
    "1 bytes a direction": Directions(TERNARY[:, :, :1], SHAPE),
    "23 bytes a direction": Directions(FLOATS[:, :, :23], SHAPE),
    "no five ternary digits": spoiled(TERNARY, 243, 0),
    "beyond the last pixel": spoiled(TERNARY, 0, 1),
    "a direction of zeros": Directions(np.full_like(TERNARY, 121), SHAPE),
    "not finite": spoiled(FLOATS, 255, -2),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_payload_is_refused(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message].decoded()
