"""The Clarity engine: enlarge, add noise, take it out again tile by tile under a tile ControlNet; in passes of 2×."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten

import numpy as np
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.exc import TorchDynamoException
from torch.nn import functional

from core.errors import DeploymentError, OutOfMemory, Stopped
from core.options import UpscaleOptions
from worker.upscaler import checkpoints, components, schedules, superres, weights
from worker.upscaler.canvas import padded, to_levels, to_tensor
from worker.upscaler.colour import restore_colours, sharpen
from worker.upscaler.components import Components
from worker.upscaler.devices import is_exhaustion
from worker.upscaler.engines import Config
from worker.upscaler.engines.superres import load_networks
from worker.upscaler.loras import Loras
from worker.upscaler.picture import Levels, Picture
from worker.upscaler.plan import (
    CELL_PIXELS,
    PRESETS,
    Pass,
    Size,
    Tiling,
    balanced_batch,
    fitting_batch,
    output_size,
    passes,
    tiling,
)
from worker.upscaler.prompts import Conditioning, PromptEncoder, extract_loras, load_embeddings
from worker.upscaler.resampling import resample_alpha
from worker.upscaler.samplers import Denoise, Noise, count_evaluations, sample
from worker.upscaler.superres import Network
from worker.upscaler.tiled import TiledDenoiser, hint_features
from worker.upscaler.vae import TiledVae

VAE_TILE_PIXELS = 1024

MAX_COMPILED_SHAPES = 1024
"""How often a block may be compiled: for each of its widths in the network, size of a tile and size of a batch."""

_OUTPUT_BYTES = 16
"""What a pixel of the output takes at most outside the networks, measured."""

ENCODED, DENOISED = 0.05, 0.9
"""How far a pass has come once its picture is encoded, and once its noise is gone."""

logger = logging.getLogger(__name__)


def load(config: Config) -> "Clarity":
    """Read the weights and warm up.

    Raises:
        DeploymentError: weights are missing or unfit, or the networks cannot be compiled here.
    """
    parts = components.load(
        config.models_dir, checkpoint=config.clarity_checkpoint, device=config.device, precision=config.precision
    )
    if parts.device.type == "cpu":
        logger.warning("Clarity runs without a GPU: a megapixel takes minutes.")
    engine = Clarity(parts, _load_networks(config, parts.device), config)
    engine.warm_up()
    return engine


def _load_networks(config: Config, device: torch.device) -> tuple[Network, ...]:
    """Read what enlarges before diffusion: the operator's choice, what is installed for it, or our own networks."""
    file = weights.preupscaler(config.models_dir)
    if config.superres_weights or file is None:
        return load_networks(config, device)
    return (checkpoints.load(file, device, config.precision),)


