"""Colour fixes and sharpening: what they keep, what they move, and no trace of the strips they work in."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from core.options import ColourFix
from worker.upscaler import colour
from worker.upscaler.colour import adain, low_frequencies, restore_colours, sharpen, wavelet

SIZES = [(1, 1), (2, 3), (40, 3), (90, 70)]


def _noise(height: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(seed))


def _convolved(picture: Tensor, kernel: list[list[float]], dilation: int = 1) -> Tensor:
    """Filter by the textbook: one 3 × 3 kernel for each channel, edges repeated."""
    weights = torch.tensor(kernel).expand(3, 1, 3, 3)
    padded = functional.pad(picture, (dilation,) * 4, mode="replicate")
    return functional.conv2d(padded, weights, groups=3, dilation=dilation)


def _decomposed(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Split into high and low frequencies, level by level."""
    high = torch.zeros_like(picture)
    for level in range(5):
        low = _convolved(picture, [[1 / 16, 1 / 8, 1 / 16], [1 / 8, 1 / 4, 1 / 8], [1 / 16, 1 / 8, 1 / 16]], 2**level)
        high, picture = high + picture - low, low
    return high, picture


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_wavelet_fix_is_the_pictures_high_and_the_references_low_frequencies(height: int, width: int) -> None:
    picture, reference = _noise(height, width), _noise(height, width, 1)
    expected = _decomposed(picture)[0] + _decomposed(reference)[1]
    torch.testing.assert_close(wavelet(picture, reference), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_picture_with_its_own_low_frequencies_is_itself(height: int, width: int) -> None:
    picture = _noise(height, width)
    torch.testing.assert_close(wavelet(picture, picture), picture, atol=1e-5, rtol=0)
    high = wavelet(picture, torch.zeros_like(picture))
    torch.testing.assert_close(high + low_frequencies(picture), picture, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows", [1, 7, 31, 64, 200])
def test_strips_do_not_show(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, reference = _noise(150, 20), _noise(150, 20, 1)
    whole = wavelet(picture, reference), sharpen(picture, 4)
    monkeypatch.setattr(colour, "_STRIP_ROWS", rows)
    assert torch.equal(wavelet(picture, reference), whole[0])
    assert torch.equal(sharpen(picture, 4), whole[1])


def test_a_wavelet_fix_depends_on_31_pixels_around_and_no_more() -> None:
    picture, dot = torch.zeros((1, 3, 81, 81)), torch.zeros((1, 3, 81, 81))
    dot[..., 40, 40] = 1
    seen = wavelet(picture, dot)[0, 0] > 0
    assert seen[40 - 31 : 40 + 32, 40 - 31 : 40 + 32].all()
    assert seen.sum() == 63 * 63


def test_a_tint_goes_and_detail_stays() -> None:
    original = 0.3 + 0.4 * _noise(128, 128)
    tint = torch.tensor([0.15, -0.1, 0.05]).view(1, 3, 1, 1) * torch.linspace(0, 1, 128)
    assert (wavelet(original + tint, original) - original).abs().max() < 0.02
    # New detail, as diffusion invents it: every other pixel lighter.
    detail = 0.1 * (torch.arange(128) % 2 * 2.0 - 1)
    fixed = wavelet(original + tint + detail, original)
    inner = (..., slice(32, -32), slice(32, -32))
    torch.testing.assert_close(fixed[inner], (original + detail)[inner], atol=0.02, rtol=0)


def test_adain_gives_each_channel_the_references_mean_and_deviation() -> None:
    reference = _noise(50, 60, 1) * torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1) + 0.05
    fixed = adain(_noise(50, 60) * 0.7, reference)
    torch.testing.assert_close(fixed.mean((2, 3)), reference.mean((2, 3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(fixed.std((2, 3)), reference.std((2, 3)), atol=1e-5, rtol=0)


def test_adain_undoes_a_change_of_contrast_and_tint() -> None:
    original = _noise(50, 60)
    torch.testing.assert_close(adain(original * 0.6 + 0.3, original), original, atol=1e-5, rtol=0)


def test_adain_makes_no_picture_out_of_rounding() -> None:
    flat = torch.full((1, 3, 64, 64), 0.5) + 1e-6 * _noise(64, 64)
    assert adain(flat, _noise(64, 64, 1)).std((2, 3)).max() < 1e-3


@pytest.mark.parametrize(("kind", "fix"), [(ColourFix.WAVELET, wavelet), (ColourFix.ADAIN, adain)])
def test_restored_colours_are_those_of_the_fix_cut_to_the_range(
    kind: ColourFix, fix: Callable[[Tensor, Tensor], Tensor]
) -> None:
    picture, reference = _noise(40, 40), _noise(40, 40, 1).round()
    expected = fix(picture, reference)
    assert expected.min() < 0 and expected.max() > 1
    assert torch.equal(restore_colours(kind, picture, reference), expected.clamp(0, 1))


def test_colours_are_left_alone_where_no_fix_is_wanted() -> None:
    picture = _noise(8, 8)
    assert restore_colours(ColourFix.OFF, picture, _noise(8, 8, 1)) is picture


@pytest.mark.parametrize("kind", list(ColourFix))
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (1, 300), (300, 1)])
def test_pictures_of_any_size_keep_it(kind: ColourFix, height: int, width: int) -> None:
    fixed = sharpen(restore_colours(kind, _noise(height, width), _noise(height, width, 1)), 5)
    assert fixed.shape == (1, 3, height, width)
    assert fixed.isfinite().all() and fixed.min() >= 0 and fixed.max() <= 1


@pytest.mark.parametrize("amount", [0.5, 1, 10])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sharpening_is_the_kernel_cut_to_the_range(amount: float, height: int, width: int) -> None:
    picture, side = _noise(height, width), -amount / 10
    kernel = [[side, side, side], [side, 1 - 8 * side, side], [side, side, side]]
    torch.testing.assert_close(sharpen(picture, amount), _convolved(picture, kernel).clamp(0, 1), atol=1e-5, rtol=0)


def test_sharpening_by_nothing_changes_nothing() -> None:
    picture = _noise(8, 8)
    assert sharpen(picture, 0) is picture


@pytest.mark.parametrize("level", [0.0, 1 / 255, 0.3, 1.0])
def test_flat_colour_stays_what_it_is(level: float) -> None:
    flat = torch.full((1, 3, 70, 40), level)
    torch.testing.assert_close(sharpen(flat, 10), flat, atol=1e-5, rtol=0)
    for kind in ColourFix:
        torch.testing.assert_close(restore_colours(kind, flat, flat), flat, atol=1e-6, rtol=0)


def test_nothing_given_is_written_to() -> None:
    picture, reference = _noise(40, 40), _noise(40, 40, 1)
    for kind in ColourFix:
        sharpen(restore_colours(kind, picture, reference), 3)
    assert torch.equal(picture, _noise(40, 40))
    assert torch.equal(reference, _noise(40, 40, 1))
