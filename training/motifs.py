"""Figures, patterns and charts that a pen draws: what line art is made of.

Sizes are in fine pixels, `FINEST` of which are one of the finished picture.
"""

import math

import numpy as np
from numpy.random import Generator
from PIL import ImageDraw

from training.fields import pick_scale
from training.palettes import Colour, contrasting, nearby

FINEST = 4
"""Line art has nothing but edges: sixteen samples a pixel."""

Point = tuple[float, float]


def draw_motif(random: Generator, pen: ImageDraw.ImageDraw, corner: Point, reach: float, ink: Colour) -> None:
    """Draw something chosen at random into a square of that side; some of it may stick out."""
    _MOTIFS[int(random.integers(len(_MOTIFS)))](random, pen, corner, reach, ink)


def draw_leaf(random: Generator, pen: ImageDraw.ImageDraw, centre: Point, radius: float, fill: int) -> None:
    """Fill a polygon around a centre: regular, ragged, or as round as an ellipse on its side."""
    corners = int(random.choice([3, 4, 4, 5, 6, 9, 48]))
    turns = (np.arange(corners) + random.random()) * 2 * np.pi / corners
    reach = radius * (random.uniform(0.4, 1.3, corners) if 5 <= corners <= 9 else np.ones(corners))
    slim, lean = random.uniform(0.25, 1), random.uniform(0, np.pi)
    x, y = reach * np.cos(turns), reach * np.sin(turns) * slim
    across, down = x * math.cos(lean) - y * math.sin(lean), x * math.sin(lean) + y * math.cos(lean)
    pen.polygon(list(zip(centre[0] + across, centre[1] + down, strict=True)), fill=fill)


def _curves(random: Generator, pen: ImageDraw.ImageDraw, corner: Point, reach: float, ink: Colour) -> None:
    steps = np.linspace(0, 1, 40)[:, None]
    for _ in range(int(random.integers(1, 12))):
        a, b, c, d = random.uniform(0, reach, (4, 2)) + corner
        if random.random() < 0.4:
            b, c = a, d
        path = a * (1 - steps) ** 3 + 3 * b * steps * (1 - steps) ** 2 + 3 * c * steps**2 * (1 - steps) + d * steps**3
        # Pillow's wide lines come apart where a path has short steps; the outline of one does not.
        away = np.gradient(path, axis=0)[:, ::-1] * (-1, 1)
        away *= _stroke(random) / 2 / np.hypot(*away.T).clip(1e-6)[:, None]
        pen.polygon([(x, y) for x, y in (*(path + away), *(path - away)[::-1])], fill=ink)


def _rings(random: Generator, pen: ImageDraw.ImageDraw, corner: Point, reach: float, ink: Colour) -> None:
    gap = random.uniform(2, 20) * FINEST
    width = max(2, round(gap * random.uniform(0.1, 0.7)))
    flat = random.uniform(0.4, 1)
    for inset in np.arange(0, reach / 2, gap)[: int(random.integers(1, 40))]:
        box = (corner[0] + inset, corner[1] + inset * flat)
        far = (corner[0] + reach - inset, corner[1] + (reach - inset) * flat)
        if far[0] > box[0] and far[1] > box[1]:
            pen.ellipse((*box, *far), outline=ink, width=width)


def _polygons(random: Generator, pen: ImageDraw.ImageDraw, corner: Point, reach: float, ink: Colour) -> None:
    for _ in range(int(random.integers(1, 6))):
        points = [(x, y) for x, y in random.uniform(0, reach, (int(random.integers(3, 8)), 2)) + corner]
        fill = ink if random.random() < 0.4 else None
        pen.polygon(points, fill=fill, outline=ink, width=_stroke(random))


