"""Pictures that are drawn here, to learn from: crisp edges and textures that nobody has compressed or resampled.

Most kinds are drawn several times as large and averaged down, so that their edges are as smooth as
a lens would make them.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from training.facades import build
from training.fields import Field, grid, pick_scale, powers, spectrum, streaks
from training.motifs import FINEST, Point, draw_leaf, draw_motif
from training.palettes import Colour, choose_colours, contrasting, mapped, rounded
from worker.upscaler.picture import Levels

_FINE = 3
"""Nine samples a pixel are enough for busy pictures."""

_LETTERS = "bcdfghjklmnpqrstvwxz"
_VOWELS = "aeiouaeiouy"
_MARKS = "'`^~\""
"""Pillow's own font has no accented letters, but what it has can be set over a letter."""


def draw(random: Generator, side: int) -> Levels:
    """Draw one picture of `side` × `side` pixels of a kind chosen at random; the same generator draws the same one."""
    kinds = list(KINDS)
    shares = np.array([KINDS[kind][0] for kind in kinds])
    return KINDS[kinds[random.choice(len(kinds), p=shares / shares.sum())]][1](random, side)


def dead_leaves(random: Generator, side: int) -> Levels:
    """Let leaves of every size fall upon each other: the statistics of edges and occlusion are those of photographs."""
    leaves, _ = _fallen(random, side, 3.0)
    if random.random() < 0.25:
        # What lies behind is out of focus.
        leaves = leaves.filter(ImageFilter.GaussianBlur(random.uniform(0.5, 4)))
        front, mask = _fallen(random, side, random.uniform(0.4, 1.2))
        leaves.paste(front, mask=mask)
    return np.array(leaves)


def text(random: Generator, side: int) -> Levels:
    """Set headlines and paragraphs, as screens show them or as they are printed, slanted a little."""
    fine = 1 if random.random() < 0.4 else _FINE
    tilt = 0.0 if fine == 1 or random.random() < 0.4 else random.uniform(-12, 12)
    across = (int(side * 1.25) if tilt else side) * fine
    paper, ink = contrasting(random)
    page = _plain(across, paper) if random.random() < 0.5 else _shaded(random, across, paper)
    y = random.uniform(-0.5, 1) * 20 * fine
    while y < across:
        size = pick_scale(random, 8, 60)
        lines = 1 if size > 28 else int(random.integers(1, 9))
        colour = ink if random.random() < 0.7 else contrasting(random, paper)[1]
        left = random.uniform(-0.1, 0.25) * across
        y = _set(random, page, (left, y), size * fine, lines, colour) + random.uniform(0.1, 0.8) * size * fine
    if tilt:
        page = page.rotate(tilt, Image.Resampling.BICUBIC)
        edge = (across - side * fine) // 2
        page = page.crop((edge, edge, edge + side * fine, edge + side * fine))
    return _reduced(random, page, side)


def line_art(random: Generator, side: int) -> Levels:
    """Draw figures, patterns and charts with a pen."""
    across = side * FINEST
    paper, ink = contrasting(random)
    page = _plain(across, paper) if random.random() < 0.7 else _shaded(random, across, paper)
    pen = ImageDraw.Draw(page)
    for _ in range(int(random.integers(5, 30))):
        colour = ink if random.random() < 0.5 else contrasting(random, paper)[1]
        reach = random.uniform(0.3, 0.9) ** 2 * across
        # Whole pixels, as screens have them: a line may be exactly as wide as a pixel, and lie on it.
        left, top = (round(random.uniform(-0.15, 0.95) * side) * FINEST for _ in range(2))
        if random.random() < 0.3:
            pen.rectangle((left, top, left + reach, top + reach), fill=contrasting(random, colour)[1])
        draw_motif(random, pen, (left, top), reach, colour)
    return _reduced(random, page, side)


def gradients(random: Generator, side: int) -> Levels:
    """Let colours pass into each other, under shapes with sharp edges that do so too."""
    page = _gradient(random, side)
    for _ in range(int(random.integers(1, 10))):
        mask = Image.new("L", (side * FINEST, side * FINEST))
        pen = ImageDraw.Draw(mask)
        for _ in range(int(random.integers(1, 4))):
            centre = (random.uniform(0, 1) * side * FINEST, random.uniform(0, 1) * side * FINEST)
            draw_leaf(random, pen, centre, random.uniform(0.03, 0.3) * side * FINEST, 255)
        page.paste(_gradient(random, side), mask=mask.reduce(FINEST))
    return np.array(page)


