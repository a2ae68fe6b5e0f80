"""How near to the truth are enlarged pictures: ours, and those of plain resampling?

    .venv/bin/python -m bench.quality FOLDER [--scales 2 4] [--jpeg 75] [--variants fidelity restore] [--weights FILE]
                                      [--out FOLDER]

Each picture in FOLDER is shrunk by Pillow's bicubic kernel, enlarged again by each method, and compared with itself;
then the same with the small picture saved as a JPEG in between. One table for each scale and each of the two: means
over all pictures of PSNR and SSIM of the luma, in dB and 0 to 1, of HaarPSI, 0 to 1, where more is better, and of GMSD
of the luma, where less is better; how much PSNR is won over bicubic; and on how many pictures HaarPSI is better than
Lanczos'. A border as wide as the scale is left out. None of the figures comes from a network.

With --out, one picture for each comparison is written: the truth, and what each method made of it.
"""

import argparse
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from core.options import UpscaleOptions
from worker.upscaler.checkpoints import Variant, torchvision_stood_in
from worker.upscaler.engine import Engine
from worker.upscaler.engines import Config, load
from worker.upscaler.picture import Levels, Picture

Method: TypeAlias = Callable[[Levels, int], Levels]
"""From a small picture and a scale to a large one."""

BASE = "bicubic"
RIVAL = "lanczos"

LUMA = (65.481, 128.553, 24.966)
"""Shares of red, green and blue, 0 to 1, in the luma that PSNR-Y speaks of, 16 to 235 (ITU-R BT.601)."""

FIGURES = ("PSNR-Y", "SSIM", "HaarPSI", "GMSD")

DETAIL = 192
"""Side of what --out shows of a picture, in pixels of the original."""

