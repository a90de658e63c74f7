"""Scenes as pictures: 64 x 64 pixels, drawn four times as large and reduced so that small shapes keep their outline."""

from __future__ import annotations

import colorsys
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from omni.data.world import Scene, Thing

SIDE = 64  # pixels
_SCALE = 4  # drawn at 256 x 256
_DIAMETER = {"big": (26.0, 28.0), "small": (15.0, 17.0)}  # pixels, in a cell of 32

# hue in degrees, saturation, value
_COLOURS = {
    "red": (358, 0.92, 0.86),
    "orange": (27, 0.97, 1.00),
    "yellow": (54, 0.92, 1.00),
    "green": (128, 0.85, 0.60),
    "blue": (222, 0.88, 0.92),
    "purple": (284, 0.75, 0.66),
    "white": (0, 0.00, 1.00),
    "black": (0, 0.00, 0.04),
}


def draw(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene on a muted ground with light noise; every picture of one scene is a little different."""
    level = rng.uniform(0.48, 0.66)  # between black and white, and below every colour's saturation
    ground = [level + rng.uniform(-0.045, 0.045) for _ in range(3)]
    canvas = Image.new("RGB", (SIDE * _SCALE, SIDE * _SCALE), _rgb(ground))
    pen = ImageDraw.Draw(canvas)
    for thing in scene:
        _draw_thing(pen, thing, _rgb(ground), rng)
    pixels = np.asarray(canvas.reduce(_SCALE), dtype=np.float32)
    noise = np.random.default_rng(rng.getrandbits(64)).standard_normal(pixels.shape, dtype=np.float32)
    return Image.fromarray(np.clip(pixels + 2.5 * noise, 0, 255).round().astype(np.uint8))


def _rgb(colour: list[float] | tuple[float, float, float]) -> tuple[int, int, int]:
    red, green, blue = (round(255 * min(max(part, 0.0), 1.0)) for part in colour)
    return red, green, blue


def _colour(name: str, rng: random.Random) -> tuple[int, int, int]:
    """Vary a colour a little; the nearest two hues lie 27 degrees apart."""
    hue, saturation, value = _COLOURS[name]
    hue_shift, change = rng.uniform(-5, 5), rng.uniform(-0.04, 0.04)
    return _rgb(
        colorsys.hsv_to_rgb((hue + hue_shift) % 360 / 360, saturation + (change if saturation else 0), value + change)
    )


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, ground: tuple[int, int, int], rng: random.Random) -> None:
    diameter = rng.uniform(*_DIAMETER[thing.size])
    play = (SIDE / 2 - diameter) / 2  # how far the centre may leave the middle of its cell
    x = (thing.place % 2 + 0.5) * SIDE / 2 + rng.uniform(-play, play) * 0.8
    y = (thing.place // 2 + 0.5) * SIDE / 2 + rng.uniform(-play, play) * 0.8
    colour, radius = _colour(thing.colour, rng), diameter / 2 * _SCALE
    centre, turn = (x * _SCALE, y * _SCALE), math.radians(rng.uniform(-7, 7))
    if thing.shape in ("circle", "ring"):
        _disc(pen, centre, radius * 0.98, colour)
        if thing.shape == "ring":
            _disc(pen, centre, radius * 0.5, ground)
    else:
        pen.polygon(_outline(thing.shape, centre, radius, turn), fill=colour)


def _disc(pen: ImageDraw.ImageDraw, centre: tuple[float, float], radius: float, colour: tuple[int, int, int]) -> None:
    x, y = centre
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _outline(shape: str, centre: tuple[float, float], radius: float, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a shape that fills its circle or, for the square and the cross, nearly its box."""
    if shape == "square":
        points = [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    elif shape == "triangle":
        points = [(0.0, -1.0), (0.98, 0.85), (-0.98, 0.85)]
    elif shape == "cross":
        arm, end = 0.3, 1.0
        points = [(-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm)]
        points += [(-x, -y) for x, y in points]
    else:  # a star of five points
        lengths = [1.1 if i % 2 == 0 else 0.44 for i in range(10)]
        points = [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(lengths)]
    sine, cosine = math.sin(turn), math.cos(turn)
    return [
        (centre[0] + radius * (x * cosine - y * sine), centre[1] + radius * (x * sine + y * cosine)) for x, y in points
    ]