def _hatching(random: Generator, pen: ImageDraw.ImageDraw, corner: Point, reach: float, ink: Colour) -> None:
    gap, width = random.uniform(2.2, 14) * FINEST, _stroke(random, 2)
    for _ in range(int(random.integers(1, 3))):
        slope = random.uniform(-1, 1)
        upright = random.random() < 0.5
        for place in np.arange(0, reach, gap):
            ends = ((place, 0.0), (place + slope * reach, reach))
            (x0, y0), (x1, y1) = ends if upright else [(y, x) for x, y in ends]
            line = (corner[0] + x0, corner[1] + y0, corner[0] + x1, corner[1] + y1)
            pen.line(line, fill=ink, width=width)


def _tiles(random: Generator, pen: ImageDraw.ImageDraw, corner: Point, reach: float, ink: Colour) -> None:
    """Draw a checkerboard, or bricks."""
    wide = int(random.integers(1, 24)) * FINEST
    bricks = random.random() < 0.5
    high = wide if random.random() < 0.5 else max(FINEST, wide // 2)
    joint = int(random.integers(1, 4)) * FINEST if bricks else 0
    shades = [ink, *(nearby(random, ink) for _ in range(3))]
    for row, y in enumerate(np.arange(corner[1], corner[1] + reach, high + joint)):
        first = corner[0] - (row % 2) * (wide + joint) / (2 if bricks else 1)
        for x in np.arange(first, corner[0] + reach, (wide + joint) * (1 if bricks else 2)):
            shade = shades[int(random.integers(4))] if bricks else ink
            pen.rectangle((x, y, x + wide - 1, y + high - 1), fill=shade)


def _ruled(random: Generator, pen: ImageDraw.ImageDraw, corner: Point, reach: float, ink: Colour) -> None:
    """Rule a grid with lines of whole pixels."""
    gap, width = int(random.integers(2, 30)) * FINEST, int(random.choice([1, 1, 1, 2, 3])) * FINEST
    for place in np.arange(0, reach, gap):
        x, y = corner[0] + place, corner[1] + place
        pen.rectangle((x, corner[1], x + width - 1, corner[1] + reach - 1), fill=ink)
        pen.rectangle((corner[0], y, corner[0] + reach - 1, y + width - 1), fill=ink)


def _chart(random: Generator, pen: ImageDraw.ImageDraw, corner: Point, reach: float, ink: Colour) -> None:
    x, y = corner
    pen.line((x, y, x, y + reach, x + reach, y + reach), fill=ink, width=FINEST)
    bars = int(random.integers(3, 25))
    heights = np.clip(0.5 + np.cumsum(random.normal(0, 0.15, bars)), 0.02, 1) * reach
    step = reach / bars
    for number, height in enumerate(heights):
        left = x + number * step
        pen.rectangle((left + step / 5, y + reach - height, left + step, y + reach), fill=nearby(random, ink))
    line = [(x + (number + 0.5) * step, y + height) for number, height in enumerate(random.permutation(heights))]
    pen.line(line, fill=contrasting(random, ink)[1], width=_stroke(random), joint="curve")


def _star(random: Generator, pen: ImageDraw.ImageDraw, corner: Point, reach: float, ink: Colour) -> None:
    """Draw wedges that narrow towards a point, through every frequency."""
    rays, radius = int(random.integers(4, 60)), reach / 2
    centre = (corner[0] + radius, corner[1] + radius)
    for turn in (np.arange(rays) + random.random()) * 2 * np.pi / rays:
        edges = (turn, turn + np.pi / rays)
        rim = [(centre[0] + radius * np.cos(edge), centre[1] + radius * np.sin(edge)) for edge in edges]
        pen.polygon([centre, *rim], fill=ink)


_MOTIFS = (_curves, _curves, _rings, _polygons, _hatching, _tiles, _ruled, _chart, _star)


def _stroke(random: Generator, most: float = 6) -> int:
    """Give a line's fine width: half a pixel to `most` pixels, thin ones more often."""
    return round(pick_scale(random, 0.5, most) * FINEST)
