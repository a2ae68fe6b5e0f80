"""Stable Diffusion 1.5 with few channels and random weights: the real geometry and layout of files, quick on a CPU."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import diffusers
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

# With so little to do, threads only wait for each other: minutes instead of seconds where processors are shared.
torch.set_num_threads(1)

CONTEXT_WIDTH = 32
"""Channels of the text encoder's output."""

HINT_CHANNELS = 8
"""Channels of the ControlNet's encoded hint, and of its first block."""

_SHAPE: dict[str, Any] = {
    "block_out_channels": (HINT_CHANNELS, 16, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": CONTEXT_WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


@dataclass(frozen=True, slots=True)
class Components:
    """What weights are made of; everything fp32, in evaluation mode and without gradients."""

    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer


def components(seed: int = 0) -> Components:
    """Build all networks; the same seed gives the same weights, and the global random state is left alone.

    The UNet predicts noise of about unit variance from such an input, and the hint has a visible effect.
    """
    with _seeded(seed):
        tokenizer = _tokenizer()
        return Components(_unet(), _controlnet(), _vae(), _text_encoder(tokenizer), tokenizer)


def save(folder: Path, seed: int = 0) -> None:
    """Write `components(seed)` as folders of diffusers: `base` (a whole pipeline), `controlnet` and `vae`."""
    tiny = components(seed)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    base: dict[str, _Saves] = {
        "unet": tiny.unet,
        "vae": tiny.vae,
        "text_encoder": tiny.text_encoder,
        "tokenizer": tiny.tokenizer,
        "scheduler": scheduler,
    }
    for name, part in base.items():
        part.save_pretrained(folder / "base" / name)
    # Published weights have the tokenizer's older form, in two files.
    (folder / "base" / "tokenizer" / "tokenizer.json").unlink()
    tiny.tokenizer.backend_tokenizer.model.save(str(folder / "base" / "tokenizer"))
    index = {name: [type(part).__module__.split(".", 1)[0], type(part).__name__] for name, part in base.items()}
    about = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    without = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    (folder / "base" / "model_index.json").write_text(json.dumps(about | index | without, indent=2), encoding="utf-8")
    others: dict[str, _Saves] = {"controlnet": tiny.controlnet, "vae": tiny.vae}
    for name, part in others.items():
        part.save_pretrained(folder / name)


Module = TypeVar("Module", bound=nn.Module)


class _Saves(Protocol):
    """Writes itself into a folder; weights as safetensors."""

    def save_pretrained(self, save_directory: Path, /) -> object: ...


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(
        **_SHAPE,
        sample_size=64,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    # An untrained network's answers are too weak by this much.
    unet.conv_out.weight.data.mul_(3.5)
    return _frozen(unet)


def _controlnet() -> ControlNetModel:
    controlnet = ControlNetModel(**_SHAPE, conditioning_embedding_out_channels=(16, 16, 16, 32))
    # Untrained, most of these are zero or next to it, and the hint would not matter.
    for part in ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"):
        for layer in controlnet.get_submodule(part).modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
    return _frozen(controlnet)


def _vae() -> AutoencoderKL:
    shape: dict[str, Any] = {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return _frozen(AutoencoderKL(**shape))


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CONTEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=cast("int", tokenizer.bos_token_id),
        eos_token_id=cast("int", tokenizer.eos_token_id),
        pad_token_id=cast("int", tokenizer.pad_token_id),
    )
    return _frozen(CLIPTextModel(config))


def _tokenizer() -> CLIPTokenizer:
    """Build a vocabulary of all bytes, alone and at the end of a word, and of the word "the": any text has tokens."""
    letters = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e</w>")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge) for merge in merges)]
    vocabulary = {word: token for token, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    # By these names: transformers 5 takes vocab_file and merges_file without a word and ignores them.
    return CLIPTokenizer(vocab=vocabulary, merges=cast("list[str]", merges), model_max_length=77)


def _frozen(module: Module) -> Module:
    return module.eval().requires_grad_(requires_grad=False)
