"""Colours that belong together, and fields coloured with them."""

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

from training.fields import Field
from worker.upscaler.picture import Levels

Colour = tuple[int, int, int]

_ENTRIES = 2048

_LEAST_CONTRAST = 60
"""Levels between two colours that are to be told apart."""


def mapped(random: Generator, field: Field) -> Levels:
    """Colour a field from its lowest to its highest values, along a row of a few colours."""
    low, high = np.percentile(field[::4, ::4], [1, 99])
    first, last = contrasting(random)
    between = choose_colours(random, int(random.integers(0, 3)))
    stops = np.array([first, *between, last], dtype=np.float32)
    # Far more entries than levels, so that no step is wider than a level.
    table = np.linspace(0, len(stops) - 1, _ENTRIES)
    colours = np.stack([np.interp(table, np.arange(len(stops)), stops[:, band]) for band in range(3)], axis=1)
    places = np.clip((field - low) * (_ENTRIES / max(high - low, 1e-6)), 0, _ENTRIES - 1).astype(np.int16)
    return np.round(colours).astype(np.uint8)[places]


def choose_colours(random: Generator, count: int) -> list[Colour]:
    """Choose colours that belong together: a few hues, mostly muted, in any lightness."""
    vivid = random.choice([0, 8, 14, 14, 14, 24])
    hues = random.laplace(0, vivid, (int(random.integers(1, 6)), 2))
    chroma = hues[random.integers(len(hues), size=count)] + random.laplace(0, vivid / 4, (count, 2))
    light = np.clip(random.normal(random.uniform(60, 190), random.uniform(25, 90), count), 4, 251)
    # What is nearly black or white has little colour left.
    blue, red = chroma.T * np.minimum(1, np.minimum(light, 255 - light) / 60)
    bands = np.stack([light + 1.402 * red, light - 0.344 * blue - 0.714 * red, light + 1.772 * blue], axis=1)
    return [rounded(colour) for colour in bands]


def contrasting(random: Generator, first: Colour | None = None) -> tuple[Colour, Colour]:
    """Choose two colours that differ clearly in lightness, the first of them if it is not given."""
    if first is None:
        first = (255, 255, 255) if random.random() < 0.15 else choose_colours(random, 1)[0]
    brightness = _brightness(first)
    if random.random() < 0.15:
        return first, (0, 0, 0) if brightness > 127 else (255, 255, 255)
    darker, lighter = max(0.0, brightness - _LEAST_CONTRAST), max(0.0, 255 - brightness - _LEAST_CONTRAST)
    goal = random.uniform(0, darker + lighter)
    if goal > darker:
        goal += 255 - darker - lighter
    second = np.array(choose_colours(random, 1)[0])
    return first, rounded(second + (goal - _brightness(rounded(second))))


def nearby(random: Generator, colour: Colour) -> Colour:
    return rounded(np.array(colour) + random.normal(0, 20) + random.normal(0, 6, 3))


def _brightness(colour: Colour) -> float:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue


def rounded(colour: npt.NDArray[np.float64]) -> Colour:
    red, green, blue = (int(level) for level in np.clip(np.round(colour), 0, 255))
    return red, green, blue
