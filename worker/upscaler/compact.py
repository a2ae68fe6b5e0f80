"""SRVGGNetCompact, the architecture of our own networks: run in strips, without a pixel of overlap."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from worker.upscaler.picture import Levels
from worker.upscaler.plan import Size, Span
from worker.upscaler.strips import Rows

STRIP_PIXELS = 1 << 16
"""Pixels of the input in a strip: its features stay in a processor's cache."""

GPU_STRIP_PIXELS = 1 << 20
"""The same on a GPU, which small strips would keep waiting."""

MIN_STRIP_ROWS = 8


class Compact:
    """A stack of convolutions of 3 × 3 with a PReLU between each two; what it gives is added to the repeated pixels.

    The convolutions run in `dtype`, the sum in float32: bfloat16 has 8 bits, too few for smooth skies.
    """

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
        """Take `weights` named as in the original: body.0.weight, body.0.bias, body.1.weight, …"""
        self.device, self.dtype = device, dtype
        count = 1 + max(int(name.split(".")[1]) for name in weights)
        parts = {name: values.float() for name, values in weights.items()}
        for index in range(1, count, 2):
            _make_gentle(parts, index)
        self.convolutions = [
            (self._settled(parts[f"body.{index}.weight"]), self._settled(parts[f"body.{index}.bias"]))
            for index in range(0, count, 2)
        ]
        self.slopes = [self._settled(parts[f"body.{index}.weight"])[:, None, None] for index in range(1, count, 2)]
        self.scale = round((len(self.convolutions[-1][1]) / 3) ** 0.5)

    def _settled(self, values: Tensor) -> Tensor:
        layout = torch.channels_last if values.ndim == 4 else torch.contiguous_format
        return values.to(self.device, self.dtype).contiguous(memory_format=layout)

    def enlarge(
        self, rows: Rows, check: Callable[[], None], on_progress: Callable[[float], None], *, small: bool = False
    ) -> Iterator[Levels]:
        """Enlarge as `superres.Network` says, to what the network gives for the picture as a whole."""
        height = rows.size.height
        delay = len(self.convolutions)
        count = self._strip_rows(rows.size, small=small)
        features = _Features(self, rows.size, count)
        for top in range(0, height + delay, count):
            check()
            known = Span(min(max(top - delay, 0), height), min(max(top + count - delay, 0), height))
            fresh = Span(min(top, height), min(top + count, height))
            window = rows.read(Span(known.start, fresh.stop))
            residue = features.advance(top, window[fresh.within(known)])
            if known.stop > known.start:
                first = known.start - (top - delay)
                found = residue[first : first + known.stop - known.start]
                yield _levels(found, window[: len(found)], self.scale)
            on_progress(min((top + count) / (height + delay), 1.0))

    def peak_bytes(self, width: int, *, small: bool = False) -> int:
        """Tell how much memory a picture of that width takes at most, beside itself and a strip of the output."""
        rows = self._strip_rows(Size(width=width, height=1 << 30), small=small)
        if self.device.type == "cuda":  # its memory is its own: here are the strips alone, and copies on their way
            return width * rows * 6 * (1 + self.scale**2)
        channels = [weight.shape[1] for weight, _ in self.convolutions]
        # Two rows of what goes into each layer are kept, and between two layers lie what goes in, what comes out, that
        # times the slopes, and what the convolution itself takes.
        values = 2 * sum(channels) + max(channels) * (4 * rows + 2)
        # At the end come the last layer, that and its sum with the picture in float32, and the levels.
        output = 3 * rows * self.scale**2 * (self.dtype.itemsize + 4 + 4 + 1)
        return width * (values * self.dtype.itemsize + output)

    def _strip_rows(self, size: Size, *, small: bool) -> int:
        """Tell how many rows make a strip: the picture and the delay are cut into equal ones."""
        pixels = (STRIP_PIXELS if self.device.type == "cpu" else GPU_STRIP_PIXELS) // (2 if small else 1)
        most = max(pixels // size.width, MIN_STRIP_ROWS)
        total = size.height + len(self.convolutions)
        return -(-total // -(-total // most))


class _Features:
    """What lies between the layers. Each lags one row behind the layer before it, and keeps two rows of that."""

    def __init__(self, network: Compact, size: Size, count: int) -> None:
        self._network = network
        self._size = size
        self._count = count
        widest = max(len(bias) for _, bias in network.convolutions[:-1])
        self._input = self._zeros(network.convolutions[0][0].shape[1], count + 2)
        self._between = self._zeros(widest, count + 2)
        self._kept = [self._zeros(weight.shape[1], 2) for weight, _ in network.convolutions]

    def _zeros(self, channels: int, rows: int) -> Tensor:
        shape = (1, channels, rows, self._size.width)
        zeros = torch.zeros(shape, device=self._network.device, dtype=self._network.dtype)
        return zeros.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def advance(self, top: int, levels: Levels) -> Tensor:
        """Push the next strip, rows from `top` on, through all layers.

        Returns (rows, width, channels) of the last layer, for the rows from `top` less the number of layers on. What
        lies outside the picture is 0 in every layer, as it was in training: at the edges our own networks come closer
        to photographs so, by 0.2 or 0.3 dB, than with the picture mirrored there.
        """
        network, count = self._network, self._count
        features = self._input
        features[:, :, 2:].zero_()
        if len(levels):
            fractions = torch.tensor(levels, device=network.device).permute(2, 0, 1).float() / 255
            features[0, :, 2 : 2 + len(levels)] = fractions
        for layer, (weight, bias) in enumerate(network.convolutions):
            features[:, :, :2] = self._kept[layer]
            self._kept[layer].copy_(features[:, :, -2:])
            made = functional.conv2d(features, weight, bias, padding=(0, 1))
            if layer == len(network.slopes):
                return made[0].permute(1, 2, 0)
            features = self._between
            torch.maximum(made, made * network.slopes[layer], out=features[:, :, 2:])
            begin = top - layer - 1
            if begin < 0:
                features[:, :, 2 : 2 - begin].zero_()
            if begin + count > self._size.height:
                features[:, :, 2 + max(self._size.height - begin, 0) :].zero_()
        raise AssertionError("The last layer is a convolution.")


def _make_gentle(parts: dict[str, Tensor], index: int) -> None:
    """Rewrite a PReLU and the convolutions around it so that no slope is more than 1, and the network stays the same.

    Up to there PReLU is max(x, slope · x), which takes a sixth of the time. For a greater slope it is what -x gives
    with the slope's inverse, times minus the slope.
    """
    slopes = parts[f"body.{index}.weight"]
    steep = slopes > 1
    signs, factors = torch.where(steep, -1.0, 1.0), torch.where(steep, -slopes, 1.0)
    parts[f"body.{index}.weight"] = torch.where(steep, 1 / slopes, slopes)
    parts[f"body.{index - 1}.weight"] = parts[f"body.{index - 1}.weight"] * signs[:, None, None, None]
    parts[f"body.{index - 1}.bias"] = parts[f"body.{index - 1}.bias"] * signs
    parts[f"body.{index + 1}.weight"] = parts[f"body.{index + 1}.weight"] * factors[:, None, None]


@torch.inference_mode()
def _levels(residue: Tensor, repeated: Levels, scale: int) -> Levels:
    """Add the network's planes, which lie behind each other, to each pixel of the input."""
    height, width = repeated.shape[:2]
    base = torch.tensor(repeated, device=residue.device).float()[:, None, :, None]
    planes = (residue.float() * 255).reshape(height, width, 3, scale, scale).permute(0, 3, 1, 4, 2)
    output = torch.empty((height, scale, width, scale, 3), device=residue.device)
    torch.add(planes, base, out=output)
    levels = output.clamp_(0, 255).round_().to(torch.uint8)
    return np.asarray(levels.reshape(height * scale, width * scale, 3).cpu())
