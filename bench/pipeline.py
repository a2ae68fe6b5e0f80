"""How fast is the Clarity pipeline, of what the device can do, and beside it the naive ways?

    .venv/bin/python -m bench.pipeline [--sizes 512 1024 2048] [--device auto] [--precision auto] [--runs 3] [--compile]
                                       [--tile 32] [--alone]

Random weights of the real architecture: what is computed does not depend on their values. One table per run of the
program: seconds of a whole job (picture to picture, at the default options, warm), of its denoising loop and of each
megapixel of the output; samples that went through the UNet a second; TFLOP/s in the loop, and what share that is of a
large matrix product on the same device; peak memory. Beside each size, unless `--alone`, diffusers' ControlNet img2img
pipeline with as many evaluations: on our tiles one after the other, and on the whole canvas.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from diffusers.pipelines.controlnet.pipeline_controlnet_img2img import StableDiffusionControlNetImg2ImgPipeline
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench import sd15
from core.options import UpscaleOptions
from worker.upscaler.components import Components, choose_device, choose_dtype
from worker.upscaler.engines import Config
from worker.upscaler.engines.clarity import DENOISED, Clarity
from worker.upscaler.picture import Picture, join
from worker.upscaler.plan import CELL_PIXELS, PRESETS, Size, passes, tiling

TERA = 1e12
MEBI = 2**20


@dataclass(frozen=True)
class Work:
    """What the networks were asked in one run."""

    samples: int
    """Tiles or pictures that went through the UNet; with guidance each does so twice an evaluation."""
    flops: float
    """Of UNet and ControlNet; a multiplication and an addition are two."""


class Marks:
    """When denoising loops begin and end, by the device's own clock, without holding it up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loops: list[list[Any]] = [[]]

    def begin(self) -> None:
        """Say that another loop is to come."""
        self._loops.append([])

    def touch(self, *_: object) -> None:
        """Say that the loop begins, or has got this far."""
        if self._device.type == "cuda":
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self._loops[-1][1:] = [mark]

    def seconds(self) -> float:
        """Return what all loops took together."""
        loops = [loop for loop in self._loops if loop]
        if self._device.type != "cuda":
            return sum(last - first for first, last in loops)
        torch.cuda.synchronize(self._device)
        return sum(first.elapsed_time(last) for first, last in loops) / 1000


