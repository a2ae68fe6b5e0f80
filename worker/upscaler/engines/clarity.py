"""The Clarity engine: enlarge, add noise, take it out again tile by tile under a tile ControlNet; in passes of 2×."""

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from core.errors import OutOfMemory, Stopped
from core.options import UpscaleOptions
from worker.upscaler import components, schedules, superres, weights
from worker.upscaler.colour import restore_colours, sharpen
from worker.upscaler.components import Components
from worker.upscaler.engine import Levels, Picture
from worker.upscaler.engines import Config
from worker.upscaler.loras import Loras
from worker.upscaler.plan import CELL_PIXELS, PRESETS, Pass, Size, Tiling, balanced_batch, passes, tiling
from worker.upscaler.prompts import Conditioning, PromptEncoder, extract_loras, load_embeddings
from worker.upscaler.resampling import resample_alpha
from worker.upscaler.samplers import Noise, count_evaluations, sample
from worker.upscaler.superres import Network
from worker.upscaler.tiled import TiledDenoiser, hint_features
from worker.upscaler.vae import TiledVae

MAX_BATCH = 8
"""Tiles that go through the networks together at most: by then a device is full."""

MEMORY_SHARE = 0.8
"""How much of the free memory a batch may take, by what one tile took."""

VAE_TILE_PIXELS = 1024

Denoise: TypeAlias = Callable[[Tensor, float], Tensor]

ENCODED, DENOISED = 0.05, 0.9
"""How far a pass has come once its picture is encoded, and once its noise is gone."""

logger = logging.getLogger(__name__)


def load(config: Config) -> "Clarity":
    """Read the weights and warm up.

    Raises:
        DeploymentError: weights are missing or unfit; the sentence names the command that fetches them.
    """
    parts = components.load(
        config.models_dir, checkpoint=config.clarity_checkpoint, device=config.device, precision=config.precision
    )
    engine = Clarity(parts, _load_network(config, parts.device), config)
    engine.warm_up()
    return engine


def _load_network(config: Config, device: torch.device) -> Network | None:
    file = Path(config.superres_weights) if config.superres_weights else weights.preupscaler(config.models_dir)
    if file is None:
        logger.warning("No pre-upscaling network is installed: Lanczos enlarges pictures before diffusion.")
        return None
    return superres.load(file, device)


@dataclass(frozen=True)
class _Job:
    """What is the same in all passes of one job."""

    options: UpscaleOptions
    conditioning: Conditioning
    vae: TiledVae
    check: Callable[[], None]
    """Raises Stopped when the job is unwanted."""
    progress: "_Progress"


