"""How a small picture comes to be: exactly shrunk, or as pictures come from cameras, phones and the web."""

import io

import numpy as np
from PIL import Image, ImageFilter

from worker.upscaler.picture import Levels

_KERNELS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS, Image.Resampling.BOX)
_KERNEL_SHARES = (0.6, 0.15, 0.15, 0.1)


def shrink(high: Levels, scale: int, _: np.random.Generator) -> Levels:
    """Shrink by Pillow's bicubic kernel, which is antialiased: what the fidelity variant inverts."""
    height, width = high.shape[:2]
    return np.asarray(Image.fromarray(high).resize((width // scale, height // scale), Image.Resampling.BICUBIC))


def wear(high: Levels, scale: int, random: np.random.Generator) -> Levels:
    """Blur, shrink, add noise and compress, each sometimes and in strengths seen on the web."""
    image = Image.fromarray(high)
    if random.random() < 0.3:
        # The radius is of the result's pixels: up to 0.7 of one is a slightly soft lens or a weak upscale before.
        image = image.filter(ImageFilter.GaussianBlur(scale * random.uniform(0.2, 0.7)))
    kernel = _KERNELS[random.choice(len(_KERNELS), p=_KERNEL_SHARES)]
    image = image.resize((image.width // scale, image.height // scale), kernel)
    if random.random() < 0.3:
        image = _noised(image, random)
    if random.random() < 0.85:
        image = _compressed(image, random)
    return np.asarray(image)


def _noised(image: Image.Image, random: np.random.Generator) -> Image.Image:
    levels = np.asarray(image, np.float32)
    channels = 3 if random.random() < 0.5 else 1
    noise = random.standard_normal((*levels.shape[:2], channels), np.float32) * random.uniform(1, 8)
    return Image.fromarray(np.clip(np.rint(levels + noise), 0, 255).astype(np.uint8))


def _compressed(image: Image.Image, random: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    quality, subsampling = int(random.integers(50, 96)), 2 if random.random() < 0.75 else 0
    image.save(file, "JPEG", quality=quality, subsampling=subsampling)
    with Image.open(file) as decoded:
        return decoded.convert("RGB")