_OF_TORCHVISION: Mapping[str, Mapping[str, object]] = {
    "torchvision": {},
    "torchvision.models": {
        "vgg16": None,
        "vgg19": None,
        "inception": SimpleNamespace(
            **dict.fromkeys(("InceptionA", "InceptionC", "InceptionE"), torch.nn.Module),
        ),
    },
}
"""What piq imports, for measures that have a network."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--jpeg", type=int, default=75)
    variants = get_args(Variant)
    parser.add_argument("--variants", nargs="*", choices=variants, default=variants)
    parser.add_argument("--weights", default="", help="another network, beside ours")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    originals = [_read(path) for path in sorted(arguments.folder.iterdir()) if path.suffix in {".png", ".jpg", ".webp"}]
    methods = _methods(arguments.variants, arguments.weights)
    measure = load_measure()
    for scale in arguments.scales:
        for quality in (None, arguments.jpeg):
            title = f"x{scale}, {'bicubic' if quality is None else f'bicubic and JPEG {quality}'}"
            pairs = [(_cut(original, scale), _shrunk(_cut(original, scale), scale, quality)) for original in originals]
            made = {name: [method(low, scale) for _, low in pairs] for name, method in methods.items()}
            figures = {
                name: np.array([measure(high, result, scale) for (high, _), result in zip(pairs, results, strict=True)])
                for name, results in made.items()
            }
            print(_table(title, figures), flush=True)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                _sheet(pairs[0][0], {name: results[0] for name, results in made.items()}).save(
                    arguments.out / f"{title.replace(' ', '-').replace(',', '')}.png"
                )


def _methods(variants: Sequence[Variant], weights: str) -> dict[str, Method]:
    kernels = {
        "nearest": Image.Resampling.NEAREST,
        BASE: Image.Resampling.BICUBIC,
        RIVAL: Image.Resampling.LANCZOS,
    }
    methods: dict[str, Method] = {name: partial(_resized, kernel) for name, kernel in kernels.items()}
    for variant in variants:
        methods[variant] = partial(_upscaled, load("superres", Config(superres_variant=variant)))
    if weights:
        methods[Path(weights).stem] = partial(_upscaled, load("superres", Config(superres_weights=weights)))
    return methods


def _resized(kernel: Image.Resampling, low: Levels, scale: int) -> Levels:
    height, width = low.shape[:2]
    return np.asarray(Image.fromarray(low).resize((width * scale, height * scale), kernel))


def _upscaled(engine: Engine, low: Levels, scale: int) -> Levels:
    options = UpscaleOptions(scale_factor=scale)
    strips = engine.upscale(Picture(low), options, on_progress=lambda _: None, should_stop=lambda: False)
    return np.concatenate([strip.rgb for strip in strips])


def _read(path: Path) -> Levels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _cut(levels: Levels, scale: int) -> Levels:
    height, width = (side // scale * scale for side in levels.shape[:2])
    return levels[:height, :width]


def _shrunk(high: Levels, scale: int, quality: int | None) -> Levels:
    size = (high.shape[1] // scale, high.shape[0] // scale)
    low = Image.fromarray(high).resize(size, Image.Resampling.BICUBIC)
    if quality is None:
        return np.asarray(low)
    file = io.BytesIO()
    low.save(file, "JPEG", quality=quality)
    with Image.open(file) as compressed:
        return np.asarray(compressed.convert("RGB"))


def load_measure() -> Callable[[Levels, Levels, int], tuple[float, ...]]:
    """Return what gives the `FIGURES` of a truth, what was made of it, and the width of the border to leave out."""
    with torchvision_stood_in(_OF_TORCHVISION):
        piq: Any = importlib.import_module("piq")

    def measure(high: Levels, made: Levels, scale: int) -> tuple[float, ...]:
        inner = slice(scale, -scale)
        truth, result = (_planes(levels[inner, inner]) for levels in (high, made))
        bright_truth, bright_result = (_luma(planes) for planes in (truth, result))
        with torch.inference_mode():
            return (
                float(-10 * ((bright_truth - bright_result) ** 2).mean().log10()),
                float(piq.ssim(bright_result, bright_truth, data_range=1.0, downsample=False)),
                float(piq.haarpsi(result, truth, data_range=1.0)),
                float(piq.gmsd(bright_result, bright_truth, data_range=1.0)),
            )

    return measure


def _planes(levels: Levels) -> Tensor:
    # In float64 PyTorch would lay out each window of a convolution in memory, 400 MB for a photograph, each time anew.
    return torch.tensor(levels.transpose(2, 0, 1)[None].copy(), dtype=torch.float32) / 255


def _luma(planes: Tensor) -> Tensor:
    shares = torch.tensor(LUMA, dtype=planes.dtype)[:, None, None]
    return ((planes * shares).sum(dim=1, keepdim=True) + 16) / 255


def _table(title: str, figures: Mapping[str, Any]) -> str:
    base, rival = figures[BASE], figures[RIVAL]
    lines = [
        f"{title} ({len(base)} pictures)",
        f"{'':24}" + "".join(f"{name:>9}" for name in FIGURES) + "   gain  wins",
    ]
    for name, rows in figures.items():
        means = rows.mean(axis=0)
        wins = int((rows[:, 2] > rival[:, 2]).sum())
        lines.append(
            f"{name:24}{means[0]:9.2f}{means[1]:9.4f}{means[2]:9.4f}{means[3]:9.4f}"
            f"{means[0] - base[:, 0].mean():+7.2f}{'' if name == RIVAL else wins:>6}"
        )
    return "\n".join([*lines, ""])


def _sheet(high: Levels, made: Mapping[str, Levels]) -> Image.Image:
    """Show the middle of the truth and of what each method made, side by side, twice as large."""
    pictures = [high, *made.values()]
    sheet = Image.new("RGB", (2 * DETAIL * len(pictures), 2 * DETAIL))
    top, left = ((side - DETAIL) // 2 for side in high.shape[:2])
    for index, levels in enumerate(pictures):
        detail = Image.fromarray(levels[top : top + DETAIL, left : left + DETAIL])
        sheet.paste(detail.resize((2 * DETAIL, 2 * DETAIL), Image.Resampling.NEAREST), (2 * DETAIL * index, 0))
    return sheet


if __name__ == "__main__":
    main()
