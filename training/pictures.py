"""The pictures that a network learns from: pairs of one as it should be and one as the network gets it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
"""Shorter side of a picture to learn from: at scale 4 a patch of 64 pixels is as large."""

HELD_OUT = 8
"""Every so manieth photograph is kept for validation."""

_SPREAD = 7919
"""How many steps apart neighbouring pictures are degraded anew, in effect: a prime number."""

Degrade = Callable[[Levels, int, np.random.Generator], Levels]
"""Makes of a picture and a scale the small picture that a network gets."""


@dataclass(slots=True)
class _Source:
    high: Levels
    seed: int
    version: int = -1
    low: Levels | None = None


class Pool:
    """Patches of pictures, each picture degraded anew after so many steps, or never."""

    def __init__(
        self,
        pictures: Sequence[Levels],
        scale: int,
        degrade: Degrade,
        *,
        renewed: int | None,
        seed: int,
        places: int = 2,
    ) -> None:
        self._sources = [_Source(cut(levels, scale), seed + index) for index, levels in enumerate(pictures)]
        self._scale = scale
        self._degrade = degrade
        self._renewed = renewed
        self._places = places
        areas = np.array([source.high.shape[0] * source.high.shape[1] for source in self._sources], np.float64)
        self._shares = areas / areas.sum()

    def sample(self, side: int, random: np.random.Generator, step: int) -> tuple[Levels, Levels]:
        """Cut a random patch: `side` pixels square as the network gets it, and as it should be.

        What happens depends on the generator and the step alone, not on what was cut before: so a training that was
        interrupted goes on as it would have.
        """
        source = self._sources[random.choice(len(self._sources), p=self._shares)]
        low = self._low(source, step)
        # Of some places the one with most to see: flat ones teach little.
        height, width, _ = low.shape
        places = [(_below(height - side + 1, random), _below(width - side + 1, random)) for _ in range(self._places)]
        top, left = max(places, key=lambda place: _contrast(low, *place, side))
        pose = _below(4, random), _below(2, random)
        scale = self._scale
        return (
            _posed(_square(low, top, left, side), *pose),
            _posed(_square(source.high, top * scale, left * scale, side * scale), *pose),
        )

    def _low(self, source: _Source, step: int) -> Levels:
        # Not all pictures at once: that would be a pause.
        version = (step + source.seed * _SPREAD) // self._renewed if self._renewed else 0
        if source.low is None or source.version != version:
            random = np.random.default_rng([source.seed, version])
            source.low, source.version = self._degrade(source.high, self._scale, random), version
        return source.low


def cut(levels: Levels, scale: int) -> Levels:
    """Leave out what is too much for sides that are multiples of `scale`."""
    height, width = (length // scale * scale for length in levels.shape[:2])
    return levels[:height, :width]


def _below(end: int, random: np.random.Generator) -> int:
    return int(random.integers(end))


def _square(levels: Levels, top: int, left: int, side: int) -> Levels:
    return levels[top : top + side, left : left + side]


def _contrast(levels: Levels, top: int, left: int, side: int) -> float:
    return np.std(_square(levels, top, left, side)[:, :, 1]).item()


def _posed(levels: Levels, turns: int, mirrored: int) -> Levels:
    """Turn by so many right angles, and mirror if told to: a picture has eight poses."""
    turned = np.rot90(levels, turns)
    return turned[:, ::-1] if mirrored else turned


def batch(
    photographs: Pool, drawings: Pool, count: int, side: int, random: np.random.Generator, step: int
) -> tuple[Tensor, Tensor]:
    """Make tensors (count, 3, height, width) from 0 to 1 of patches and of what they should become."""
    pairs = [
        (drawings if random.random() < DRAWN_SHARE else photographs).sample(side, random, step) for _ in range(count)
    ]
    low, high = zip(*pairs, strict=True)
    return tensor(low), tensor(high)


def tensor(patches: Sequence[Levels]) -> Tensor:
    """Make a tensor (count, 3, height, width) from 0 to 1 of pictures of one size."""
    planes = np.ascontiguousarray(np.stack(patches).transpose(0, 3, 1, 2))
    return torch.from_numpy(planes).to(torch.float32) / 255  # pyright: ignore[reportUnknownMemberType]


def drawn(count: int, side: int, seed: int) -> list[Levels]:
    """Draw `count` pictures."""
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
