"""Noun phrases that point at one thing on the table, direct ("the red circle") or referential.

A phrase is built from a scene, written as text, read back from text, and resolved in a scene:
``parse_reference(reference.text) == reference`` and ``reference.resolve(scene)`` is the thing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dim.errors import InputError
from dim.tabletop.world import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing

_EXTREMES: dict[str, Callable[[Thing], float]] = {
    "leftmost": lambda t: t.x,
    "rightmost": lambda t: -t.x,
    "topmost": lambda t: t.y,
    "bottommost": lambda t: -t.y,
}
# The direction of a side, as a unit step in image coordinates.
SIDES: dict[str, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
# Differences below this are not asked about: a reader of the image could not be sure.
_MARGIN = 0.07


def alternatives(words: Sequence[str] | dict[str, object]) -> str:
    """A regular expression for any of ``words``, longest first."""
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_COLOUR, _SHAPE = alternatives(list(COLOURS)), alternatives(SHAPES)
_SIZE, _PLACE, _SIDE = alternatives(list(SIZES)), alternatives(list(PLACES)), alternatives([*SIDES])
_NAMED = re.compile(rf"the (?:({_SIZE}) )?({_COLOUR}) ({_SHAPE})(?: at the ({_PLACE}))?")
_EXTREME = re.compile(rf"the ({alternatives(list(_EXTREMES))}) object")
_ONLY = re.compile(rf"the only ({_SHAPE}|{_SIZE} object)")
_NEAREST = re.compile(r"the object closest to (.+)")
_RANKED = re.compile(rf"the (largest|smallest) object ({_SIDE}) (.+)")


@dataclass(frozen=True)
class Reference:
    """A noun phrase. ``form`` is one of named, extreme, only, nearest, ranked.

    ``anchor`` is the named thing that a referential phrase leans on, where it has one.
    """

    form: str
    text: str
    words: tuple[str | None, ...] = ()
    anchor: Reference | None = None

    def resolve(self, scene: Scene) -> Thing:
        """The one thing meant; raises ``InputError`` when there is none or more than one."""
        found = _RESOLVERS[self.form](self, scene)
        if len(found) != 1:
            raise InputError(f"{len(found)} objects on the table are {self.text!r}")
        return found[0]


def parse_reference(text: str) -> Reference:
    """Read a noun phrase; raises ``InputError`` when it is none of the known forms."""
    if match := _NAMED.fullmatch(text):
        return Reference("named", text, match.groups())
    if match := _EXTREME.fullmatch(text):
        return Reference("extreme", text, match.groups())
    if match := _ONLY.fullmatch(text):
        return Reference("only", text, (match[1].removesuffix(" object"),))
    if match := _NEAREST.fullmatch(text):
        return Reference("nearest", text, (), parse_reference(match[1]))
    if match := _RANKED.fullmatch(text):
        return Reference("ranked", text, (match[1], match[2]), parse_reference(match[3]))
    raise InputError(f"no way to point at an object: {text!r}")


def name(scene: Scene, thing: Thing) -> Reference:
    """The shortest direct phrase that names ``thing`` alone."""
    short = f"the {thing.colour} {thing.shape}"
    sized = f"the {thing.size} {thing.colour} {thing.shape}"
    for text in (short, sized, f"{short} at the {thing.place}", f"{sized} at the {thing.place}"):
        reference = parse_reference(text)
        if len(_named(reference, scene)) == 1:
            return reference
    raise InputError(f"two objects on the table look alike: {sized}")


def point_at(rng: np.random.Generator, scene: Scene, thing: Thing) -> Reference | None:
    """A referential phrase for ``thing`` that no reader could mistake; ``None`` if there is none.

    The form is drawn first and evenly among those that fit, so that none crowds out the others.
    """
    by_form: dict[str, list[Reference]] = {}
    for text in _phrases(scene, thing):
        reference = parse_reference(text)
        if _clearly(reference, scene, thing):
            by_form.setdefault(reference.form, []).append(reference)
    if not by_form:
        return None
    choices = by_form[str(rng.choice(sorted(by_form)))]
    return choices[int(rng.integers(len(choices)))]


def _phrases(scene: Scene, thing: Thing) -> list[str]:
    texts = [f"the {extreme} object" for extreme in _EXTREMES]
    texts += [f"the only {thing.shape}", f"the only {thing.size} object"]
    for other in scene.objects:
        if other != thing:
            anchor = name(scene, other).text
            texts.append(f"the object closest to {anchor}")
            texts += [
                f"the {r} object {s} {anchor}" for r in ("largest", "smallest") for s in SIDES
            ]
    return texts


def _clearly(reference: Reference, scene: Scene, thing: Thing) -> bool:
    """Whether the phrase still means ``thing`` when every distance is judged with a margin."""
    if _RESOLVERS[reference.form](reference, scene) != [thing]:
        return False
    rivals = [other for other in scene.objects if other != thing]
    if reference.form == "extreme":
        key = _EXTREMES[str(reference.words[0])]
        return all(key(other) - key(thing) > _MARGIN for other in rivals)
    if reference.anchor is None:
        return True
    anchor = reference.anchor.resolve(scene)
    if reference.form == "nearest":
        rivals.remove(anchor)
        return all(_apart(other, anchor) - _apart(thing, anchor) > _MARGIN for other in rivals)
    dx, dy = SIDES[str(reference.words[1])]
    beyond = [abs(dx * (o.x - anchor.x) + dy * (o.y - anchor.y)) for o in scene.objects]
    return all(b > _MARGIN for b, o in zip(beyond, scene.objects, strict=True) if o != anchor)


def _named(reference: Reference, scene: Scene) -> list[Thing]:
    size, colour, shape, place = reference.words
    return [
        thing
        for thing in scene.objects
        if (thing.colour, thing.shape) == (colour, shape)
        and size in (None, thing.size)
        and place in (None, thing.place)
    ]


def _extreme(reference: Reference, scene: Scene) -> list[Thing]:
    return sorted(scene.objects, key=_EXTREMES[str(reference.words[0])])[:1]


def _only(reference: Reference, scene: Scene) -> list[Thing]:
    return [thing for thing in scene.objects if reference.words[0] in (thing.shape, thing.size)]


def _nearest(reference: Reference, scene: Scene) -> list[Thing]:
    anchor = _anchor(reference, scene)
    others = [thing for thing in scene.objects if thing != anchor]
    return sorted(others, key=lambda thing: _apart(thing, anchor))[:1]


def _ranked(reference: Reference, scene: Scene) -> list[Thing]:
    """Things on that side of the anchor that are strictly the largest or smallest there."""
    rank, side = reference.words
    anchor = _anchor(reference, scene)
    dx, dy = SIDES[str(side)]
    there = [t for t in scene.objects if dx * (t.x - anchor.x) + dy * (t.y - anchor.y) > 0]
    radii = [thing.radius for thing in there]
    wanted = (max if rank == "largest" else min)(radii, default=0.0)
    return [thing for thing in there if thing.radius == wanted]


def _anchor(reference: Reference, scene: Scene) -> Thing:
    if reference.anchor is None:
        raise InputError(f"{reference.text!r} names no other object")
    return reference.anchor.resolve(scene)


def _apart(a: Thing, b: Thing) -> float:
    return float(np.hypot(a.x - b.x, a.y - b.y))


_RESOLVERS: dict[str, Callable[[Reference, Scene], list[Thing]]] = {
    "named": _named,
    "extreme": _extreme,
    "only": _only,
    "nearest": _nearest,
    "ranked": _ranked,
}
