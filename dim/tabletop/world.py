"""The world itself: things on a table, where they may lie, and how they look at any resolution.

Coordinates are fractions of the image: ``x`` to the right, ``y`` down, both in [0, 1]; radii are
fractions of the image's shorter side.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dim.errors import InputError

Array = NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 34, 40),
    "orange": (255, 132, 0),
    "yellow": (252, 226, 36),
    "green": (24, 160, 64),
    "cyan": (40, 206, 222),
    "blue": (36, 72, 214),
    "purple": (136, 40, 168),
    "pink": (255, 112, 182),
}
SIZES: dict[str, float] = {"small": 0.1, "large": 0.16}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "wood": (186, 144, 104),
    "slate": (56, 62, 72),
    "marble": (176, 184, 192),
    "white": (255, 255, 255),
}
STYLES = ("flat", "outline")
# The nine named places, in reading order, and the point each stands for: the middle of a ninth of
# the image, outer ones moved in so far that a large thing fits.
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.19, 0.19),
    "top": (0.5, 0.19),
    "top right": (0.81, 0.19),
    "left": (0.19, 0.5),
    "center": (0.5, 0.5),
    "right": (0.81, 0.5),
    "bottom left": (0.19, 0.81),
    "bottom": (0.5, 0.81),
    "bottom right": (0.81, 0.81),
}
# Every shape fits in a circle of this many radii, which is what "without overlap" is measured on.
_REACH = 1.15
_GAP = 0.02
_STROKE = 0.4


@dataclass(frozen=True)
class Thing:
    """One object: what it is and the point (fractions of the image) its centre lies on."""

    shape: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Nominal radius as a fraction of the image's shorter side."""
        return SIZES[self.size]

    @property
    def place(self) -> str:
        """Name of the ninth of the image that the centre lies in."""
        row, column = min(2, int(self.y * 3)), min(2, int(self.x * 3))
        return list(PLACES)[3 * row + column]

    def at(self, x: float, y: float) -> Thing:
        """The same thing elsewhere."""
        return replace(self, x=x, y=y)


