"""Noise of many kinds: what textures are made of."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from numpy.random import Generator

Field = npt.NDArray[np.float32]


def pick_scale(random: Generator, least: float, most: float) -> float:
    """Choose a positive number whose logarithm is spread evenly: small ones are as likely as large ones."""
    return least * (most / least) ** random.random()


def spectrum(random: Generator, side: int) -> Field:
    """Make noise that repeats at its edges, of mean 0 and deviation 1."""
    match int(random.integers(3)):
        case 0:
            return powers(random, side, random.uniform(0.4, 2))
        case 1:
            return streaks(random, side)
        case _:
            centre = pick_scale(random, 0.01, 0.35)
            spread = centre * random.uniform(0.1, 0.6)
            return _filtered(random, side, lambda y, x: np.exp(-(((np.hypot(y, x) - centre) / spread) ** 2)))


def powers(random: Generator, side: int, power: float) -> Field:
    """Make noise whose amplitude falls with that power of the frequency; photographs have about 1."""
    return _filtered(random, side, lambda y, x: np.hypot(y, x).clip(1 / side) ** -power)


def streaks(random: Generator, side: int) -> Field:
    """Make noise that is drawn out in one direction."""
    angle = random.uniform(0, np.pi)
    fine, coarse = random.uniform(0.1, 0.4), random.uniform(0.005, 0.05)

    def passed(y: Field, x: Field) -> Field:
        along, across = y * math.sin(angle) + x * math.cos(angle), y * math.cos(angle) - x * math.sin(angle)
        return np.exp(-((along / fine) ** 2) - (across / coarse) ** 2)

    return _filtered(random, side, passed)


def _filtered(random: Generator, side: int, passed: Callable[[Field, Field], npt.NDArray[np.floating]]) -> Field:
    """Filter white noise by what `passed` says of frequencies down and across, in cycles per pixel."""
    y, x = np.fft.fftfreq(side).astype(np.float32)[:, None], np.fft.rfftfreq(side).astype(np.float32)
    gain = passed(y, x).astype(np.float32)
    gain[0, 0] = 0
    white = random.standard_normal((side, side), dtype=np.float32)
    field = np.fft.irfft2(np.fft.rfft2(white) * gain, (side, side))
    return (field / (field.std() + 1e-9)).astype(np.float32)


def grid(side: int, samples: int) -> tuple[Field, Field]:
    """Give rows and columns, in pixels, of that many samples along each side."""
    places = (np.arange(samples, dtype=np.float32) + 0.5) * (side / samples)
    return places[:, None], places[None, :]
