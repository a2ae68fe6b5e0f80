"""The architecture, and how a network of it begins.

SRVGGNetCompact (Wang et al., Real-ESRGAN, 2021; spandrel knows it as Compact): 3 × 3 convolutions at the size of the
input, with parametric rectifiers between them, of whose last one the pixels of the output are shuffled; what it says
is added to the input, enlarged by its nearest neighbours. Nothing but plain convolutions: processors do them best.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.upscaler.checkpoints import import_spandrel

FEATURES = 48
CONVOLUTIONS = 16

_NOISE = 0.3
"""How strong the noise is that an inner convolution begins with, of Kaiming's."""

_LAST = 0.1
"""The same of the last convolution, of PyTorch's: so the first output is little more than the nearest neighbours."""


def make(scale: int, seed: int) -> Any:
    """Make a network that begins near nearest-neighbour enlargement.

    Each inner convolution begins as the identity and a little noise. Measured over 600 steps: 1.8 dB over bicubic,
    where one that begins with noise alone, as PyTorch has it, was still 1.1 dB below.
    """
    import_spandrel()
    architecture: Any = importlib.import_module("spandrel.architectures.Compact")
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    model: Any = architecture.Compact(num_feat=FEATURES, num_conv=CONVOLUTIONS, upscale=scale)
    convolutions: list[Any] = [layer for layer in model.body if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        for layer in convolutions:
            layer.bias.zero_()
        for layer in convolutions[1:-1]:
            nn.init.kaiming_normal_(layer.weight, a=0.25)
            layer.weight.mul_(_NOISE)
            layer.weight[:, :, 1, 1] += torch.eye(FEATURES)
        convolutions[-1].weight.mul_(_LAST)
    return model.to(memory_format=torch.channels_last)


def forward(model: Any, low: Tensor) -> Tensor:
    """Enlarge (count, 3, height, width), 0 to 1: the convolutions in bfloat16, the sum with the input in float32."""
    features = low.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in model.body:
            features = layer(features)
    base = functional.interpolate(low, scale_factor=float(model.upscale), mode="nearest")
    return base + functional.pixel_shuffle(features.to(torch.float32), model.upscale)


def grow(state: Mapping[str, Tensor], scale: int) -> dict[str, Tensor]:
    """Give the weights of a network the last layer that `scale` needs, a multiple of their own.

    Each output of the old layer becomes a square of equal ones, so that the picture is the same, its pixels enlarged.
    """
    last = max(int(name.split(".")[1]) for name in state)
    grown = dict(state)
    for name in (f"body.{last}.weight", f"body.{last}.bias"):
        values = state[name]
        before, rest = round((len(values) / 3) ** 0.5), values.shape[1:]
        ratio = scale // before
        square = values.reshape(3, before, before, *rest).repeat_interleave(ratio, 1).repeat_interleave(ratio, 2)
        grown[name] = square.reshape(3 * scale**2, *rest)
    return grown
