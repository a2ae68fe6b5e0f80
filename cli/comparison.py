"""The before/after picture: what the upscaling changed, at the same size, side by side."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

MAX_SIDE_PIXELS = 1024
"""Each half shows at most this much of a side, from the middle of the picture, so that pixels stay visible."""

DETAIL = 4
"""How much larger the second row shows the middle of the first."""

_BAR_PIXELS = 32


def write_comparison(before: Path, after: Path, target: Path) -> None:
    """Write a PNG: left `before` enlarged without interpolation, right `after`; below, the middle of both, larger."""
    with Image.open(before) as opened:
        oriented = ImageOps.exif_transpose(opened).convert("RGB")
    with Image.open(after) as opened:
        upscaled = opened.convert("RGB")
    labels = (f"before: {oriented.width} x {oriented.height}", f"after: {upscaled.width} x {upscaled.height}")
    enlarged = oriented.resize(upscaled.size, Image.Resampling.NEAREST)
    width, height = (min(side, MAX_SIDE_PIXELS) for side in upscaled.size)
    sheet = Image.new("RGB", (2 * width, _BAR_PIXELS + 2 * height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=18)
    for left, picture, label in ((0, enlarged, labels[0]), (width, upscaled, labels[1])):
        draw.text((left + 8, _BAR_PIXELS // 2), label, "black", font, anchor="lm")
        sheet.paste(_middle(picture, width, height), (left, _BAR_PIXELS))
        detail = _middle(picture, max(1, width // DETAIL), max(1, height // DETAIL))
        sheet.paste(detail.resize((width, height), Image.Resampling.NEAREST), (left, _BAR_PIXELS + height))
    sheet.save(target)


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
