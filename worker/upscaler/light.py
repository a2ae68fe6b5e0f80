"""Levels as files hold them, and the light that they stand for."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from worker.upscaler.picture import Levels

Linear: TypeAlias = npt.NDArray[np.float32]
"""Light as it adds up: 0 black to 1 white."""


def _linear_of_levels() -> Linear:
    encoded = np.arange(256) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _levels_of_linear() -> Levels:
    linear = np.arange(1 << 16) / 65535
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(encoded * 255).astype(np.uint8)


_TO_LINEAR = _linear_of_levels()
_TO_LEVELS = _levels_of_linear()


def to_fractions(levels: Levels) -> Linear:
    """Divide by 255: what alpha's levels mean."""
    return levels.astype(np.float32) / np.float32(255)


def to_linear(levels: Levels) -> Linear:
    """Undo the transfer function of sRGB (IEC 61966-2-1); any shape."""
    return _TO_LINEAR.take(levels)


def to_levels(linear: Linear) -> Levels:
    """Apply the transfer function of sRGB to values of 0 to 1 in any shape; undoes `to_linear` exactly.

    Looks up 65536 steps: near black, where a level is narrowest, 20 of them make one level.
    """
    return _TO_LEVELS.take((linear * 65535 + 0.5).astype(np.uint16))