def noise(random: Generator, side: int) -> Levels:
    """Colour noise of some spectrum, or cut it into islands with a coastline."""
    field = spectrum(random, side)
    if random.random() < 0.35:
        # Steepened in place of cut, so that the coast is a pixel wide and has no stairs.
        rows, columns = np.gradient(field)
        field = np.clip((field - random.uniform(-0.8, 0.8)) / (np.hypot(rows, columns) + 1e-3), -1, 1)
        field = field + random.uniform(0, 0.3) * spectrum(random, side)
    return mapped(random, field)


def waves(random: Generator, side: int) -> Levels:
    """Draw stripes, crossed waves and zone plates, up to the finest that pixels can hold."""
    rows, columns = grid(side, side * _FINE)
    field = np.zeros_like(rows * columns)
    for _ in range(int(random.integers(1, 4))):
        angle, pace = random.uniform(0, np.pi), pick_scale(random, 0.01, 0.45)
        if random.random() < 0.45:
            # The frequency grows with the distance, and reaches the pace in the furthest corner.
            y, x = (random.uniform(0, 1) * side for _ in range(2))
            phase = ((rows - y) ** 2 + (columns - x) ** 2) * max(pace, 0.1) / (2 * math.sqrt(2) * side)
        else:
            phase = (rows * math.sin(angle) + columns * math.cos(angle)) * pace
        wave = np.sin(2 * np.pi * (phase + random.random()), dtype=np.float32)
        field += np.sign(wave - random.uniform(-0.6, 0.6)) if random.random() < 0.4 else wave
    return _reduced(random, Image.fromarray(mapped(random, field)), side)


def weave(random: Generator, side: int) -> Levels:
    """Lay threads over and under each other."""
    rows, columns = grid(side, side * _FINE)
    angle, pitch = random.uniform(0, np.pi / 2), random.uniform(3, 24)
    along = (columns * math.cos(angle) + rows * math.sin(angle)) / pitch
    across = (rows * math.cos(angle) - columns * math.sin(angle)) / pitch
    over = (np.floor(along) + np.floor(across) * int(random.integers(1, 4))) % int(random.integers(2, 5)) < 1
    # A thread is round, and darker where it dives.
    crown, dive = np.where(over, across, along) % 1 - 0.5, np.where(over, along, across) % 1 - 0.5
    field = np.sqrt(1 - 3.6 * crown**2) - random.uniform(0, 2) * dive**2 + random.uniform(0, 0.8) * over
    field += random.uniform(0, 0.25) * np.tile(spectrum(random, side), (_FINE, _FINE))
    return _reduced(random, Image.fromarray(mapped(random, field.astype(np.float32))), side)


def wood(random: Generator, side: int) -> Levels:
    """Saw through rings that grew unevenly."""
    rows, columns = grid(side, side * _FINE)
    y, x = random.uniform(-1, 2, 2) * side
    stretch = random.uniform(0.05, 1)
    radius = np.sqrt(((rows - y) * stretch) ** 2 + (columns - x) ** 2)
    radius = radius + random.uniform(1, 30) * _finer(powers(random, side, 2.4))
    rings = (radius / random.uniform(4, 40)) % 1
    field = rings ** random.uniform(0.5, 4) + random.uniform(0, 0.2) * _finer(streaks(random, side))
    return _reduced(random, Image.fromarray(mapped(random, field)), side)


