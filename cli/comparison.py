"""The before/after picture: what the upscaling changed, at the same size, side by side."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

MAX_SIDE_PIXELS = 1024
"""Each half shows at most this much of a side, from the middle of the picture, so that pixels stay visible."""

_BAR_PIXELS = 32


def write_comparison(before: Path, after: Path, target: Path) -> None:
    """Write a PNG: left `before` enlarged without interpolation, right `after`, the same part of both."""
    with Image.open(before) as opened:
        oriented = ImageOps.exif_transpose(opened).convert("RGB")
    with Image.open(after) as opened:
        upscaled = opened.convert("RGB")
    enlarged = oriented.resize(upscaled.size, Image.Resampling.NEAREST)
    halves = [_middle(enlarged), _middle(upscaled)]
    width, height = halves[0].size
    sheet = Image.new("RGB", (2 * width, height + _BAR_PIXELS), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    labels = (
        f"before: {oriented.width} × {oriented.height}, pixels enlarged",
        f"after: {upscaled.width} × {upscaled.height}",
    )
    for index, (half, label) in enumerate(zip(halves, labels, strict=True)):
        sheet.paste(half, (index * width, _BAR_PIXELS))
        draw.text((index * width + 8, _BAR_PIXELS // 2), label, "black", font, anchor="lm")
    sheet.save(target)


def _middle(picture: Image.Image) -> Image.Image:
    width, height = (min(side, MAX_SIDE_PIXELS) for side in picture.size)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
