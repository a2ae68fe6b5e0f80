"""The Clarity engine on small random weights, for tests of the whole of it."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from core.options import UpscaleOptions
from worker.upscaler.engine import Engine
from worker.upscaler.engines import Config, clarity
from worker.upscaler.engines.clarity import Clarity
from worker.upscaler.picture import Picture, join

Floats = npt.NDArray[np.float64]

QUICK = UpscaleOptions(steps=6, tile_width=16, tile_height=16, seed=7)
"""Three evaluations of small tiles."""


def load(models: Path, **chosen: Any) -> Clarity:
    return clarity.load(Config(models_dir=models, device="cpu", **chosen))


def upscale(engine: Engine, picture: Picture, options: UpscaleOptions = QUICK, **changed: Any) -> Picture:
    return join(engine.upscale(picture, options.model_copy(update=changed), lambda _: None, lambda: False))


def photo(width: int, height: int, seed: int = 0) -> Picture:
    """Return something with large forms and fine grain."""
    down, across = np.mgrid[0:height, 0:width]
    waves = [np.sin(down / (7 + 3 * i)) * np.cos(across / (11 - 2 * i)) for i in range(3)]
    grain = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return Picture(np.clip(128 + 80 * np.stack(waves, axis=2) + grain, 0, 255).astype(np.uint8))


def difference(one: Picture, other: Picture) -> Floats:
    return np.abs(one.rgb.astype(np.float64) - other.rgb)


@contextmanager
def counted(module: nn.Module) -> Generator[list[int]]:
    """Note how many samples each call of a network has."""
    seen: list[int] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen.append(len(arguments[0]))

    hook = module.register_forward_pre_hook(note)
    try:
        yield seen
    finally:
        hook.remove()