class Clarity:
    """Diffusion under a tile ControlNet. Networks stay as they are loaded, but for the LoRAs that a job asks for."""

    name = "clarity"

    def __init__(self, parts: Components, network: Network | None, config: Config) -> None:
        self.parts = parts
        self._network = network
        self._config = config
        self._preset = PRESETS[config.clarity_preset]
        width = parts.text_encoder.config.hidden_size
        embeddings = load_embeddings(config.models_dir / "embeddings", width)
        self._encoder = PromptEncoder(parts.tokenizer, parts.text_encoder, embeddings)
        self._loras = Loras(config.models_dir / "loras", parts.unet, parts.text_encoder)
        self._bytes_per_cell: float | None = None
        if config.clarity_compile:
            # In place, so that LoRAs merged into the weights count. Tiles have few shapes: one graph for each.
            for module in (parts.unet, parts.controlnet):
                module.compile(dynamic=False)  # pyright: ignore[reportUnknownMemberType]

    def warm_up(self) -> None:
        """Run a tile of the default size, where the first job would be slower for it, and learn its memory."""
        on_cuda = self.parts.device.type == "cuda"
        if not on_cuda and not self._config.clarity_compile:
            return
        options = UpscaleOptions(scale_factor=1, strength=0.01, steps=1)
        grey = np.full((options.tile_height * CELL_PIXELS, options.tile_width * CELL_PIXELS, 3), 128, np.uint8)
        if on_cuda:
            torch.backends.cudnn.benchmark = True
        for _ in range(2):  # the second time nothing is compiled or chosen any more
            self._bytes_per_cell = None
            self.upscale(Picture(grey), options, lambda _: None, lambda: False)
        logger.info("warm; a cell of a tile takes %.0f bytes", self._bytes_per_cell or 0)

    @torch.inference_mode()
    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Picture:
        """Enlarge as `Engine.upscale` says; `should_stop` is asked before every batch of tiles.

        At strength 0 nothing is invented: the picture is enlarged by the pre-upscaling network, or by Lanczos.

        Raises:
            Stopped: `should_stop()` answered true.
            OutOfMemory: half a batch does not fit either.
            UnknownLora: the prompt names one that is not installed.
        """

        def check() -> None:
            if should_stop():
                raise Stopped("The upscaling was told to stop.")

        plan = passes(picture.width, picture.height, options)
        tilings = [self._tiling(one, options) for one in plan]
        progress = _Progress(on_progress, [layout.count for layout in tilings])
        with _translated():
            job = self._begin(options, check, progress)
            rgb = picture.rgb
            for one, layout in zip(plan, tilings, strict=True):
                rgb = self._pass(rgb, one, layout, job)
            if options.sharpen:
                rgb = _to_levels(sharpen(self._to_tensor(rgb), options.sharpen))
            alpha = None if picture.alpha is None else resample_alpha(picture.alpha, plan[-1].size, check)
        on_progress(1.0)
        return Picture(rgb, alpha)

    def _tiling(self, one: Pass, options: UpscaleOptions) -> Tiling:
        return tiling(one.cells, _tile(options), self._preset.overlap_cells, feathered=self._preset.feathered)

    def _begin(self, options: UpscaleOptions, check: Callable[[], None], progress: "_Progress") -> _Job:
        prompt, loras = extract_loras(options.prompt)
        self._loras.apply(loras)
        conditioning = self._encoder.encode(prompt, options.negative_prompt, options.clip_skip)
        vae = TiledVae(self.parts.vae, VAE_TILE_PIXELS // (2 if options.small_tiles else 1))
        return _Job(options, conditioning, vae, check, progress)

    def _pass(self, rgb: Levels, one: Pass, layout: Tiling, job: _Job) -> Levels:
        """Enlarge to the pass's size and, unless it is to invent nothing, diffuse."""
        job.progress.begin()
        enlarged = superres.enlarge(rgb, one.size, self._network, job.check)
        if not one.strength:
            return enlarged
        batch = self._batch(layout, job.options)
        try:
            return self._diffuse(rgb, enlarged, one, layout, batch, job)
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        # Not in the handler: there the error still holds the frames of what failed, and they its tensors.
        logger.warning("out of memory with %d tiles in a batch: once more with half of them", batch)
        torch.cuda.empty_cache()
        return self._diffuse(rgb, enlarged, one, layout, batch // 2, job)

    def _diffuse(self, rgb: Levels, enlarged: Levels, one: Pass, layout: Tiling, batch: int, job: _Job) -> Levels:
        """Add noise to the enlarged picture and take it out again; `rgb` is what it was enlarged from."""
        options, parts = job.options, self.parts
        picture = _padded(self._to_tensor(enlarged), one.canvas)
        features = self._features(rgb, picture, one, job) if options.control_scale else None
        latents = job.vae.encode(picture, job.check)
        job.progress.move(ENCODED)

        sigmas = schedules.sigmas(options.sampler, options.spacing, options.steps, one.strength)
        noise = Noise(one.seed, tuple(latents.shape), parts.device)
        denoiser = TiledDenoiser(
            parts.unet,
            parts.controlnet,
            layout,
            job.conditioning,
            features,
            control_scale=options.control_scale,
            guidance_scale=options.guidance_scale,
            batch=batch,
            check=job.check,
        )
        denoise = self._paced(denoiser, count_evaluations(options.sampler, sigmas), job.progress)
        with self._measured(layout, batch):
            latents = sample(options.sampler, denoise, latents + sigmas[0] * noise(), sigmas, noise)

        diffused = job.vae.decode(latents, job.check)
        kind = self._preset.colour_fix if options.colour_fix is None else options.colour_fix
        diffused = restore_colours(kind, diffused, picture)
        job.progress.move(1.0)
        return _to_levels(diffused[:, :, : one.size.height, : one.size.width])

    def _features(self, rgb: Levels, picture: Tensor, one: Pass, job: _Job) -> Tensor:
        """Return what the ControlNet makes of its hint: the pass's input, enlarged without a network, or `picture`."""
        hint = picture
        if self._config.clarity_hint == "input":
            size = (one.size.height, one.size.width)
            enlarged = functional.interpolate(self._to_tensor(rgb), size, mode="bicubic").clamp_(0, 1)
            hint = _padded(enlarged, one.canvas)
        return hint_features(self.parts.hint_encoder, hint, job.check)

    def _paced(self, denoise: Denoise, evaluations: int, progress: "_Progress") -> Denoise:
        """Tell how far it is after each evaluation, and stay no more than one of them ahead of a GPU.

        Work is only queued there. Without a pace the progress would be that of the queueing, and a job that is to stop
        would have all its steps in the queue by then.
        """
        done = 0
        before: torch.cuda.Event | None = None

        def paced(x: Tensor, sigma: float) -> Tensor:
            nonlocal done, before
            denoised = denoise(x, sigma)
            if x.is_cuda:
                if before is not None:
                    before.synchronize()
                before = torch.cuda.Event()
                before.record()
            done += 1
            progress.move(ENCODED + (DENOISED - ENCODED) * done / evaluations)
            return denoised

        return paced

    @contextmanager
    def _measured(self, layout: Tiling, batch: int) -> Generator[None]:
        """Learn what memory a cell takes in the networks, unless it is known."""
        device = self.parts.device
        if device.type != "cuda" or self._bytes_per_cell is not None:
            yield
            return
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield
        torch.cuda.synchronize(device)
        taken = torch.cuda.max_memory_allocated(device) - before
        self._bytes_per_cell = taken / (batch * layout.tile.width * layout.tile.height)

    def _batch(self, layout: Tiling, options: UpscaleOptions) -> int:
        """Tell how many tiles go through the networks together: as many as fit, in batches of equal size."""
        if options.small_tiles:
            return 1
        most = self._config.clarity_batch
        if not most:
            device = self.parts.device
            if device.type != "cuda" or self._bytes_per_cell is None:
                return 1
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + unused
            fitting = int(MEMORY_SHARE * free / (self._bytes_per_cell * layout.tile.width * layout.tile.height))
            most = min(max(fitting, 1), MAX_BATCH)
        return balanced_batch(layout.count, most)

    def _to_tensor(self, rgb: Levels) -> Tensor:
        """Return (1, 3, height, width) of 0 to 1 on the engine's device."""
        return torch.tensor(rgb).to(self.parts.device).permute(2, 0, 1)[None].float() / 255


def _tile(options: UpscaleOptions) -> Size:
    """Return the size of a tile in cells."""
    shrink = 2 if options.small_tiles else 1
    return Size(width=options.tile_width // shrink, height=options.tile_height // shrink)


def _to_levels(picture: Tensor) -> Levels:
    levels = (picture[0].clamp(0, 1) * 255).round().to(torch.uint8)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()


def _padded(picture: Tensor, canvas: Size) -> Tensor:
    """Continue the picture to the right and downwards by its mirror image, as often as it takes."""
    height, width = picture.shape[-2:]
    if (width, height) == canvas:
        return picture
    rows, columns = (_mirrored(*axis).to(picture.device) for axis in ((height, canvas.height), (width, canvas.width)))
    return picture[:, :, rows][:, :, :, columns]


def _mirrored(length: int, canvas: int) -> Tensor:
    place = torch.arange(canvas) % (2 * length)
    return torch.where(place < length, place, 2 * length - 1 - place)


@contextmanager
def _translated() -> Generator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory("The device has not enough memory for a tile.") from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # what PyTorch says when the processor's memory is exhausted
            raise
        raise OutOfMemory("There is not enough memory for the canvas.") from error


class _Progress:
    """How far a job is: never falls, although a pass may begin anew. Passes count by their tiles."""

    def __init__(self, on_progress: Callable[[float], None], tiles: Sequence[int]) -> None:
        self._on_progress = on_progress
        self._tiles = tiles
        self._begun = 0
        self._shown = 0.0

    def begin(self) -> None:
        """Say that the next pass begins."""
        self._begun += 1

    def move(self, fraction: float) -> None:
        """Say how much of the pass is done, 0 to 1."""
        *past, present = self._tiles[: self._begun]
        done = (sum(past) + fraction * present) / sum(self._tiles)
        if done > self._shown:
            self._shown = done
            self._on_progress(done)
