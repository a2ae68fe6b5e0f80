"""What people build: walls of bricks, louvres, fences, windows and roofs, which repeat and are seen at a slant.

Where their period comes near two pixels of the input, a network that has not met such things guesses their lines wrong.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from training.fields import Field, grid, pick_scale, powers
from training.palettes import Colour, choose_colours, contrasting, nearby, rounded
from worker.upscaler.picture import Levels

Page = npt.NDArray[np.float32]
"""(samples, samples, 3), in levels."""

Rectangle = tuple[float, float, float, float]
"""Top, left, height and width on the wall, in pixels."""

Mask = npt.NDArray[np.bool_]
Shade = tuple[Field, Mask]
"""How light each place is, from 0 for the one colour to 1 for the other, and where there is anything at all."""

_FINEST_PERIOD = 3.0
"""In pixels of the finished picture."""


def build(random: Generator, side: int, samples: int) -> Levels:
    """Draw a wall with panels before it, `side` pixels square of `samples` samples along each side."""
    down, across = _seen(random, side, samples)
    page = np.full((samples, samples, 3), choose_colours(random, 1)[0], dtype=np.float32)
    _paint(random, page, _pattern(random, down, across)[0], _everywhere(down))
    for _ in range(int(random.integers(1, 9))):
        high, wide = (random.uniform(0.1, 0.8) * side for _ in range(2))
        top, left = random.uniform(-0.3, 0.9, 2) * side
        if random.random() < 0.6:
            _frame(random, page, (down, across), (top, left, high, wide))
        _cover(random, page, (down, across), (top, left, high, wide))
    light = 1 + random.uniform(0, 0.15) * powers(random, samples, 2.5)
    return np.clip(page * light[..., None], 0, 255).astype(np.uint8)


def _seen(random: Generator, side: int, samples: int) -> tuple[Field, Field]:
    """Give the place of each sample on the wall, down and across, in pixels: mostly upright, and near or far."""
    rows, columns = grid(side, samples)
    tilt = 0.0 if random.random() < 0.3 else random.normal(0, 0.06)
    slant = random.normal(0, 0.2, 2) / side * (random.random() < 0.7)
    distance = 1 + slant[0] * (rows - side / 2) + slant[1] * (columns - side / 2)
    down = (rows * math.cos(tilt) + columns * math.sin(tilt)) / distance
    across = (columns * math.cos(tilt) - rows * math.sin(tilt)) / distance
    return down.astype(np.float32), across.astype(np.float32)


def _cover(random: Generator, page: Page, seen: tuple[Field, Field], place: Rectangle) -> None:
    """Cover a rectangle of the wall by something that repeats."""
    top, left, high, wide = place
    down, across = seen[0] - top, seen[1] - left
    shade, filled = _pattern(random, down, across)
    _paint(random, page, shade, filled & _within(down, across, high, wide))


def _frame(random: Generator, page: Page, seen: tuple[Field, Field], place: Rectangle) -> None:
    """Set a board around a rectangle, lighter on one side, and let it throw a shadow."""
    top, left, high, wide = place
    width = pick_scale(random, 1, 8)
    down, across = seen[0] - top + width, seen[1] - left + width
    board = _within(down, across, high + 2 * width, wide + 2 * width)
    fall = random.uniform(0.5, 3)
    shadow = _within(down - fall, across - fall, high + 2 * width, wide + 2 * width)
    page[shadow & ~board] *= random.uniform(0.3, 0.8)
    shade = np.clip(down / width, 0, 1) * 0.5 + np.clip(across / width, 0, 1) * 0.5
    _paint(random, page, shade.astype(np.float32), board)


def _within(down: Field, across: Field, high: float, wide: float) -> Mask:
    return (down >= 0) & (down < high) & (across >= 0) & (across < wide)


def _paint(random: Generator, page: Page, shade: Field, where: Mask) -> None:
    dark, light = _colours(random)
    share = shade[where][:, None]
    page[where] = np.array(dark, np.float32) * (1 - share) + np.array(light, np.float32) * share


def _colours(random: Generator) -> tuple[Colour, Colour]:
    """Choose two colours: mostly kin of one another, as light and shadow of one thing are."""
    if random.random() < 0.3:
        return contrasting(random)
    light = choose_colours(random, 1)[0]
    return nearby(random, rounded(np.array(light) * random.uniform(0.2, 0.8))), light


def _pattern(random: Generator, down: Field, across: Field) -> Shade:
    return _PATTERNS[int(random.integers(len(_PATTERNS)))](random, down, across)


def _slats(random: Generator, down: Field, across: Field) -> Shade:
    """Louvres, boards, steps and rails: each catches the light at one edge and has a gap, or a shadow, behind it."""
    along = down if random.random() < 0.5 else across
    phase = along / pick_scale(random, _FINEST_PERIOD, 30) % 1
    gap = random.uniform(0.1, 0.7)
    lit = 1 - np.clip((phase - gap) / (1 - gap), 0, 1) * random.uniform(0, 0.7)
    filled = phase >= gap if random.random() < 0.4 else _everywhere(down)
    return np.where(phase < gap, np.float32(0), lit).astype(np.float32), filled


def _bricks(random: Generator, down: Field, across: Field) -> Shade:
    """Courses of bricks, shingles or plates, each of its own shade."""
    high = pick_scale(random, _FINEST_PERIOD, 24)
    wide = high * random.uniform(1, 4)
    course = np.floor(down / high)
    shifted = across / wide + course * random.choice([0, 0.5, 0.5, 0.5, 0.33])
    joint = random.uniform(0.05, 0.3)
    shades = random.normal(0.7, random.uniform(0, 0.2), 4096).astype(np.float32)
    brick = shades[(course * 61 + np.floor(shifted) * 17).astype(np.int64) % 4096]
    seam = (down / high % 1 < joint) | (shifted % 1 < joint * high / wide)
    return np.where(seam, np.float32(random.choice([0, 1])), brick).clip(0, 1), _everywhere(down)


def _panes(random: Generator, down: Field, across: Field) -> Shade:
    """Windows in rows: bars, and dark glass in which the sky is lighter above."""
    high = pick_scale(random, 4, 80)
    wide = high * random.uniform(0.4, 1.5)
    bar = random.uniform(0.06, 0.4)
    y, x = down / high % 1, across / wide % 1
    glass = (y > bar) & (x > bar * high / wide / 2)
    sky = random.uniform(0, 0.5) * (1 - y)
    return np.where(glass, sky, np.float32(1)).astype(np.float32), _everywhere(down)


def _tiles(random: Generator, down: Field, across: Field) -> Shade:
    """A roof: rows of round tiles, or corrugated iron."""
    wide = pick_scale(random, _FINEST_PERIOD, 24)
    round_ = np.abs(np.cos(np.pi * across / wide))
    rows = down / (wide * random.uniform(0.8, 2.5)) + round_ * random.uniform(0, 0.4)
    return (round_ * (0.4 + 0.6 * (rows % 1))).astype(np.float32), _everywhere(down)


def _lattice(random: Generator, down: Field, across: Field) -> Shade:
    """Wire, trellis or railing: thin round bars in one or two directions, and nothing between."""
    pitch = pick_scale(random, _FINEST_PERIOD, 30)
    thick = random.uniform(0.1, 0.5)
    lean = float(random.random() < 0.3)
    first, second = (across + lean * down) / pitch % 1, (down - lean * across) / (pitch * random.uniform(0.7, 3)) % 1
    upright, level = first < thick, second < thick
    bars = upright | level if random.random() < 0.6 else upright
    return np.sin(np.pi * np.where(upright, first, second) / thick).clip(0, 1).astype(np.float32), bars


def _everywhere(field: Field) -> Mask:
    return np.ones(field.shape, dtype=np.bool_)


_PATTERNS: tuple[Callable[[Generator, Field, Field], Shade], ...] = (_slats, _slats, _bricks, _panes, _tiles, _lattice)
