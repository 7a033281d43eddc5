"""The checker: reads an image and says which things lie where, so that edits are measured.

It knows the world's shapes, colours and tables and nothing of the scene that should be there.
Pixels are given to the nearest colour of the world, connected pixels of one colour are a thing,
and the shape, size and style that explain its pixels best are its name. What no thing explains
counts against the image.
"""

from __future__ import annotations

import functools
import itertools
from bisect import insort
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

from dim.tabletop.world import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZES,
    STYLES,
    Array,
    Scene,
    Thing,
    render,
    stamp,
    table,
)

# Images are read at this many pixels a side at most; a larger one is scaled down.
_READ_AT = 128
# A pixel belongs to a table or colour within this RGB distance (the colours are >= 100 apart).
_TOLERANCE = 75.0
# Share of a template's area by which a thing's pixels may differ from it.
_WORST_FIT = 0.42
# A blot below this share of the smallest outline's pixels is noise and not a thing.
_NOISE = 0.45
# A thing is where it should be within this fraction of the image's side.
POSITION_TOLERANCE = 0.06
# Strictly exact: how much of a thing and its ideal drawing, taken together, both cover; and how far
# pixels that should stay as they are may be off on average, of 1.
LEAST_OVERLAP = 0.8
MOST_DRIFT = 0.03
# How many of the templates are tried at shifted positions, and the shifts in pixels.
_FINALISTS = 4
_SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
_ROUNDING = 1e-3  # of sums in single precision, more than there can be


@dataclass(frozen=True)
class Reading:
    """What an image shows: the scene, and how many blots on it are no thing of this world."""

    scene: Scene
    unknown: int


def read(image: Image.Image) -> Reading:
    """Say what lies on the table in ``image`` (any mode; at least 16 pixels a side)."""
    pixels = _pixels(image)
    height, width = pixels.shape[:2]
    background = _find_background(pixels)
    bare = table(background, width, height)
    labels = _classify(pixels, bare)
    named: list[tuple[Thing, str]] = []
    unknown = _strangers(labels)
    for colour, blot in _by_size(labels, width, height):
        if any(_is_rim(blot, thing) for thing, _ in named):
            continue
        found = _name(blot, colour, pixels, bare)
        if found is None:
            unknown += 1
        else:
            named.append(found)
    styles = [style for _, style in named]
    style = max(STYLES, key=styles.count) if styles else "flat"
    unknown += sum(other != style for other in styles)
    return Reading(Scene(tuple(thing for thing, _ in named), background, style), unknown)


def matches(reading: Reading, scene: Scene, tolerance: float = POSITION_TOLERANCE) -> bool:
    """Whether the image shows exactly ``scene``: table, style, and every thing in its place.

    ``tolerance`` is the largest distance between centres, as a fraction of the image's side.
    """
    found = reading.scene
    if reading.unknown or found.background != scene.background:
        return False
    if len(found.objects) != len(scene.objects):
        return False
    if scene.objects and found.style != scene.style:
        return False
    cost = np.array([[_apart(a, b) for b in scene.objects] for a in found.objects])
    if not cost.size:
        return True
    rows, columns = linear_sum_assignment(cost)
    return bool((cost[rows, columns] <= tolerance).all())


def exact(image: Image.Image, scene: Scene) -> bool:
    """Whether ``image`` shows exactly ``scene``; the unit of edit accuracy."""
    return matches(read(image), scene)


@dataclass(frozen=True)
class Judgement:
    """How well an image shows a scene.

    ``overlap`` is intersection over union of the worst drawn thing with its ideal drawing in its
    place (1 where there is none); ``drift`` is the mean absolute difference, from 0 to 1, of the
    pixels that should not have changed (0 where all may).
    """

    exact: bool
    overlap: float
    drift: float

    @property
    def strict(self) -> bool:
        """Exact, every thing well drawn, and nothing else changed."""
        return self.exact and self.overlap >= LEAST_OVERLAP and self.drift <= MOST_DRIFT


def judge(image: Image.Image, target: Scene, source: Scene | None = None) -> Judgement:
    """Judge an edit, or with ``source=None`` an image painted from nothing.

    Args:
        image: what was painted (any mode; at least 16 pixels a side).
        target: what it should show.
        source: what it was made of. Pixels that are the same in both scenes should not change.
    """
    return Judgement(exact(image, target), _overlap(image, target), _drift(image, target, source))


def exact_strictly(image: Image.Image, target: Scene, source: Scene | None = None) -> bool:
    """Whether ``image`` shows exactly ``target``, well drawn and otherwise as it was.

    Arguments as of :func:`judge`. :func:`exact` names a thing by what fits it best, so that a
    circle with a notch is a circle to it; here each thing has to be like its ideal drawing.
    """
    return judge(image, target, source).strict


