"""Edits: a source scene, an instruction, the exact target, and the oracle's blueprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from dim.blueprint import Blueprint
from dim.errors import InputError
from dim.tabletop import operations as ops
from dim.tabletop.references import SIDES, Reference, name, point_at
from dim.tabletop.world import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Scene, sample_scene

# ImgEdit's kinds, as far as a tabletop can express them, and "count", which always needs design.
KINDS = (
    "add",
    "remove",
    "replace",
    "adjust",
    "background",
    "style",
    "extract",
    "move",
    "compose",
    "count",
)
Sampler = Callable[[np.random.Generator, Scene, bool], ops.Operation]
# A move shorter than this could be missed by a reader of the image.
_SHORTEST_MOVE = 0.25
_TRIES = 50


@dataclass(frozen=True)
class Edit:
    """One edit. ``referential`` says that the instruction names its object only indirectly."""

    kind: str
    referential: bool
    instruction: str
    source: Scene
    target: Scene
    blueprint: Blueprint


def understand(scene: Scene, instruction: str) -> Edit:
    """What ``instruction`` means on ``scene``: this is the oracle.

    Raises:
        InputError: the instruction is none of this world's, or the scene does not allow it.
    """
    return _edit(scene, ops.parse(instruction))


def sample_edit(
    rng: np.random.Generator,
    *,
    kinds: Sequence[str] = KINDS,
    referential: float = 0.3,
    objects: tuple[int, int] = (2, 4),
    outlines: float = 0.2,
) -> Edit:
    """Draw an edit: the kind evenly from ``kinds``, then a scene that allows it.

    Args:
        rng: source of randomness; the same state gives the same edit.
        kinds: some of :data:`KINDS`.
        referential: share of referential instructions among the kinds that have both forms.
        objects: (fewest, most) things on the source table.
        outlines: share of sources that are drawn as outlines.

    Raises:
        InputError: a kind is unknown.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise InputError(f"unknown kinds of edit {unknown}; there are {', '.join(KINDS)}")
    kind = str(rng.choice(list(kinds)))
    indirect = bool(rng.random() < referential)
    while True:
        scene = sample_scene(rng, objects, outlines=outlines)
        try:
            operation = _SAMPLERS[kind](rng, scene, indirect)
            edit = _edit(scene, operation)
        except InputError:
            continue
        if kind == "count" or edit.referential == (indirect and kind not in _DIRECT_ONLY):
            return edit


def another_edit(rng: np.random.Generator, edit: Edit) -> Edit:
    """Another edit of the same kind on the same source, with another target.

    Raises:
        InputError: the scene allows none that is found in a few tries.
    """
    for _ in range(_TRIES):
        with suppress(InputError):
            other = _edit(edit.source, _SAMPLERS[edit.kind](rng, edit.source, edit.referential))
            if other.target != edit.target:
                return other
    raise InputError(f"there is no other edit like {edit.instruction!r}")


def lay_out(scene: Scene) -> str:
    """The scene at a glance: "A wood table with 3 objects"."""
    drawn = " drawn as outlines" if scene.style == "outline" else ""
    count = len(scene.objects)
    return f"A {scene.background} table with {count} object{'s' * (count != 1)}{drawn}"


def list_objects(scene: Scene) -> str:
    """Every thing in reading order."""
    return "; ".join(map(ops.describe, scene.objects)) or "nothing"


def caption(scene: Scene) -> str:
    """A long caption: count, table, style, every thing, and how neighbours lie to each other."""
    parts = [lay_out(scene), list_objects(scene)]
    for a, b in zip(scene.objects, scene.objects[1:], strict=False):
        side = _side(a.x - b.x, a.y - b.y)
        parts.append(f"the {a.colour} {a.shape} is {side} the {b.colour} {b.shape}")
    return ". ".join(parts) + "."


def _edit(scene: Scene, operation: ops.Operation) -> Edit:
    target = operation.apply(scene)
    if target == scene:
        raise InputError(f"{operation.text!r} changes nothing")
    blueprint = Blueprint(
        instruction=operation.text,
        global_layout=lay_out(scene),
        local_objects=list_objects(scene),
        edit_area=operation.area(scene),
        imagination=operation.outcome(scene),
    )
    return Edit(operation.kind, operation.referential, operation.text, scene, target, blueprint)


