"""Files to pictures and back: decode, orient, alpha, colour, encode."""

import numpy as np, numpy.typing as npt
from worker.upscaler.engine import Levels


def _curve():
    encoded = np.arange(256) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4).astype(np.float32)


_TO_LINEAR = _curve()


def _inv():
    x = np.arange(65536) / 65535
    return np.rint(255 * np.where(x <= 0.0031308, x * 12.92, 1.055 * x ** (1 / 2.4) - 0.055)).astype(np.uint8)


_TO_LEVELS = _inv()


def to_linear(levels):
    return _TO_LINEAR.take(levels)


def to_levels(linear):
    return _TO_LEVELS.take((np.clip(linear, 0, 1) * 65535 + 0.5).astype(np.uint16))
