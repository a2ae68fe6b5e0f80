"""Pictures for tests of super-resolution, and a network run on one."""

from collections.abc import Callable, Iterator

import numpy as np

from worker.upscaler.picture import Levels
from worker.upscaler.plan import Size
from worker.upscaler.strips import Rows
from worker.upscaler.superres import Network


def go_on() -> None:
    pass


def noise(width: int, height: int) -> Levels:
    return np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def gradient(width: int, height: int) -> Levels:
    down, across = np.mgrid[0:height, 0:width]
    return np.stack([across * 255 // width, down * 255 // height, (across + down) % 256], axis=2).astype(np.uint8)


def size_of(rgb: Levels) -> Size:
    return Size(width=rgb.shape[1], height=rgb.shape[0])


def cut(rgb: Levels, rows: int) -> Iterator[Levels]:
    return (rgb[top : top + rows] for top in range(0, len(rgb), rows))


def ran(network: Network, rgb: Levels, check: Callable[[], None] = go_on, *, small: bool = False) -> Levels:
    return np.concatenate(list(network.enlarge(Rows([rgb], size_of(rgb)), check, lambda _: None, small=small)))


def furthest(left: Levels, right: Levels) -> int:
    return int(np.abs(left.astype(int) - right.astype(int)).max())
