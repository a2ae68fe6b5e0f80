"""The pictures that training draws."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.random import Generator, default_rng

from training import drawings
from training.drawings import KINDS, draw
from training.palettes import contrasting, mapped
from worker.upscaler.picture import Levels

SIDE = 96


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [17, SIDE])
def test_every_kind_fills_a_square_of_any_side(kind: str, side: int) -> None:
    for seed in range(4):
        picture = KINDS[kind][1](default_rng(seed), side)
        assert (picture.shape, picture.dtype) == ((side, side, 3), np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_draws_the_same_picture_and_another_seed_another(kind: str) -> None:
    first, again, other = (KINDS[kind][1](default_rng(seed), SIDE) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_is_blank(kind: str) -> None:
    deviations = [float(KINDS[kind][1](default_rng(seed), SIDE).std(axis=(0, 1)).max()) for seed in range(12)]
    assert min(deviations) > 2
    assert np.median(deviations) > 15


@pytest.mark.parametrize("kind", ["dead leaves", "facades", "line art", "gradients", "fur"])
def test_edges_are_smooth(kind: str) -> None:
    """Where a picture goes from one level to another within three pixels, the middle one often lies between."""
    between: list[float] = []
    for seed in range(6):
        rows = KINDS[kind][1](default_rng(seed), SIDE)[..., 1].astype(float)
        whole, first = rows[:, 2:] - rows[:, :-2], rows[:, 1:-1] - rows[:, :-2]
        between += (first / np.where(whole == 0, 1, whole))[np.abs(whole) > 40].tolist()
    assert np.mean([0.1 < share < 0.9 for share in between]) > 0.3


@pytest.mark.parametrize("seed", range(20))
def test_contrasting_colours_differ_in_lightness(seed: int) -> None:
    weights = np.array([0.299, 0.587, 0.114])
    first, second = contrasting(default_rng(seed))
    assert abs(weights @ first - weights @ second) > 40


def test_every_kind_is_drawn_as_often_as_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    def named(kind: str) -> Callable[[Generator, int], Levels]:
        return lambda _random, side: np.full((side, side, 3), list(KINDS).index(kind), dtype=np.uint8)

    shares = {kind: (share, named(kind)) for kind, (share, _) in KINDS.items()}
    monkeypatch.setattr(drawings, "KINDS", shares)
    random = default_rng(0)
    drawn = np.bincount([draw(random, 1)[0, 0, 0] for _ in range(2000)], minlength=len(KINDS)) / 2000
    assert drawn == pytest.approx([share for share, _ in KINDS.values()], abs=0.03)
    assert sum(share for share, _ in KINDS.values()) == pytest.approx(1)


def test_a_generator_goes_on_to_another_picture() -> None:
    random = default_rng(3)
    assert not np.array_equal(draw(random, SIDE), draw(random, SIDE))
    assert np.array_equal(draw(default_rng(3), SIDE), draw(default_rng(3), SIDE))


@pytest.mark.parametrize("seed", range(5))
def test_a_smooth_field_is_coloured_without_steps(seed: int) -> None:
    ramp = np.repeat(np.linspace(0, 1, 2000, dtype=np.float32)[None], 8, axis=0)
    steps = np.abs(np.diff(mapped(default_rng(seed), ramp).astype(int), axis=1))
    assert steps.max() <= 1