def _compile_blocks(*networks: nn.Module) -> None:
    """Let the blocks of which the networks consist be compiled when they are first called, anew for each shape.

    A block takes seconds, and equal ones share the code; a network as a whole takes minutes, all of them silent. LoRAs
    merged into the weights count, for the code has them as inputs. Tiles have few shapes, so all are fixed.
    """
    dynamo.recompile_limit = dynamo.accumulated_recompile_limit = MAX_COMPILED_SHAPES
    for network in networks:
        for block in network.modules():
            if isinstance(block, BasicTransformerBlock | ResnetBlock2D):
                block.compile(dynamic=False)  # pyright: ignore[reportUnknownMemberType]


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

    def __init__(self, parts: Components, networks: Sequence[Network], config: Config) -> None:
        self.parts = parts
        self._networks = networks
        self._config = config
        self._preset = PRESETS[config.clarity_preset]
        width = parts.text_encoder.config.hidden_size
        embeddings = load_embeddings(config.models_dir / "embeddings", width)
        self._encoder = PromptEncoder(parts.tokenizer, parts.text_encoder, embeddings)
        self._loras = Loras(config.models_dir / "loras", parts.unet, parts.text_encoder)
        self._bytes_per_cell: float | None = None
        if config.clarity_compile:
            _compile_blocks(parts.unet, parts.controlnet)

    def warm_up(self) -> None:
        """Run a tile of the default size, where the first job would be slower for it, and learn its memory.

        Raises:
            DeploymentError: the networks cannot be compiled here.
        """
        if self.parts.device.type != "cuda" and not self._config.clarity_compile:
            return
        options = UpscaleOptions(scale_factor=1, strength=0.01, steps=1)
        grey = np.full((options.tile_height * CELL_PIXELS, options.tile_width * CELL_PIXELS, 3), 128, np.uint8)
        for _ in range(2):  # the second time nothing is compiled any more
            self._bytes_per_cell = None
            try:
                next(self.upscale(Picture(grey), options, lambda _: None, lambda: False))
            except TorchDynamoException as error:
                reason = shorten(str(error), 200, placeholder=" …")
                raise DeploymentError(f"UPSCALED_CLARITY_COMPILE is set, which fails here: {reason}") from error
        if self._bytes_per_cell is not None:
            logger.info("a cell of a tile takes %.0f bytes", self._bytes_per_cell)

    @torch.inference_mode()
    def upscale(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        should_stop: Callable[[], bool],
    ) -> Iterator[Picture]:
        """Enlarge as `Engine.upscale` says; `should_stop` is asked before every batch of tiles.

        On a processor, where a batch may take minutes, it is asked before every layer, too. At strength 0 nothing is
        invented: the picture is enlarged by the pre-upscaling network. The whole comes as one strip.

        Raises:
            Stopped: `should_stop()` answered true.
            OutOfMemory: half a batch does not fit either.
            UnknownLora: the prompt names one that is not installed.
        """

        def check() -> None:
            if should_stop():
                raise Stopped("The upscaling was told to stop.")

        try:
            with self._asking(check):
                upscaled = self._upscaled(picture, options, on_progress, check)
        except (MemoryError, RuntimeError) as error:
            if not is_exhaustion(error):
                raise
            logger.warning("out of memory: %s", error)
        else:
            yield upscaled
            return
        # As in `_pass` not in the handler: whoever keeps this error would keep that one, and what filled the memory.
        raise OutOfMemory("There is not enough memory for the canvas, or for a tile.")

    def peak_bytes(self, size: Size, options: UpscaleOptions, *, alpha: bool) -> int:
        """Tell how much memory upscaling takes at most, as `Engine.peak_bytes` says."""
        wanted = output_size(*size, options.scale_factor)
        return size.width * size.height * (4 if alpha else 3) + wanted.width * wanted.height * _OUTPUT_BYTES

    def _upscaled(
        self,
        picture: Picture,
        options: UpscaleOptions,
        on_progress: Callable[[float], None],
        check: Callable[[], None],
    ) -> Picture:
        plan = passes(picture.width, picture.height, options)
        tilings = [self._tiling(one, options) for one in plan]
        job = self._begin(options, check, _Progress(on_progress, [layout.count for layout in tilings]))
        rgb = picture.rgb
        for one, layout in zip(plan, tilings, strict=True):
            rgb = self._pass(rgb, one, layout, job)
        if options.sharpen:
            rgb = to_levels(sharpen(to_tensor(rgb, self.parts.device), options.sharpen))
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
        enlarged = superres.enlarge(rgb, one.size, self._networks, job.check)
        if not one.strength:
            job.progress.move(1.0)
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
        picture = padded(to_tensor(enlarged, parts.device), one.canvas)
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

        def move(fraction: float) -> None:
            job.progress.move(ENCODED + (DENOISED - ENCODED) * fraction)

        denoise = paced(denoiser, count_evaluations(options.sampler, sigmas), move)
        with self._measured(layout, batch):
            latents = sample(options.sampler, denoise, latents + sigmas[0] * noise(), sigmas, noise)

        diffused = job.vae.decode(latents, job.check)
        kind = self._preset.colour_fix if options.colour_fix is None else options.colour_fix
        diffused = restore_colours(kind, diffused, picture)
        job.progress.move(1.0)
        return to_levels(diffused[:, :, : one.size.height, : one.size.width])

    def _features(self, rgb: Levels, picture: Tensor, one: Pass, job: _Job) -> Tensor:
        """Return what the ControlNet makes of its hint: the pass's input, enlarged without a network, or `picture`."""
        hint = picture
        if self._config.clarity_hint == "input":
            size = (one.size.height, one.size.width)
            enlarged = functional.interpolate(to_tensor(rgb, self.parts.device), size, mode="bicubic").clamp_(0, 1)
            hint = padded(enlarged, one.canvas)
        return hint_features(self.parts.hint_encoder, hint, job.check)

    @contextmanager
    def _asking(self, check: Callable[[], None]) -> Generator[None]:
        """Call `check` before every layer on a processor: a large tile takes longer there than a worker may be silent.

        Not where code is compiled: it would keep the first job's `check`.
        """
        if self.parts.device.type == "cuda" or self._config.clarity_compile:
            yield
            return

        def ask(*_: object) -> None:
            check()

        networks: tuple[nn.Module, ...] = (self.parts.unet, self.parts.controlnet, self.parts.vae)
        layers = [part for network in networks for part in network.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
        hooks = [layer.register_forward_pre_hook(ask) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
            most = fitting_batch(free, self._bytes_per_cell * layout.tile.width * layout.tile.height)
        return balanced_batch(layout.count, most)


def paced(denoise: Denoise, evaluations: int, on_progress: Callable[[float], None]) -> Denoise:
    """Tell after each of the evaluations what fraction is done, and stay no more than one of them ahead of a GPU.

    Work is only queued there. Without a pace the progress would be that of the queueing, and a job that is to stop
    would have all its steps in the queue by then.
    """
    done = 0
    before: torch.cuda.Event | None = None

    def evaluate(x: Tensor, sigma: float) -> Tensor:
        nonlocal done, before
        denoised = denoise(x, sigma)
        if x.is_cuda:
            if before is not None:
                before.synchronize()
            before = torch.cuda.Event()
            before.record(torch.cuda.current_stream(x.device))  # left out, it would be that of the first GPU
        done += 1
        on_progress(done / evaluations)
        return denoised

    return evaluate


def _tile(options: UpscaleOptions) -> Size:
    """Return the size of a tile in cells."""
    shrink = 2 if options.small_tiles else 1
    return Size(width=options.tile_width // shrink, height=options.tile_height // shrink)


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
