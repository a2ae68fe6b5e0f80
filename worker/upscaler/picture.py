"""One picture, as it goes through the upscaler."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Levels: TypeAlias = npt.NDArray[np.uint8]
"""Samples as files hold them: 0 to 255."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One picture: colours in sRGB, and how opaque each pixel is.

    Raises:
        ValueError: an array is not uint8, is empty or has another shape than it says here.
    """

    rgb: Levels
    """(height, width, 3), not multiplied by alpha."""

    alpha: Levels | None = None
    """(height, width), 0 transparent to 255 opaque; None where the picture has no transparency."""

    def __post_init__(self) -> None:
        if self.rgb.dtype != np.uint8 or self.rgb.ndim != 3 or self.rgb.shape[2] != 3 or self.rgb.size == 0:
            raise ValueError(f"rgb must be uint8 of shape (height, width, 3), not {self.rgb.dtype} of {self.rgb.shape}")
        if self.alpha is not None and (self.alpha.dtype != np.uint8 or self.alpha.shape != self.rgb.shape[:2]):
            raise ValueError(
                f"alpha must be uint8 of shape {self.rgb.shape[:2]}, not {self.alpha.dtype} of {self.alpha.shape}"
            )

    @property
    def width(self) -> int:
        return self.rgb.shape[1]

    @property
    def height(self) -> int:
        return self.rgb.shape[0]


def join(strips: Iterable[Picture]) -> Picture:
    """Put strips below each other; one alone is returned as it is."""
    first, *more = strips
    if not more:
        return first
    strips = [first, *more]
    alphas = [strip.alpha for strip in strips if strip.alpha is not None]
    return Picture(np.concatenate([strip.rgb for strip in strips]), np.concatenate(alphas) if alphas else None)