Way: TypeAlias = Callable[[Marks], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048], help="sides of the inputs, pixels")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--runs", type=int, default=3, help="timed runs after one to warm up; the median counts")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tile", type=int, help="cells on a side, where the default tile is too much for the device")
    parser.add_argument("--alone", action="store_true", help="leave the naive ways out")
    asked = parser.parse_args()
    device = choose_device(asked.device)
    dtype = choose_dtype(asked.precision, device)
    tile = {"tile_width": asked.tile, "tile_height": asked.tile} if asked.tile else {}
    options = UpscaleOptions(**tile)
    ceiling = measure_ceiling(device, dtype)
    print(f"{name_of(device)}, {dtype}, matrix product {ceiling / TERA:.2f} TFLOP/s, torch {torch.__version__}\n")
    parts = sd15.components(device, dtype)
    engine = Clarity(parts, (), Config(clarity_compile=asked.compile))
    engine.warm_up()
    print("| input | way | s | s/MP out | loop s | UNet samples/s | TFLOP/s in the loop | of the product | peak MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for side in asked.sizes:
        picture = Picture(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
        ways: dict[str, Way] = {"upscaled": lambda marks, given=picture: run_ours(engine, options, given, marks)}
        if not (asked.alone or asked.compile):
            ways["diffusers, tile by tile"] = lambda marks, given=picture: run_by_tiles(parts, options, given, marks)
            ways["diffusers, in one piece"] = lambda marks, given=picture: run_whole(parts, given, marks)
        for name, way in ways.items():
            try:
                print(
                    f"| {side}² → {2 * side}² | {name} | {measure(way, parts, side, asked.runs, ceiling)}", flush=True
                )
            except torch.OutOfMemoryError:
                print(f"| {side}² → {2 * side}² | {name} | out of memory | | | | | | |", flush=True)


def measure(way: Way, parts: Components, side: int, runs: int, ceiling: float) -> str:
    """Return a row: count the work of one run, which also warms up, and time the others."""
    work = count(way, parts)
    if parts.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(parts.device)
    seconds, loops = list[float](), list[float]()
    for _ in range(runs):
        marks, began = Marks(parts.device), time.perf_counter()
        way(marks)
        synchronize(parts.device)
        seconds.append(time.perf_counter() - began)
        loops.append(marks.seconds())
    whole, loop = statistics.median(seconds), statistics.median(loops)
    rate = work.flops / loop
    return (
        f"{whole:.2f} | {whole / ((2 * side) ** 2 / 1e6):.2f} | {loop:.2f} | {work.samples / loop:.2f} "
        f"| {rate / TERA:.2f} | {rate / ceiling:.0%} | {peak_memory(parts.device) / MEBI:.0f} |"
    )


def count(way: Way, parts: Components) -> Work:
    """Note what the networks are given in one run; what one call computes is counted once for each shape."""
    known = dict[tuple[Any, ...], float]()
    flops, samples = 0.0, 0

    def note(network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        nonlocal flops, samples
        shape = network, *(value.shape for value in arguments if isinstance(value, torch.Tensor))
        if shape not in known:
            with FlopCounterMode(display=False) as counter:
                network.forward(*arguments, **named)
            known[shape] = counter.get_total_flops()
        flops += known[shape]
        samples += len(arguments[0]) * (network is parts.unet)

    hooks = [network.register_forward_pre_hook(note, with_kwargs=True) for network in (parts.unet, parts.controlnet)]
    try:
        way(Marks(parts.device))
    finally:
        for hook in hooks:
            hook.remove()
    return Work(samples, flops)


def peak_memory(device: torch.device) -> int:
    """Return the most that was in use: of the device since it was reset, of a process in all its life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Return what a large matrix product reaches, FLOP/s: the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(a, b)
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


# The ways -------------------------------------------------------------------------------------------------------------


def run_ours(engine: Clarity, options: UpscaleOptions, picture: Picture, marks: Marks) -> Picture:
    def on_progress(fraction: float) -> None:
        if fraction <= DENOISED:
            marks.touch()

    return join(engine.upscale(picture, options, on_progress, lambda: False))


def run_by_tiles(parts: Components, options: UpscaleOptions, picture: Picture, marks: Marks) -> Image.Image:
    """Diffuse each of our tiles by itself, and put one beside the other."""
    preset = PRESETS["quality"]
    (one,) = passes(picture.width, picture.height, options)
    tile = Size(width=options.tile_width, height=options.tile_height)
    layout = tiling(one.cells, tile, preset.overlap_cells, feathered=preset.feathered)
    enlarged = enlarge(picture)
    canvas = enlarged.copy()
    with pipeline(parts, marks) as pipe:
        for down, across in product(layout.rows, layout.columns):
            corner = CELL_PIXELS * across.start, CELL_PIXELS * down.start
            box = (*corner, CELL_PIXELS * across.stop, CELL_PIXELS * down.stop)
            marks.begin()
            canvas.paste(diffuse(pipe, enlarged.crop(box)), corner)
    return canvas


def run_whole(parts: Components, picture: Picture, marks: Marks) -> Image.Image:
    """Diffuse the whole canvas at once."""
    with pipeline(parts, marks) as pipe:
        return diffuse(pipe, enlarge(picture))


def enlarge(picture: Picture) -> Image.Image:
    return Image.fromarray(picture.rgb).resize((2 * picture.width, 2 * picture.height), Image.Resampling.LANCZOS)


@contextmanager
def pipeline(parts: Components, marks: Marks) -> Generator[Any]:
    """Lend diffusers' own pipeline over the same networks."""
    scheduler = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts.controlnet.register_module("controlnet_cond_embedding", parts.hint_encoder)
    hooks = [parts.controlnet.register_forward_pre_hook(marks.touch), parts.unet.register_forward_hook(marks.touch)]
    pipe: Any = cast("Any", StableDiffusionControlNetImg2ImgPipeline)(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        controlnet=parts.controlnet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    try:
        yield pipe
    finally:
        for hook in hooks:
            hook.remove()
        parts.controlnet.register_module("controlnet_cond_embedding", nn.Identity())


def diffuse(pipe: Any, image: Image.Image) -> Image.Image:
    """Run as many evaluations as we do by default: 7, which are 35 % of 20 steps here."""
    made: Sequence[Image.Image] = pipe(
        prompt="",
        image=image,
        control_image=image,
        strength=0.35,
        num_inference_steps=20,
        guidance_scale=6.0,
        controlnet_conditioning_scale=0.6,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images
    return made[0]


if __name__ == "__main__":
    main()
