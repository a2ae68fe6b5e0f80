"""Pictures to latents and back, on canvases of any size, with a VAE that sees one tile at a time."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple, Protocol, TypeAlias, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from worker.upscaler.plan import CELL_PIXELS, Size, Span, tiling

HALO_CELLS = 8
"""What a tile sees beyond what is taken of it, where it meets others: next to its edge it is not what it should be."""

FEATHER_CELLS = 4
"""What is taken of both of two neighbours, at least: there the one fades into the other."""

_MIN_TILE_CELLS = 2 * (HALO_CELLS + FEATHER_CELLS)

_LATENT_CHANNELS = 4

_MOST_CONTRAST = 4.0
"""What contrast that was lost in shrinking is at most restored by."""

_Net: TypeAlias = Callable[[Tensor], Tensor]


class _Posterior(Protocol):
    def mode(self) -> Tensor: ...


class _Encoded(Protocol):
    latent_dist: _Posterior


class _Decoded(Protocol):
    sample: Tensor


class _Codec(Protocol):
    """What diffusers leaves without types."""

    def encode(self, x: Tensor, /) -> _Encoded: ...

    def decode(self, z: Tensor, /) -> _Decoded: ...


class TiledVae:
    """Encode and decode in tiles that do not show.

    A canvas of more than one tile is cut into tiles of one shape. All of them are normalised with one mean and
    variance per group, estimated from a miniature of the canvas: tiles that each took their own would differ in tone.
    What is held beside input and output does not depend on the canvas. After each call, however it ends, the VAE is as
    it was.
    """

    def __init__(self, vae: AutoencoderKL, tile_pixels: int = 1024) -> None:
        """Work in tiles of `tile_pixels` on a side; memory grows with its square.

        Raises:
            ValueError: the side is not in whole cells, or too short.
        """
        if tile_pixels % CELL_PIXELS or tile_pixels < _MIN_TILE_CELLS * CELL_PIXELS:
            raise ValueError(
                f"A tile must be a multiple of {CELL_PIXELS} pixels and at least {_MIN_TILE_CELLS * CELL_PIXELS} on a "
                f"side, not {tile_pixels}."
            )
        self._vae, self._codec = vae, cast("_Codec", vae)
        self._tile_cells = tile_pixels // CELL_PIXELS
        self._scaling_factor = cast("float", vae.config["scaling_factor"])

    @torch.no_grad()
    def encode(self, rgb: Tensor, check: Callable[[], None]) -> Tensor:
        """Encode to the mode of the posterior times the scaling factor: (1, 4, height, width) in cells, fp32.

        `rgb` is (1, 3, height, width), 0 to 1, in whole cells, on any device; the latents are on the VAE's. `check` is
        called before each tile.

        Raises:
            Stopped: or whatever else `check` raises.
        """

        def net(pixels: Tensor) -> Tensor:
            inputs = (pixels.to(self._vae.device) * 2 - 1).to(self._vae.dtype)
            return self._codec.encode(inputs).latent_dist.mode().float() * self._scaling_factor

        size = Size(width=rgb.shape[3] // CELL_PIXELS, height=rgb.shape[2] // CELL_PIXELS)
        latents = torch.zeros((1, _LATENT_CHANNELS, size.height, size.width), device=self._vae.device)
        return self._filled(latents, net, rgb, size, check)

    @torch.no_grad()
    def decode(self, latents: Tensor, check: Callable[[], None]) -> Tensor:
        """Decode latents as `encode` gives them: (1, 3, height, width), 0 to 1, fp32, on the VAE's device.

        `check` is called before each tile.

        Raises:
            Stopped: or whatever else `check` raises.
        """

        def net(cells: Tensor) -> Tensor:
            inputs = (cells.to(self._vae.device) / self._scaling_factor).to(self._vae.dtype)
            return self._codec.decode(inputs).sample.float()

        size = Size(width=latents.shape[3], height=latents.shape[2])
        rgb = torch.zeros((1, 3, size.height * CELL_PIXELS, size.width * CELL_PIXELS), device=self._vae.device)
        return self._filled(rgb, net, latents, size, check).div_(2).add_(0.5).clamp_(0, 1)

    def _filled(self, canvas: Tensor, net: _Net, source: Tensor, size: Size, check: Callable[[], None]) -> Tensor:
        """Blend what `net` makes of each tile of `source` into `canvas`, which is 0; both are of `size` cells."""
        check()
        if max(size) <= self._tile_cells:
            return net(source)
        finer = canvas.shape[3] // size.width
        rows = _strips(size.height, self._tile_cells, finer, canvas.device)
        columns = _strips(size.width, self._tile_cells, finer, canvas.device)
        with _shared_statistics(self._vae):
            net(_miniature(source, size, self._tile_cells))
            for row, column in product(rows, columns):
                check()
                tile = net(source[:, :, *_area(row.cells, column.cells, source, size)])
                tile *= row.weights[:, None] * column.weights
                canvas[:, :, *_area(row.cells, column.cells, canvas, size)] += tile
        return canvas


def _area(row: Span, column: Span, tensor: Tensor, size: Size) -> tuple[slice, slice]:
    """Tell where a tile, given in cells, lies in a tensor that shows a canvas of `size` cells."""
    scale = tensor.shape[3] // size.width
    return slice(row.start * scale, row.stop * scale), slice(column.start * scale, column.stop * scale)


class _Strip(NamedTuple):
    """One axis of a tile."""

    cells: Span
    weights: Tensor
    """How much the tile counts along the axis: 0 in its halo; over all strips these sum to 1 everywhere."""


def _strips(length: int, tile: int, finer: int, device: torch.device) -> list[_Strip]:
    """Cover an axis of `length` cells with strips that are all of one length; each cell has `finer` weights."""
    halo = HALO_CELLS if length > tile else 0
    # Only what lies between the outermost halos is divided: at the ends of the axis a tile sees all that there is.
    axis, longest = Size(width=length - 2 * halo, height=1), Size(width=min(tile, length) - 2 * halo, height=1)
    inner = tiling(axis, longest, FEATHER_CELLS, feathered=True)
    ends = len(inner.columns) - 1
    strips: list[_Strip] = []
    for index, (span, weights) in enumerate(zip(inner.columns, inner.column_weights, strict=True)):
        whole = [float(index == 0)] * halo + [*weights] + [float(index == ends)] * halo
        # Between the middles of cells the weights change evenly, so that they go on summing to 1, and without steps.
        smooth = functional.interpolate(torch.tensor([[whole]], device=device), scale_factor=finer, mode="linear")
        strips.append(_Strip(Span(span.start, span.stop + 2 * halo), smooth[0, 0]))
    return strips


def _miniature(source: Tensor, size: Size, tile: int) -> Tensor:
    """Shrink a canvas of `size` cells to at most the area of a tile, keeping its mean and contrast.

    Statistics depend little on the scale of a picture, and much on which parts of it are looked at.
    """
    shrink = tile / math.sqrt(size.width * size.height)
    if shrink >= 1:
        return source
    height = max(int(size.height * shrink), 1)
    width = min(max(int(size.width * shrink), 1), tile**2 // height)
    scale = source.shape[3] // size.width
    # Neighbouring latents differ as if by noise, which an average would take away; in pixels it is the other way round.
    mode = "area" if scale > 1 else "nearest"
    small = functional.interpolate(source, (height * scale, width * scale), mode=mode)
    variance, mean = torch.var_mean(source, dim=(2, 3), correction=0, keepdim=True)
    variance_left, mean_left = torch.var_mean(small, dim=(2, 3), correction=0, keepdim=True)
    # Where averaging left next to nothing, there is nothing to restore.
    contrast = (variance / variance_left.clamp(min=1e-12)).sqrt_().clamp_(max=_MOST_CONTRAST)
    return (small - mean_left) * contrast + mean


@contextmanager
def _shared_statistics(module: nn.Module) -> Generator[None]:
    """Let the group norms of `module` take their statistics from what first goes through, and keep them meanwhile.

    The norms are exchanged, not hooked: compiled code notices another module and passes over new hooks.
    """
    norms: Sequence[tuple[nn.Module, str, nn.GroupNorm]] = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.GroupNorm)
    ]
    try:
        for parent, name, norm in norms:
            parent.register_module(name, _SharedNorm(norm))
        yield
    finally:
        for parent, name, norm in norms:
            parent.register_module(name, norm)


class _SharedNorm(nn.Module):
    """A group norm that measures what it sees first, and keeps to that."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self._groups, self._eps = norm.num_groups, norm.eps
        self._weight, self._bias = norm.weight.float(), norm.bias.float()
        self._statistics: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (batch, channels, …) in its own dtype; the statistics are fp32."""
        if self._statistics is None:
            self._statistics = self._measured(x)
        # Given a mean and a variance for each channel, this is what a batch norm does after training, in one kernel.
        mean, variance = self._statistics
        return functional.batch_norm(x, mean, variance, self._weight, self._bias, training=False, eps=self._eps)

    def _measured(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give the mean and the variance of each channel's group over all positions; the batch is one picture."""
        variance, mean = torch.var_mean(x[0].float().reshape(self._groups, -1), dim=1, correction=0)
        channels = x.shape[1] // self._groups
        return mean.repeat_interleave(channels), variance.repeat_interleave(channels)