@dataclass(frozen=True)
class Scene:
    """What is on the table. ``objects`` are kept in reading order (place by place, then x)."""

    objects: tuple[Thing, ...]
    background: str = "wood"
    style: str = "flat"

    def __post_init__(self) -> None:
        _check_names(self)
        object.__setattr__(self, "objects", tuple(sorted(self.objects, key=_reading_order)))

    def without(self, thing: Thing) -> Scene:
        """The scene with ``thing`` taken off the table."""
        return replace(self, objects=tuple(other for other in self.objects if other != thing))

    def having(self, *things: Thing) -> Scene:
        """The scene with ``things`` put on the table."""
        return replace(self, objects=(*self.objects, *things))

    def to_json(self) -> str:
        """The scene as one line of JSON, keys sorted."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Read :meth:`to_json`'s output; raises ``InputError`` where it is something else."""
        try:
            values: dict[str, Any] = json.loads(text)
            objects = tuple(Thing(**item) for item in values["objects"])
            return cls(objects, values["background"], values["style"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a tabletop scene: {error}") from None


def fits(thing: Thing, others: Sequence[Thing]) -> bool:
    """Whether ``thing`` lies inside the image and clear of ``others``."""
    margin = thing.radius * _REACH
    inside = margin <= thing.x <= 1 - margin and margin <= thing.y <= 1 - margin
    return inside and all(
        np.hypot(thing.x - other.x, thing.y - other.y)
        >= (thing.radius + other.radius) * _REACH + _GAP
        for other in others
    )


def sample_scene(
    rng: np.random.Generator,
    objects: tuple[int, int] = (2, 4),
    background: str | None = None,
    outlines: float = 0.2,
) -> Scene:
    """Draw a scene of ``objects`` = (fewest, most) things at free positions without overlap.

    No two things share both colour and shape, so that "the red circle" names one thing. Plain white
    is left to extraction; a share ``outlines`` of the scenes is drawn as outlines.
    """
    count = int(rng.integers(objects[0], objects[1] + 1))
    while True:
        things: list[Thing] = []
        for _ in range(60 * count):
            thing = sample_thing(rng, things)
            if thing is not None:
                things.append(thing)
            if len(things) == count:
                table = background or str(rng.choice([b for b in BACKGROUNDS if b != "white"]))
                style = "outline" if rng.random() < outlines else "flat"
                return Scene(tuple(things), table, style)


def sample_thing(rng: np.random.Generator, others: Sequence[Thing]) -> Thing | None:
    """Draw a thing that lies clear of ``others`` and is unlike them; ``None`` if the try failed."""
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    size = str(rng.choice(list(SIZES)))
    margin = SIZES[size] * _REACH
    x, y = (round(float(v), 3) for v in rng.uniform(margin, 1 - margin, 2))
    thing = Thing(shape, colour, size, x, y)
    new = all((shape, colour) != (other.shape, other.colour) for other in others)
    return thing if new and fits(thing, others) else None


def render(scene: Scene, size: int | tuple[int, int]) -> Image.Image:
    """Paint ``scene`` at ``size`` pixels (one side, or (width, height)), anti-aliased, RGB."""
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 1:
        raise InputError(f"cannot render a scene at {width}x{height} pixels")
    canvas = table(scene.background, width, height).copy()
    for thing in scene.objects:
        alpha, rows, columns = stamp(thing, scene.style, width, height)
        colour = np.asarray(COLOURS[thing.colour], np.float32)
        patch = canvas[rows, columns]
        canvas[rows, columns] = patch + alpha[..., None] * (colour - patch)
    return Image.fromarray(np.round(canvas).astype(np.uint8))


@functools.lru_cache(maxsize=32)
def table(background: str, width: int, height: int) -> Array:
    """The bare table as float32 RGB in [0, 255], (height, width, 3), with a faint grain."""
    y, x = np.meshgrid(_centres(height), _centres(width), indexing="ij")
    if background == "wood":
        grain = 7 * np.sin(2 * np.pi * (5 * y + 0.15 * np.sin(2 * np.pi * x)))
    elif background == "marble":
        grain = 6 * np.sin(2 * np.pi * (1.5 * x + 1.5 * y))
    else:
        grain = np.zeros_like(x)
    flat = np.asarray(BACKGROUNDS[background], np.float32)
    result: Array = np.clip(flat + grain[..., None], 0, 255).astype(np.float32)
    result.setflags(write=False)
    return result


def stamp(thing: Thing, style: str, width: int, height: int) -> tuple[Array, slice, slice]:
    """Coverage in [0, 1] of ``thing`` over the pixels it touches, and where those pixels are."""
    unit = min(width, height)
    cx, cy, radius = thing.x * width, thing.y * height, thing.radius * unit
    reach = radius * _REACH + 2
    rows = slice(max(0, int(cy - reach)), min(height, int(cy + reach) + 1))
    columns = slice(max(0, int(cx - reach)), min(width, int(cx + reach) + 1))
    y = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - cy)[:, None]
    x = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - cx)[None, :]
    distance = _signed_distance(thing.shape, x, y, radius)
    if style == "outline":
        half = _STROKE * radius / 2
        distance = np.abs(distance + half) - half
    return np.clip(0.5 - distance, 0, 1).astype(np.float32), rows, columns


def _signed_distance(shape: str, x: Array, y: Array, radius: float) -> Array:
    """Distance in pixels to the shape's edge, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - np.float32(0.92 * radius)
    return _polygon_distance(_corners(shape) * radius, x, y)


@functools.cache
def _corners(shape: str) -> NDArray[np.float64]:
    """Corners of a unit polygon, (n, 2), in order around the centre."""
    if shape == "square":
        return np.array([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)])
    count, inner = (3, 1.0) if shape == "triangle" else (10, 0.45)
    radii = np.where(np.arange(count) % 2 == 0, 1.0, inner) * _REACH
    angles = 2 * np.pi * np.arange(count) / count - np.pi / 2
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def _polygon_distance(corners: NDArray[np.float64], x: Array, y: Array) -> Array:
    """Signed distance to a polygon: nearest edge, negative where a ray crosses an odd number."""
    nearest = np.full(np.broadcast(x, y).shape, np.inf)
    inside = np.zeros(nearest.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(x - ax - along * ex, y - ay - along * ey))
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ex * (y - ay) / ey + ax)
    return np.where(inside, -nearest, nearest).astype(np.float32)


def _centres(count: int) -> NDArray[np.float64]:
    return (np.arange(count) + 0.5) / count


def _reading_order(thing: Thing) -> tuple[int, float, float]:
    return list(PLACES).index(thing.place), thing.x, thing.y


def _check_names(scene: Scene) -> None:
    known = [(scene.background, BACKGROUNDS, "background"), (scene.style, STYLES, "style")]
    for thing in scene.objects:
        known += [(thing.shape, SHAPES, "shape"), (thing.colour, COLOURS, "colour")]
        known += [(thing.size, SIZES, "size")]
    for name, names, what in known:
        if name not in names:
            raise InputError(f"unknown {what} {name!r}; there are {', '.join(names)}")
