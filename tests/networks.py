"""Small super-resolution networks with random weights, of the real architectures."""

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor

from worker.upscaler.checkpoints import import_spandrel

Weights = dict[str, Tensor]

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "DAT": {"img_size": 16, "embed_dim": 32, "depth": [1], "num_heads": [2], "split_size": [4, 4], "upscale": 2},
    "HAT": {"img_size": 16, "embed_dim": 12, "depths": [1], "num_heads": [2], "window_size": 4, "upscale": 2}
    | {"upsampler": "pixelshuffle", "num_feat": 8, "compress_ratio": 3, "squeeze_factor": 3},
    "OmniSR": {"num_feat": 8, "res_num": 1, "block_num": 1, "up_scale": 2, "window_size": 4},
    "PLKSR": {"dim": 8, "n_blocks": 1, "upscaling_factor": 2, "kernel_size": 5},
    "RCAN": {"n_feats": 8, "n_resgroups": 1, "n_resblocks": 1, "reduction": 4, "scale": 2},
    "SPAN": {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 8, "upscale": 2},
    "Swin2SR": {"img_size": 16, "embed_dim": 12, "depths": [1], "num_heads": [2], "window_size": 4, "upscale": 2}
    | {"upsampler": "pixelshuffledirect"},
    "SwinIR": {"img_size": 16, "embed_dim": 12, "depths": [1], "num_heads": [2], "window_size": 4, "upscale": 2}
    | {"upsampler": "pixelshuffledirect"},
}
"""How to make a small one that enlarges by 2."""


def compact(scale: int, channels: int = 3, *, random: bool = False, slope: float = 0.25) -> Weights:
    """Weights of a small SRVGGNetCompact, whose pixels look three far; when they are all 0 it repeats pixels."""
    draw = torch.Generator().manual_seed(scale)

    def weigh(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) * 0.1 if random else torch.zeros(shape)

    convolutions = [(6, channels), (6, 6), (channels * scale**2, 6)]
    weights: Weights = {}
    for index, (into, of) in enumerate(convolutions):
        weights[f"body.{2 * index}.weight"] = weigh(into, of, 3, 3)
        weights[f"body.{2 * index}.bias"] = weigh(into)
        weights[f"body.{2 * index + 1}.weight"] = torch.full((into,), slope)
    del weights["body.5.weight"]
    return weights


def rrdb(scale: int, *, unshuffle: int = 1) -> Weights:
    """Weights of a small Real-ESRGAN network: one residual block, four features."""
    draw = torch.Generator().manual_seed(scale)
    shapes = {"conv_first": (4, 3 * unshuffle**2), "conv_body": (4, 4), "conv_hr": (4, 4), "conv_last": (3, 4)}
    for index in range(1, (scale * unshuffle).bit_length()):
        shapes[f"conv_up{index}"] = (4, 4)
    for dense in (1, 2, 3):
        for index in range(5):
            shapes[f"body.0.rdb{dense}.conv{index + 1}"] = (4 if index == 4 else 32, 4 + 32 * index)
    weights: Weights = {}
    for name, (into, of) in shapes.items():
        weights[f"{name}.weight"] = torch.randn((into, of, 3, 3), generator=draw) * 0.2
        weights[f"{name}.bias"] = torch.randn((into,), generator=draw) * 0.1
    return weights


def architecture(name: str) -> Weights:
    """Weights of one of the `ARCHITECTURES`, as its authors begin with."""
    import_spandrel()
    module = importlib.import_module(f"spandrel.architectures.{name}")
    with torch.random.fork_rng():  # pyright: ignore[reportUnknownMemberType]
        torch.manual_seed(0)  # pyright: ignore[reportUnknownMemberType]
        network = getattr(module, name)(**ARCHITECTURES[name])
    return {key: values.clone() for key, values in network.state_dict().items()}


def save_own(folder: Path) -> None:
    """Put stand-ins there for our own networks: those of fidelity repeat pixels, those of restore are random."""
    for variant in ("fidelity", "restore"):
        for scale in (2, 4):
            weights = compact(scale, random=variant == "restore")
            save_file(
                {name: values.half() for name, values in weights.items()}, folder / f"{variant}-x{scale}.safetensors"
            )
