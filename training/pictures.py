"""The pictures that a network learns from: pairs of one as it should be and one as the network gets it."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.drawings import draw
from worker.upscaler.picture import Levels

DRAWINGS = 128
"""How many pictures the code draws itself."""

DRAWING_SIDE = 512

DRAWN_SHARE = 0.15
"""Share of the patches that come from drawings."""

LEAST_SIDE = 256
"""Shorter side of a picture to learn from: at scale 4 a patch of 40 pixels and what lies around it are as large."""

HELD_OUT = 8
"""Every so manieth photograph is kept for validation."""

_RIM = 4
"""The least, in pixels of the small picture, that is made around a patch and thrown away, on each side: the widest
kernel reaches 3, and a blur before it is weak beyond."""

_GRID = 16
"""JPEG compresses squares of so many pixels, or of half as many: a patch may begin anywhere in one."""

_SMALLEST = 0.6
"""The size at which a picture is learned from, beside its own, is this share of it or more."""

_FAINTEST = 0.5
"""The contrast with which a picture is learned from is this share of its own or more."""

Degrade = Callable[[Levels, int, np.random.Generator], Levels]
"""Makes of a picture and a scale the small picture that a network gets."""


class Pool:
    """Patches of pictures in other sizes and colours, too, each degraded by itself.

    Measured at scale 4, when what was learned no longer helped on photographs held out: 700 steps with other colours
    gave 0.018 dB there, and 0.021 on the Kodak suite; with pictures at 0.8 and 0.62 of their sizes beside, 0.023 more
    on Kodak. All patches stand upright: from a pair that is turned or mirrored, once degraded, a symmetric network
    learns the same.
    """

    def __init__(self, pictures: Sequence[Levels], scale: int, degrade: Degrade) -> None:
        self._pictures = pictures
        self._scale = scale
        self._degrade = degrade
        areas = np.array([levels.shape[0] * levels.shape[1] for levels in pictures], np.float64)
        self._shares = areas / areas.sum()

    def sample(self, side: int, random: np.random.Generator) -> tuple[Levels, Levels]:
        """Cut a random patch: (side, side, 3) as the network gets it, and as it should be, `scale` times as large.

        Raises:
            ValueError: a side of a picture is less than `around(side) * scale`.
        """
        scale = self._scale
        levels = self._pictures[random.choice(len(self._pictures), p=self._shares)]
        high = recoloured(_cut(levels, around(side) * scale, random), random)
        low = self._degrade(high, scale, random)
        top, left = (_RIM + _below(_GRID, random) for _ in range(2))
        return _square(low, top, left, side), _square(high, top * scale, left * scale, side * scale)


def around(side: int) -> int:
    """Tell how large a square is degraded for a patch of `side` pixels of the input: whole squares of JPEG."""
    return -(-(side + 2 * _RIM + _GRID) // _GRID) * _GRID


def recoloured(levels: Levels, random: np.random.Generator) -> Levels:
    """Exchange the colours, make a negative and take contrast away, each sometimes: the same is to be seen."""
    if random.random() < 0.5:
        levels = levels[:, :, random.permutation(3)]
    tones = np.arange(256.0)
    if random.random() < 0.3:
        tones = tones[::-1]
    if random.random() < 0.5:
        contrast = random.uniform(_FAINTEST, 1)
        tones = tones * contrast + random.uniform(0, 255 * (1 - contrast))
    return np.rint(tones).astype(np.uint8)[levels]


def _cut(levels: Levels, side: int, random: np.random.Generator) -> Levels:
    """Cut a random square out of a picture as it is or, as often, made somewhat smaller, if it is large enough."""
    share = 1 if random.random() < 0.5 else random.uniform(_SMALLEST, 1)
    length = max(side, min(round(side / share), *levels.shape[:2]))
    top, left = (_below(whole - length + 1, random) for whole in levels.shape[:2])
    square = _square(levels, top, left, length)
    if length == side:
        return square
    return np.asarray(Image.fromarray(square).resize((side, side), Image.Resampling.LANCZOS))


def _below(end: int, random: np.random.Generator) -> int:
    return int(random.integers(end))


def _square(levels: Levels, top: int, left: int, side: int) -> Levels:
    return levels[top : top + side, left : left + side]


def batch(
    photographs: Pool, drawings: Pool, count: int, side: int, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Make tensors (count, 3, height, width) from 0 to 1 of patches and of what they should become."""
    pairs = [(drawings if random.random() < DRAWN_SHARE else photographs).sample(side, random) for _ in range(count)]
    low, high = zip(*pairs, strict=True)
    return tensor(low), tensor(high)


def tensor(patches: Sequence[Levels]) -> Tensor:
    """Make a tensor (count, 3, height, width) from 0 to 1 of pictures of one size."""
    planes = np.ascontiguousarray(np.stack(patches).transpose(0, 3, 1, 2))
    return torch.from_numpy(planes).to(torch.float32) / 255  # pyright: ignore[reportUnknownMemberType]


@cache
def drawn(count: int, side: int, seed: int) -> list[Levels]:
    """Draw `count` pictures, once for all networks."""
    return [draw(np.random.default_rng([seed, index]), side) for index in range(count)]


def read(folder: Path) -> tuple[list[Levels], list[Levels]]:
    """Read the photographs in a folder: those to learn from, and those held out."""
    learned: list[Levels] = []
    held_out: list[Levels] = []
    for index, path in enumerate(sorted(folder.glob("*.png"))):
        with Image.open(path) as image:
            picture = image.convert("RGB")
            if index % HELD_OUT == HELD_OUT - 1:
                held_out.append(np.asarray(picture))
                continue
            if min(picture.size) >= LEAST_SIDE:
                learned.append(np.asarray(picture))
    return learned, held_out