def _overlap(image: Image.Image, scene: Scene) -> float:
    pixels, ideal = _pixels(image), _pixels(render(scene, image.size))
    height, width = pixels.shape[:2]
    bare = table(scene.background, width, height)
    found, wanted = (_nearest(*_distances(part, bare)) for part in (pixels, ideal))
    overlaps = [1.0]
    for thing in scene.objects:
        _, rows, columns = stamp(thing, scene.style, width, height)
        free = _free_of(scene.without(thing), width, height)[rows, columns]
        colour = list(COLOURS).index(thing.colour)
        one, other = (part[rows, columns] == colour for part in (found, wanted))
        union = int(((one | other) & free).sum())
        overlaps.append(int((one & other & free).sum()) / max(union, 1))
    return min(overlaps)


def _free_of(scene: Scene, width: int, height: int) -> NDArray[np.bool_]:
    """The pixels that no thing of ``scene`` touches."""
    free = np.ones((height, width), bool)
    for thing in scene.objects:
        alpha, rows, columns = stamp(thing, "flat", width, height)
        free[rows, columns] &= alpha == 0
    return free


def _drift(image: Image.Image, target: Scene, source: Scene | None) -> float:
    if source is None:
        return 0.0
    before, after = (_pixels(render(scene, image.size)) for scene in (source, target))
    same = (before == after).all(-1)
    return float(np.abs(_pixels(image) - after)[same].mean()) / 255 if same.any() else 0.0


def _apart(a: Thing, b: Thing) -> float:
    """Distance between two things' centres; out of reach when they are not the same thing."""
    if (a.shape, a.colour, a.size) != (b.shape, b.colour, b.size):
        return 10.0
    return float(np.hypot(a.x - b.x, a.y - b.y))


def _pixels(image: Image.Image) -> Array:
    image = image.convert("RGB")
    if min(image.size) > _READ_AT:
        scale = _READ_AT / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image, np.float32)


def _find_background(pixels: Array) -> str:
    """The table that most pixels agree with."""
    height, width = pixels.shape[:2]

    def agreeing(name: str) -> float:
        distance = np.linalg.norm(pixels - table(name, width, height), axis=-1)
        return float(np.maximum(0, 1 - distance / _TOLERANCE).sum())

    return max(BACKGROUNDS, key=agreeing)


def _classify(pixels: Array, bare: Array) -> NDArray[np.int64]:
    """Index into COLOURS for each pixel; -1 for the bare table, -2 for no colour of the world."""
    to_colours, to_table = _distances(pixels, bare)
    known = np.minimum(to_colours.min(-1), to_table) <= _TOLERANCE
    return np.where(known, _nearest(to_colours, to_table), -2)


def _nearest(to_colours: Array, to_table: Array) -> NDArray[np.int64]:
    """Index into COLOURS of the colour that each pixel is nearest to; -1 for the bare table."""
    return np.where(to_colours.min(-1) < to_table, to_colours.argmin(-1), -1)


def _distances(pixels: Array, bare: Array) -> tuple[Array, Array]:
    """How far each pixel is from every colour (H, W, colours), and from the bare table (H, W)."""
    palette = np.array(list(COLOURS.values()), np.float32)
    to_colours: Array = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    to_table: Array = np.linalg.norm(pixels - bare, axis=-1)
    return to_colours, to_table


def _by_size(
    labels: NDArray[np.int64], width: int, height: int
) -> list[tuple[str, NDArray[np.bool_]]]:
    """Blots of every colour, largest first, so that a thing is named before its rim."""
    found = [
        (colour, blot)
        for index, colour in enumerate(COLOURS)
        for blot in _blots(labels == index, width, height)
    ]
    return sorted(found, key=lambda item: -int(item[1].sum()))


def _is_rim(blot: NDArray[np.bool_], thing: Thing) -> bool:
    """Whether a blot is the blended edge of ``thing``: all of it close around the thing's face."""
    height, width = blot.shape
    rows, columns = np.nonzero(blot)
    x, y = (columns + 0.5) / width - thing.x, (rows + 0.5) / height - thing.y
    distance = np.hypot(x, y) / thing.radius
    return bool(distance.min() > 0.6 and distance.max() < 1.6)


def _blots(mask: NDArray[np.bool_], width: int, height: int) -> list[NDArray[np.bool_]]:
    """Connected regions of ``mask`` that are large enough to be a thing."""
    regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
    areas = ndimage.sum_labels(mask, regions, index=np.arange(1, count + 1))
    return [regions == i + 1 for i in range(count) if areas[i] >= _noise_area(width, height)]


