"""Stable Diffusion 1.5, its ControlNet and its VAE with random weights: what is computed does not depend on them."""

from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from worker.upscaler.components import Components, settle
from worker.upscaler.tiled import split_hint_encoder

_UNET: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
}


def components(device: torch.device, dtype: torch.dtype) -> Components:
    """Build networks of the real size, 1.4 billion weights, at random but always the same on one device."""
    torch.default_generator.manual_seed(0)
    tokenizer = _tokenizer()
    with device:
        up_blocks = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
        unet = UNet2DConditionModel(**_UNET, sample_size=64, up_block_types=up_blocks)
        controlnet = ControlNetModel(**_UNET)
        vae = AutoencoderKL(**_VAE)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                bos_token_id=cast("int", tokenizer.bos_token_id),
                eos_token_id=cast("int", tokenizer.eos_token_id),
            )
        )
    for name, weight in controlnet.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")):
            # Zero, as they are before training, the way to the UNet would show no fault.
            nn.init.normal_(weight, std=0.02)
    for network in (unet, controlnet, vae, text_encoder):
        kept = torch.float32 if network is vae and dtype is torch.float16 else dtype
        settle(nn.Module.to(network, kept), device)
    return Components(
        unet=unet,
        controlnet=controlnet,
        hint_encoder=split_hint_encoder(controlnet),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
    )


def _tokenizer() -> CLIPTokenizer:
    """Build a vocabulary of all bytes, alone and at the end of a word: any text has tokens."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: token for token, word in enumerate(words)}, merges=[], model_max_length=77)
