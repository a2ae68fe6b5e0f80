"""The same pictures as diffusers' own pipeline where it can do the same: one tile, Euler, a plain prompt."""

from typing import Any, cast

import pytest
import torch
from diffusers.pipelines.controlnet.pipeline_controlnet_img2img import StableDiffusionControlNetImg2ImgPipeline
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from torch import Tensor

from core.options import Sampler
from tests import tiny
from worker.upscaler import tiled
from worker.upscaler.plan import Size, tiling
from worker.upscaler.prompts import PromptEncoder
from worker.upscaler.samplers import Noise, sample
from worker.upscaler.tiled import TiledDenoiser, hint_features, split_hint_encoder
from worker.upscaler.vae import TiledVae

SEED, GUIDANCE, CONTROL = 3, 5.0, 0.8
PROMPT, NEGATIVE = "a cat in the grass", "blur"


def _check() -> None:
    pass


def _theirs(latents: Tensor, hint: Tensor) -> tuple[Tensor, list[float]]:
    """Return the picture, 0 to 1, and the noise levels that led to it."""
    parts = tiny.components()
    scheduler: Any = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    # What it is not given it takes for granted, and its types say otherwise.
    pipe: Any = cast("Any", StableDiffusionControlNetImg2ImgPipeline)(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        controlnet=parts.controlnet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=latents,
        control_image=hint,
        strength=0.5,
        num_inference_steps=10,
        guidance_scale=GUIDANCE,
        controlnet_conditioning_scale=CONTROL,
        generator=torch.Generator().manual_seed(SEED),
        output_type="pt",
    ).images
    return picture, scheduler.sigmas.tolist()[-6:]


@torch.no_grad()
def _ours(latents: Tensor, hint: Tensor, sigmas: list[float]) -> Tensor:
    parts = tiny.components()
    encoder = split_hint_encoder(parts.controlnet)
    size = Size(width=latents.shape[3], height=latents.shape[2])
    denoiser = TiledDenoiser(
        parts.unet,
        parts.controlnet,
        tiling(size, size, 16, feathered=True),
        PromptEncoder(parts.tokenizer, parts.text_encoder, {}).encode(PROMPT, NEGATIVE),
        hint_features(encoder, hint, _check),
        control_scale=CONTROL,
        guidance_scale=GUIDANCE,
        batch=1,
        check=_check,
    )
    noise = Noise(SEED, tuple(latents.shape), latents.device)
    denoised = sample(Sampler.EULER, denoiser, latents + sigmas[0] * noise(), sigmas, noise)
    return TiledVae(parts.vae).decode(denoised, _check)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
def test_one_tile_gives_the_picture_that_diffusers_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "_CONTROL_DECAY", 1.0)  # there all residuals count alike
    generator = torch.Generator().manual_seed(1)
    rgb, hint = (torch.rand(1, 3, 128, 192, generator=generator) for _ in range(2))
    latents = TiledVae(tiny.components().vae).encode(rgb, _check)
    theirs, sigmas = _theirs(latents, hint)
    ours = _ours(latents, hint, sigmas)
    assert theirs.std() > 0.01
    assert (ours - theirs).abs().max() < 1e-4
