"""What only a GPU can show: `.venv/bin/pytest tests/gpu` on a machine that has one."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from core.options import Sampler, UpscaleOptions
from tests import tiny
from worker.upscaler.engines import Config, clarity
from worker.upscaler.picture import Picture
from worker.upscaler.plan import Size, tiling
from worker.upscaler.prompts import Conditioning
from worker.upscaler.samplers import Noise, sample
from worker.upscaler.schedules import sigmas
from worker.upscaler.tiled import TiledDenoiser

CUDA = torch.device("cuda")
LEVELS = sigmas(Sampler.DPMPP_3M_SDE, UpscaleOptions().spacing, 18, 0.35)
OPTIONS = UpscaleOptions(steps=6, tile_width=32, tile_height=32, seed=5)


@contextmanager
def _never_waiting() -> Generator[None]:
    """Fail whatever waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.save(folder)
    return folder


def _picture(side: int) -> Picture:
    return Picture(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    """Denoise data that is normal with deviation 0.5."""
    return x * (0.25 / (0.25 + sigma**2))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("sampler", Sampler)
def test_the_sampler_s_loop_never_waits_and_gives_what_the_cpu_gives(sampler: Sampler) -> None:
    shape = (1, 4, 256, 256)
    with _never_waiting():
        noise = Noise(9, shape, CUDA)
        on_gpu = sample(sampler, _gaussian, noise(), LEVELS, noise)
    noise = Noise(9, shape, torch.device("cpu"))
    assert torch.allclose(on_gpu.cpu(), sample(sampler, _gaussian, noise(), LEVELS, noise), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_the_denoiser_s_loop_never_waits(models: Path) -> None:
    parts = clarity.load(Config(models_dir=models, precision="fp32")).parts
    layout = tiling(Size(width=80, height=80), Size(width=32, height=32), 16, feathered=True)
    context = torch.zeros(1, 77, tiny.CONTEXT_WIDTH, device=CUDA)
    features = torch.zeros(1, tiny.HINT_CHANNELS, 80, 80, device=CUDA)
    denoiser = TiledDenoiser(
        *(parts.unet, parts.controlnet, layout, Conditioning(context, context), features),
        control_scale=0.6,
        guidance_scale=6.0,
        batch=4,
        check=lambda: None,
    )
    x = torch.zeros(1, 4, 80, 80, device=CUDA)
    denoiser(x, 1.0)
    with _never_waiting():
        denoised = denoiser(x, 0.5)
    assert bool(denoised.isfinite().all())


def test_a_seed_gives_the_same_picture_on_gpu_and_cpu(models: Path) -> None:
    pictures = [
        next(
            clarity.load(Config(models_dir=models, device=device, precision="fp32")).upscale(
                _picture(64), OPTIONS, lambda _: None, lambda: False
            )
        )
        for device in ("cuda", "cpu")
    ]
    difference = np.abs(pictures[0].rgb.astype(int) - pictures[1].rgb.astype(int))
    assert np.quantile(difference, 0.999) <= 2


def test_memory_grows_with_the_canvas_by_no_more_than_a_few_canvases(models: Path) -> None:
    engine = clarity.load(Config(models_dir=models, precision="fp32", clarity_batch=1))
    peaks: list[int] = []
    for side in (256, 512):
        torch.cuda.reset_peak_memory_stats()
        list(engine.upscale(_picture(side), OPTIONS, lambda _: None, lambda: False))
        peaks.append(torch.cuda.max_memory_allocated())
    pixels = (2 * 512) ** 2 - (2 * 256) ** 2
    assert peaks[1] - peaks[0] < 200 * pixels