def fur(random: Generator, side: int) -> Levels:
    """Comb thousands of hairs along a field of directions."""
    across = side * _FINE
    coat = np.array(choose_colours(random, 6), dtype=np.float64)
    coat += max(0, 90 - coat[0].mean())
    # Between the hairs it is darker, and mostly no other colour.
    page = _shaded(random, across, rounded(coat[0] * random.uniform(0.4, 1)))
    pen = ImageDraw.Draw(page)
    count = int(side * side / 512**2 * random.uniform(4000, 10000)) + 20
    bend = random.uniform(0.3, 2) * powers(random, side, 2.5) + random.uniform(0, 2 * np.pi)
    shade = powers(random, side, 1.8)
    length, width = random.uniform(8, 50) * _FINE, random.uniform(0.4, 3) * _FINE
    starts = random.integers(0, side, (count, 2))
    for (row, column), tone in zip(starts, random.normal(0, 25, count), strict=True):
        angle, curl = bend[row, column], random.uniform(-0.5, 0.5)
        colour = coat[int(random.integers(len(coat)))] * 0.5 + coat[0] * 0.5 + tone + 30 * shade[row, column]
        points = [(column * _FINE, row * _FINE)]
        for step in range(3):
            x, y = points[-1]
            heading = angle + curl * step
            points.append((x + np.cos(heading) * length / 3, y + np.sin(heading) * length / 3))
        pen.line(points, fill=rounded(colour), width=max(1, round(width * random.uniform(0.5, 1.3))))
    return _reduced(random, page, side)


def facades(random: Generator, side: int) -> Levels:
    """Build walls, fences and roofs, now and then behind leaves."""
    page = _reduced(random, Image.fromarray(build(random, side, side * _FINE)), side)
    page = np.clip(page + random.uniform(0, 6) * spectrum(random, side)[:, :, None], 0, 255)
    shown = Image.fromarray(np.round(page).astype(np.uint8))
    if random.random() < 0.4:
        front, mask = _fallen(random, side, random.uniform(0.1, 0.5))
        shown.paste(front, mask=mask)
    return np.array(shown)


KINDS: dict[str, tuple[float, Callable[[Generator, int], Levels]]] = {
    "dead leaves": (0.26, dead_leaves),
    "facades": (0.25, facades),
    "text": (0.11, text),
    "line art": (0.10, line_art),
    "waves": (0.06, waves),
    "gradients": (0.05, gradients),
    "noise": (0.05, noise),
    "weave": (0.04, weave),
    "wood": (0.04, wood),
    "fur": (0.04, fur),
}
"""Every kind: its share of the pictures, and who draws it."""


def _fallen(random: Generator, side: int, layers: float) -> tuple[Image.Image, Image.Image]:
    """Drop leaves that would cover the picture `layers` times; give them, and where they lie."""
    across = side * _FINE
    numbers, count = _scattered(random, side, layers)
    position = np.arange(across, dtype=np.float32) / across - 0.5
    slopes = random.normal(0, 60, (2, count + 1)).astype(np.float32)
    shade = slopes[0][numbers] * position[:, None] + slopes[1][numbers] * position
    shade += _grain(random, side, numbers, count)
    colours = np.array(choose_colours(random, count + 1), dtype=np.float32)
    pixels = np.clip(colours[numbers] + shade[..., None], 0, 255).astype(np.uint8)
    mask = Image.fromarray((numbers > 0).astype(np.uint8) * 255).reduce(_FINE)
    return Image.fromarray(pixels).reduce(_FINE), mask


def _scattered(random: Generator, side: int, layers: float) -> tuple[npt.NDArray[np.int32], int]:
    """Number the leaf that each fine pixel shows, from 1; give the count too."""
    least, most = pick_scale(random, 1.2, 8), side * random.uniform(0.15, 0.5)
    # Where densities fall with the third power of the radius, every scale looks the same.
    power = random.uniform(1.3, 2.3)
    radii = least**-power - random.random(8 + side * side // 30) * (least**-power - most**-power)
    radii = radii ** (-1 / power)
    count = 1 + int(np.searchsorted(np.cumsum(np.pi * radii[1:] ** 2), layers * side * side))
    radii = radii[:count]
    centres = random.uniform(-0.05, 1.05, (count, 2)) * side * _FINE
    round_ones = random.choice([0.0, 0.5, 1.0])
    numbers = Image.new("I", (side * _FINE, side * _FINE))
    pen = ImageDraw.Draw(numbers)
    for number, (radius, (x, y)) in enumerate(zip(radii * _FINE, centres, strict=True), start=1):
        if random.random() < round_ones:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=number)
        else:
            draw_leaf(random, pen, (x, y), radius, number)
    return np.array(numbers), count