def _side(dx: float, dy: float) -> str:
    """The side on which a thing lies that is (dx, dy) off, along the axis that parts them more."""
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _pick(rng: np.random.Generator, scene: Scene, indirect: bool) -> Reference:
    """A reference to a thing drawn evenly; raises ``InputError`` where none points at it."""
    thing = scene.objects[int(rng.integers(len(scene.objects)))]
    reference = point_at(rng, scene, thing) if indirect else name(scene, thing)
    if reference is None:
        raise InputError("no phrase points at that object")
    return reference


def _one(rng: np.random.Generator, words: Sequence[str] | dict[str, object]) -> str:
    return str(rng.choice(list(words)))


def _sample_add(rng: np.random.Generator, scene: Scene, indirect: bool) -> ops.Operation:
    what = _one(rng, [*SIZES]), _one(rng, [*COLOURS]), _one(rng, SHAPES)
    if any(what[1:] == (thing.colour, thing.shape) for thing in scene.objects):
        raise InputError("there is one like it already")
    if not indirect:
        return ops.Add(*what, place=_one(rng, [*PLACES]))
    return ops.Add(*what, side=_one(rng, [*SIDES]), beside=_pick(rng, scene, False))


def _sample_replace(rng: np.random.Generator, scene: Scene, indirect: bool) -> ops.Operation:
    reference = _pick(rng, scene, indirect)
    colour, shape = _one(rng, [*COLOURS]), _one(rng, SHAPES)
    if shape == reference.resolve(scene).shape:
        raise InputError("replacing means another shape")
    return ops.Replace(reference, colour, shape)


def _sample_adjust(rng: np.random.Generator, scene: Scene, indirect: bool) -> ops.Operation:
    reference = _pick(rng, scene, indirect)
    if rng.random() < 0.3:
        return ops.Resize(reference, _one(rng, [*SIZES]))
    return ops.Recolour(reference, _one(rng, [*COLOURS]))


def _sample_move(rng: np.random.Generator, scene: Scene, indirect: bool) -> ops.Operation:
    reference, place = _pick(rng, scene, indirect), _one(rng, [*PLACES])
    thing, (x, y) = reference.resolve(scene), PLACES[place]
    if np.hypot(thing.x - x, thing.y - y) < _SHORTEST_MOVE:
        raise InputError("too short a move")
    return ops.Move(reference, place)


def _sample_background(rng: np.random.Generator, scene: Scene, indirect: bool) -> ops.Operation:
    return ops.Background(_one(rng, [table for table in BACKGROUNDS if table != "white"]))


def _sample_style(rng: np.random.Generator, scene: Scene, indirect: bool) -> ops.Operation:
    return ops.Style("flat" if scene.style == "outline" else "outline")


def _sample_count(rng: np.random.Generator, scene: Scene, indirect: bool) -> ops.Operation:
    shape, like = rng.choice(SHAPES, 2, replace=False)
    if not any(thing.shape == like for thing in scene.objects):
        raise InputError("nothing to count")
    return ops.Match(str(shape), str(like))


def _sample_compose(rng: np.random.Generator, scene: Scene, indirect: bool) -> ops.Operation:
    kinds = ("add", "remove", "replace", "adjust", "background", "move")
    first_kind, second_kind = (str(kind) for kind in rng.choice(kinds, 2, replace=False))
    first = _SAMPLERS[first_kind](rng, scene, indirect)
    between = first.apply(scene)
    if not between.objects:
        raise InputError("the first step leaves nothing to change")
    return ops.Compose(first, _SAMPLERS[second_kind](rng, between, False))


def _on(operation: Callable[[Reference], ops.Operation]) -> Sampler:
    return lambda rng, scene, indirect: operation(_pick(rng, scene, indirect))


_DIRECT_ONLY = ("background", "style")
_SAMPLERS: dict[str, Sampler] = {
    "add": _sample_add,
    "remove": _on(ops.Remove),
    "replace": _sample_replace,
    "adjust": _sample_adjust,
    "background": _sample_background,
    "style": _sample_style,
    "extract": _on(ops.Extract),
    "move": _sample_move,
    "compose": _sample_compose,
    "count": _sample_count,
}