@functools.cache
def _noise_area(width: int, height: int) -> float:
    smallest = min(
        float(stamp(Thing(shape, "red", "small", 0.5, 0.5), style, width, height)[0].sum())
        for shape in SHAPES
        for style in STYLES
    )
    return _NOISE * smallest


def _name(
    blot: NDArray[np.bool_], colour: str, pixels: Array, bare: Array
) -> tuple[Thing, str] | None:
    """The thing and style whose coverage is nearest to the blot's; ``None`` if none is near."""
    height, width = blot.shape
    near = ndimage.binary_dilation(blot, iterations=2)
    along = np.asarray(COLOURS[colour], np.float32) - bare
    share = ((pixels - bare) * along).sum(-1) / np.maximum((along * along).sum(-1), 1)
    observed = np.where(near, np.clip(share, 0, 1), 0)
    rows, columns = ndimage.center_of_mass(observed)
    x, y = (columns + 0.5) / width, (rows + 0.5) / height
    seen = _Seen(observed, observed.sum())
    # Most kinds are out of the question before their position matters.
    likely: list[tuple[float, _Kind]] = []
    for kind in itertools.product(SHAPES, SIZES, STYLES):
        worst = likely[-1][0] if len(likely) == _FINALISTS else np.inf
        insort(likely, (_misfit(kind, x, y, seen, worst), kind), key=itemgetter(0))
        del likely[_FINALISTS:]
    best = _Fit(np.inf, likely[0][1], x, y)
    for _, kind in likely:
        best = _shifted(kind, x, y, seen, best)
    shape, size, style = best.kind
    named = (Thing(shape, colour, size, best.x, best.y), style)
    return None if best.misfit > _WORST_FIT else named


class _Seen(NamedTuple):
    """How far each pixel is on the way from the table to a colour, and the sum of that."""

    shares: Array
    total: np.floating


_Kind = tuple[str, str, str]  # shape, size and style


class _Fit(NamedTuple):
    misfit: float
    kind: _Kind
    x: float
    y: float


def _shifted(kind: _Kind, x: float, y: float, seen: _Seen, best: _Fit) -> _Fit:
    """The best of a thing's fits over shifts of up to one pixel, and of ``best``."""
    height, width = seen.shares.shape
    for dy in _SHIFTS:
        for dx in _SHIFTS:
            place = x + dx / width, y + dy / height
            misfit = _misfit(kind, *place, seen, best.misfit)
            if misfit < best.misfit:
                best = _Fit(misfit, kind, *place)
    return best


def _misfit(kind: _Kind, x: float, y: float, seen: _Seen, worst: float) -> float:
    """Difference between a thing's coverage and the observed, per unit of its area; infinite where
    their sums alone are further apart than by ``worst``."""
    height, width = seen.shares.shape
    x, y = _half(x * width), _half(y * height)
    alpha, area, up, left = _template(*kind, width, height, x % 1, y % 1)
    top, start = int(y) - up, int(x) - left
    rows = slice(max(0, top), min(height, top + alpha.shape[0]))
    columns = slice(max(0, start), min(width, start + alpha.shape[1]))
    window = seen.shares[rows, columns]
    if window.shape != alpha.shape:  # some of it would lie beyond the edge
        alpha = alpha[rows.start - top : rows.stop - top, columns.start - start :][
            :, : window.shape[1]
        ]
        area = float(alpha.sum())
    elif abs(seen.total - area) > (worst + _ROUNDING) * max(area, 1.0):
        return np.inf
    difference = np.abs(window - alpha).sum() + seen.total - window.sum()
    return float(difference) / max(area, 1.0)


def _half(pixels: float) -> float:
    """Positions are told to half a pixel, so that a template is drawn once and not every time."""
    return round(2 * pixels) / 2


@functools.lru_cache(maxsize=1024)
def _template(
    shape: str, size: str, style: str, width: int, height: int, dx: float, dy: float
) -> tuple[Array, float, int, int]:
    """Coverage of a thing (dx, dy) pixels off a pixel's corner, its sum, and that corner's place
    in it."""
    column, row = width // 2, height // 2
    thing = Thing(shape, "red", size, (column + dx) / width, (row + dy) / height)
    alpha, rows, columns = stamp(thing, style, width, height)
    return alpha, float(alpha.sum()), row - rows.start, column - columns.start


def _strangers(labels: NDArray[np.int64]) -> int:
    """Blots of a colour that is not of this world; edges between two colours do not count."""
    height, width = labels.shape
    core = ndimage.binary_opening(labels == -2, structure=np.ones((3, 3)))
    return len(_blots(core, width, height))