def _grain(random: Generator, side: int, numbers: npt.NDArray[np.int32], count: int) -> Field:
    """Give each leaf one of a few textures, in levels, from another place of it."""
    size = 1 << max(6, side.bit_length() - 1)
    bank = np.concatenate([spectrum(random, size).ravel() for _ in range(4)])
    strength = np.abs(random.normal(0, random.uniform(2, 24), count + 1)).astype(np.float32)
    kinds, starts = random.integers(0, 4, count + 1), random.integers(0, size * size, count + 1, dtype=np.int32)
    wrapped = np.arange(numbers.shape[0], dtype=np.int32) % size
    places = (starts[numbers] + wrapped[:, None] * size + wrapped) % (size * size)
    return bank[places + (kinds * size * size).astype(np.int32)[numbers]] * strength[numbers]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise TypeError("Pillow was built without FreeType: text cannot be drawn")
    return font


def _set(random: Generator, page: Image.Image, start: Point, size: float, lines: int, ink: Colour) -> float:
    """Set lines of words from a corner on, and give where the next line's top would be."""
    font = _font(max(6, round(size)))
    bold = size / 45 if random.random() < 0.25 else 0
    pen = ImageDraw.Draw(page)
    x, y = start
    width = random.uniform(0.5, 1.2) * page.width
    for _ in range(lines):
        line, marks = "", list[tuple[float, str]]()
        while font.getlength(line) < width:
            for letter in _word(random):
                if letter in _VOWELS and random.random() < 0.06:
                    marks.append((font.getlength(line) + font.getlength(letter) / 2, str(random.choice(list(_MARKS)))))
                line += letter
            line += " "
        pen.text((x, y), line, fill=ink, font=font, stroke_width=bold)
        for middle, mark in marks:
            rise = size * (0.3 if mark == "~" else 0.08)
            pen.text((x + middle, y - rise), mark, fill=ink, font=font, anchor="ma")
        y += size * random.uniform(1.1, 1.5)
    return y


def _word(random: Generator) -> str:
    fate = random.random()
    if fate < 0.12:
        return str(random.integers(10**6))[: int(random.integers(1, 7))] + str(random.choice(["", "%", ".", " $", "+"]))
    if fate < 0.17:
        return "".join(random.choice(list("#&@/()[]{}<>=*_-+|!?;:\\$"), int(random.integers(1, 4))))
    length = int(random.integers(1, 9))
    word = "".join(str(random.choice(list(_LETTERS if (step + length) % 2 else _VOWELS))) for step in range(length))
    if fate < 0.35:
        word = word.capitalize()
    elif fate < 0.42:
        word = word.upper()
    return word + (str(random.choice(list(",.;:!?"))) if random.random() < 0.15 else "")


def _gradient(random: Generator, side: int) -> Image.Image:
    """Shade the whole picture smoothly: along a line, around a point or in soft blobs."""
    rows, columns = grid(side, side)
    match int(random.integers(3)):
        case 0:
            angle = random.uniform(0, 2 * np.pi)
            field = rows * math.sin(angle) + columns * math.cos(angle)
        case 1:
            y, x = random.uniform(0, side, 2)
            field = np.hypot(rows - y, columns - x) ** random.uniform(0.5, 2)
        case _:
            field = powers(random, side, random.uniform(2.5, 3.5))
    return Image.fromarray(mapped(random, field.astype(np.float32)))


def _shaded(random: Generator, side: int, colour: Colour) -> Image.Image:
    """Make paper that is darker here and lighter there."""
    light = powers(random, 64, 2.5) * random.uniform(2, 16)
    light = np.array(Image.fromarray(light).resize((side, side), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(np.array(colour, dtype=np.float32) + light[..., None], 0, 255).astype(np.uint8))


def _finer(field: Field) -> Field:
    side = field.shape[0] * _FINE
    return np.array(Image.fromarray(field).resize((side, side), Image.Resampling.BICUBIC))


def _plain(side: int, colour: Colour) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def _reduced(random: Generator, page: Image.Image, side: int) -> Levels:
    """Bring a fine picture to its size: as a sensor does, or more sharply, as programs do."""
    if page.width == side:
        return np.array(page)
    kernels = [Image.Resampling.BOX, Image.Resampling.BOX, Image.Resampling.HAMMING, Image.Resampling.LANCZOS]
    return np.array(page.resize((side, side), kernels[int(random.integers(len(kernels)))]))
