"""Colours brought back to those of a reference, and the finished picture sharpened.

A picture is a float tensor of (1, 3, height, width), 0 to 1. `restore_colours` and `sharpen` give such pictures too;
`wavelet` and `adain` may leave the range.
"""

from collections.abc import Generator

import torch
from torch import Tensor
from torch.nn import functional

from core.options import ColourFix
from worker.upscaler.plan import spans

WAVELET_LEVELS = 5

_REACH_PIXELS = 2**WAVELET_LEVELS - 1
"""How far away a pixel can lie that the lowest frequencies depend on: 1 + 2 + 4 + 8 + 16."""

_STRIP_ROWS = 256
"""What is worked on at once, so that no second copy of a large picture is needed."""

_LEAST_DEVIATION = 1 / 255
"""A channel that varies by less than a level is not stretched: most of that is rounding."""


def restore_colours(kind: ColourFix, picture: Tensor, reference: Tensor) -> Tensor:
    """Give `picture` the colours of `reference`, which is of the same size, on any device."""
    match kind:
        case ColourFix.WAVELET:
            return wavelet(picture, reference).clamp_(0, 1)
        case ColourFix.ADAIN:
            return adain(picture, reference).clamp_(0, 1)
        case ColourFix.OFF:
            return picture


def wavelet(picture: Tensor, reference: Tensor) -> Tensor:
    """Keep the high frequencies of `picture` and take the low ones from `reference`.

    What an à trous decomposition of five levels leaves counts as low: Holschneider et al., 1989, with a binomial kernel
    of 3 × 3; the edges are repeated outwards. Beyond 31 pixels nothing matters to a pixel.
    """
    output = torch.empty_like(picture)
    for rows, field, inner in _strips(picture.shape[2], _REACH_PIXELS):
        # The decomposition is linear, and all its levels together are the picture: only the difference need be split.
        difference = reference[:, :, field].to(picture) - picture[:, :, field]
        output[:, :, rows] = picture[:, :, rows] + low_frequencies(difference)[:, :, inner]
    return output


def adain(picture: Tensor, reference: Tensor) -> Tensor:
    """Bring each channel's mean and standard deviation over the whole picture to the reference's (arXiv:1703.06868)."""
    variance, mean = torch.var_mean(picture, dim=(2, 3), correction=0, keepdim=True)
    wanted_variance, wanted_mean = torch.var_mean(reference.to(picture), dim=(2, 3), correction=0, keepdim=True)
    gain = wanted_variance.sqrt() / variance.sqrt().clamp(min=_LEAST_DEVIATION)
    return (picture - mean).mul_(gain).add_(wanted_mean)


def sharpen(picture: Tensor, amount: float) -> Tensor:
    """Add to each pixel `amount`/10 of what it differs from each of its eight neighbours; 0 changes nothing.

    That is a kernel of 3 × 3 whose sum is 1; the edges are repeated outwards.
    """
    if amount == 0:
        return picture
    output = torch.empty_like(picture)
    for rows, field, inner in _strips(picture.shape[2], 1):
        strip = picture[:, :, field]
        around = _filtered(_filtered(strip, 2, 1, 1, 1), 3, 1, 1, 1)
        output[:, :, rows] = (strip + (9 * strip - around) * (amount / 10))[:, :, inner].clamp_(0, 1)
    return output


def low_frequencies(picture: Tensor) -> Tensor:
    """Blur five times with the binomial kernel, whose taps each time lie twice as far apart."""
    for level in range(WAVELET_LEVELS):
        for axis in (2, 3):
            picture = _filtered(picture, axis, 2**level, 1 / 4, 1 / 2)
    return picture


def _filtered(picture: Tensor, axis: int, distance: int, side: float, middle: float) -> Tensor:
    """Weigh each pixel and the two that lie `distance` before and after it on an axis."""
    # Not a convolution: on tensor cores that would be rounded to 10 bits, and strips would differ from the whole.
    ends = (0, 0, distance, distance) if axis == 2 else (distance, distance, 0, 0)
    padded = functional.pad(picture, ends, mode="replicate")
    length = picture.shape[axis]
    before, after = padded.narrow(axis, 0, length), padded.narrow(axis, 2 * distance, length)
    return (before + after).mul_(side).add_(picture, alpha=middle)


def _strips(height: int, reach: int) -> Generator[tuple[slice, slice, slice]]:
    """Cut a picture into strips: their rows, the rows that those depend on, and where the ones lie in the others."""
    for rows in spans(height, _STRIP_ROWS):
        field = rows.grown(reach, height)
        yield slice(*rows), slice(*field), rows.within(field)
