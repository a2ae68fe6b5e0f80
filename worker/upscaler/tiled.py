"""The denoised estimate of a canvas of any size, from networks that look at one tile at a time."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from worker.upscaler.plan import CELL_PIXELS, Size, Span, Tiling, balanced_batch, spans
from worker.upscaler.prompts import Conditioning
from worker.upscaler.schedules import timestep

_CONTROL_DECAY = 0.825
"""What a residual counts, relative to the next deeper one: the prompt decides more about detail than about layout."""

HINT_TILE = Size(width=128, height=128)
"""Cells of the hint that are encoded at once: less memory than one tile takes in the UNet."""

_HINT_MARGIN_CELLS = 3
"""What the hint encoder sees around a cell, in whole cells: its eight 3 × 3 convolutions reach 23 pixels."""


class TiledDenoiser:
    """Estimate what a noisy canvas shows, with one prediction of the noise averaged over tiles (arXiv:2302.08113).

    The canvas may be of any size: what is done and held for a batch of tiles does not depend on it. Each call of a
    network has the same shapes. Everything but the choice of tiles stays on the UNet's device.
    """

    def __init__(
        self,
        unet: nn.Module,
        controlnet: nn.Module,
        tiling: Tiling,
        conditioning: Conditioning,
        features: Tensor | None,
        *,
        control_scale: float,
        guidance_scale: float,
        batch: int,
        check: Callable[[], None],
    ) -> None:
        """Prepare for many calls on one canvas.

        `tiling` is in cells. `features` are the whole canvas's `hint_features`, for a ControlNet whose encoder is
        split off; without them, or at a `control_scale` of 0, it is not called. Up to a `guidance_scale` of 1 the
        negative prompt is not looked at. At most `batch` tiles go through the networks together, each once per prompt.
        `check` is called before each batch.
        """
        weights = next(unet.parameters())
        guided = guidance_scale > 1
        prompts = (conditioning.positive, conditioning.negative) if guided else (conditioning.positive,)
        self._unet, self._controlnet, self._check = unet, controlnet, check
        self._features = features if control_scale else None
        self._control_scale = control_scale
        self._guidance_scale = guidance_scale if guided else None
        self._prompts = len(prompts)
        self._dtype = weights.dtype
        self._batch = balanced_batch(tiling.count, batch)
        self._context = torch.cat([prompt.expand(self._batch, -1, -1) for prompt in prompts]).to(weights)
        self._tiles = _tiles(tiling, weights.device)

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """Estimate the picture under noise of the standard deviation `sigma`.

        `x` is the picture plus the noise, (1, 4, height, width) in cells, fp32; so is the estimate.

        Raises:
            Stopped: or whatever else `check` raises.
        """
        inputs = (x / math.sqrt(sigma**2 + 1)).to(self._dtype)
        time = torch.full((len(self._context),), timestep(sigma), device=x.device)
        noise = x.new_zeros((self._prompts, *x.shape[1:]))
        for first in range(0, len(self._tiles), self._batch):
            self._check()
            tiles = self._tiles[first : first + self._batch]
            # The batch may be longer than its tiles: what was repeated to fill it falls away here.
            for tile, prediction in zip(tiles, self._predicted(tiles, inputs, time), strict=False):
                noise[:, :, *tile.area].addcmul_(prediction, tile.weights)
        return x - sigma * self._guided(noise)

    def _predicted(self, tiles: Sequence["_Tile"], inputs: Tensor, time: Tensor) -> Tensor:
        """Predict the noise: (batch, prompts, 4, height, width) of a tile, fp32."""
        latents = self._gathered(inputs, tiles)
        residuals: dict[str, Tensor | Sequence[Tensor]] = {}
        if self._features is not None:
            down, middle = self._controlnet(
                latents,
                time,
                self._context,
                controlnet_cond=self._gathered(self._features, tiles),
                # Not guess_mode, whose weights are others.
                conditioning_scale=1.0,
                guess_mode=False,
                return_dict=False,
            )
            *down, middle = _scaled((*down, middle), self._control_scale)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        prediction: Tensor = self._unet(latents, time, self._context, **residuals, return_dict=False)[0]
        return prediction.float().view(self._prompts, self._batch, *prediction.shape[1:]).transpose(0, 1)

    def _gathered(self, canvas: Tensor, tiles: Sequence["_Tile"]) -> Tensor:
        """Cut the tiles out, fill the batch up with the last one, and repeat it for each prompt."""
        filled = [*tiles, *[tiles[-1]] * (self._batch - len(tiles))]
        cut = torch.cat([canvas[:, :, *tile.area] for tile in filled] * self._prompts)
        return cut.contiguous(memory_format=torch.channels_last)

    def _guided(self, noise: Tensor) -> Tensor:
        """Move from the negative prompt's prediction past the positive one's (classifier-free guidance)."""
        if self._guidance_scale is None:
            return noise
        positive, negative = noise.chunk(2)
        return negative + self._guidance_scale * (positive - negative)


class _Tile(NamedTuple):
    area: tuple[slice, slice]
    weights: Tensor
    """(height, width)."""


def _tiles(tiling: Tiling, device: torch.device) -> list[_Tile]:
    down = torch.tensor(tiling.row_weights, device=device)
    across = torch.tensor(tiling.column_weights, device=device)
    return [
        _Tile((slice(*row), slice(*column)), row_weights[:, None] * column_weights)
        for (row, row_weights), (column, column_weights) in product(
            zip(tiling.rows, down, strict=True), zip(tiling.columns, across, strict=True)
        )
    ]


def _scaled(residuals: Sequence[Tensor], scale: float) -> list[Tensor]:
    """Weigh the ControlNet's residuals, given from the first to the deepest."""
    deepest = len(residuals) - 1
    return [residual * (scale * _CONTROL_DECAY ** (deepest - depth)) for depth, residual in enumerate(residuals)]


def split_hint_encoder(controlnet: nn.Module) -> nn.Module:
    """Take the hint's encoder out of a ControlNet, which henceforth wants features where it wanted a picture."""
    encoder = controlnet.get_submodule("controlnet_cond_embedding")
    controlnet.register_module("controlnet_cond_embedding", nn.Identity())
    return encoder


@torch.no_grad()
def hint_features(encoder: nn.Module, hint: Tensor, check: Callable[[], None], *, tile: Size = HINT_TILE) -> Tensor:
    """Encode the picture that a ControlNet holds the result to.

    `hint` is (1, 3, height, width), 0 to 1, in whole cells, on any device. The features are (1, channels, height,
    width) in cells, on the encoder's device in its dtype: what encoding all at once would give, whatever the size of
    `tile`, which is in cells, too. `check` is called before each tile.

    Raises:
        Stopped: or whatever else `check` raises.
    """
    last = cast("nn.Conv2d", encoder.get_submodule("conv_out"))
    area = Size(width=hint.shape[3] // CELL_PIXELS, height=hint.shape[2] // CELL_PIXELS)
    features = last.weight.new_empty((1, last.out_channels, area.height, area.width))
    for row, column in product(spans(area.height, tile.height), spans(area.width, tile.width)):
        check()
        field = row.grown(_HINT_MARGIN_CELLS, area.height), column.grown(_HINT_MARGIN_CELLS, area.width)
        pixels = hint[:, :, *map(_pixels, field)].to(last.weight, memory_format=torch.channels_last)
        inner = row.within(field[0]), column.within(field[1])
        features[:, :, slice(*row), slice(*column)] = encoder(pixels)[:, :, *inner]
    return features


def _pixels(cells: Span) -> slice:
    return slice(cells.start * CELL_PIXELS, cells.stop * CELL_PIXELS)
