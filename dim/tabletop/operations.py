"""What can be done to a table: one class per operation, from words to the exact resulting scene.

Every operation reads and writes its own instruction (``parse(op.text)`` equals ``op``), applies
itself to a scene, and says where it acts and what comes of it, which are the last two sections of
a blueprint. An operation that a scene does not allow raises ``InputError``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Protocol

from dim.errors import InputError
from dim.tabletop.references import SIDES, Reference, alternatives, parse_reference
from dim.tabletop.world import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    fits,
)

_COLOUR, _SHAPE = alternatives(list(COLOURS)), alternatives(SHAPES)
_SIZE, _PLACE = alternatives(list(SIZES)), alternatives(list(PLACES))
_SIDE, _TABLE = alternatives([*SIDES]), alternatives(list(BACKGROUNDS))
_REST = "the rest is unchanged"
_STYLE_TEXTS = {"outline": "draw all objects as outlines", "flat": "fill all objects with colour"}
# "Left of X" puts a new thing this far from X's centre: two large ones lie clear of each other.
_BESIDE = 0.39


class Operation(Protocol):
    """One change to a scene, as the instruction ``text`` asks for it."""

    kind: ClassVar[str]

    @property
    def text(self) -> str:
        """The instruction."""

    @property
    def referential(self) -> bool:
        """Whether the instruction must be resolved against the image before it can be painted."""

    def apply(self, scene: Scene) -> Scene:
        """The exact target."""

    def area(self, scene: Scene) -> str:
        """Where in ``scene`` the change goes."""

    def outcome(self, scene: Scene) -> str:
        """How the changed part looks afterwards."""


def describe(thing: Thing) -> str:
    """A thing in the words of a blueprint: "large red circle, top left"."""
    return f"{thing.size} {thing.colour} {thing.shape}, {thing.place}"


def placed(scene: Scene, thing: Thing) -> Scene:
    """``scene`` with ``thing`` on it; raises ``InputError`` where there is no room."""
    if not fits(thing, scene.objects):
        raise InputError(f"no room on the table for a {describe(thing)}")
    return scene.having(thing)


@dataclass(frozen=True)
class _OnThing:
    """Base of the operations that act on one thing."""

    reference: Reference

    @property
    def referential(self) -> bool:
        return self.reference.form != "named"

    def area(self, scene: Scene) -> str:
        return describe(self.reference.resolve(scene))


@dataclass(frozen=True)
class Remove(_OnThing):
    """Take one thing off the table."""

    kind: ClassVar[str] = "remove"

    @property
    def text(self) -> str:
        return f"remove {self.reference.text}"

    def apply(self, scene: Scene) -> Scene:
        return scene.without(self.reference.resolve(scene))

    def outcome(self, scene: Scene) -> str:
        return f"empty {scene.background}, {self.reference.resolve(scene).place}; {_REST}"


@dataclass(frozen=True)
class _Alter(_OnThing):
    """Base of the operations that change one thing where it lies."""

    def altered(self, thing: Thing) -> Thing:
        raise TypeError(f"{type(self).__name__} does not say what it makes of a thing")

    def apply(self, scene: Scene) -> Scene:
        thing = self.reference.resolve(scene)
        changed = self.altered(thing)
        if changed == thing:
            raise InputError(f"{self.reference.text} is a {describe(thing)} already")
        others = scene.without(thing)
        # One that grows no larger has its room, also where a place that was read off an image is a
        # little too near to something.
        return placed(others, changed) if changed.radius > thing.radius else others.having(changed)

    def outcome(self, scene: Scene) -> str:
        return f"{describe(self.altered(self.reference.resolve(scene)))}; {_REST}"


@dataclass(frozen=True)
class Replace(_Alter):
    """Put another thing of the same size in a thing's place."""

    colour: str
    shape: str
    kind: ClassVar[str] = "replace"

    @property
    def text(self) -> str:
        return f"replace {self.reference.text} with {_a(self.colour)} {self.shape}"

    def altered(self, thing: Thing) -> Thing:
        return replace(thing, colour=self.colour, shape=self.shape)


@dataclass(frozen=True)
class Recolour(_Alter):
    """Give one thing another colour."""

    colour: str
    kind: ClassVar[str] = "adjust"

    @property
    def text(self) -> str:
        return f"make {self.reference.text} {self.colour}"

    def altered(self, thing: Thing) -> Thing:
        return replace(thing, colour=self.colour)


@dataclass(frozen=True)
class Resize(_Alter):
    """Make one thing large or small."""

    size: str
    kind: ClassVar[str] = "adjust"

    @property
    def text(self) -> str:
        return f"make {self.reference.text} {self.size}"

    def altered(self, thing: Thing) -> Thing:
        return replace(thing, size=self.size)


@dataclass(frozen=True)
class Move(_OnThing):
    """Move one thing to the middle of a named place."""

    place: str
    kind: ClassVar[str] = "move"

    @property
    def text(self) -> str:
        return f"move {self.reference.text} to the {self.place}"

    def apply(self, scene: Scene) -> Scene:
        thing = self.reference.resolve(scene)
        return placed(scene.without(thing), thing.at(*PLACES[self.place]))

    def area(self, scene: Scene) -> str:
        return f"{describe(self.reference.resolve(scene))}; free place, {self.place}"

    def outcome(self, scene: Scene) -> str:
        thing = self.reference.resolve(scene)
        moved = describe(thing.at(*PLACES[self.place]))
        return f"{moved}; empty {scene.background}, {thing.place}; {_REST}"


@dataclass(frozen=True)
class Extract(_OnThing):
    """Keep one thing alone, on plain white."""

    kind: ClassVar[str] = "extract"

    @property
    def text(self) -> str:
        return f"extract {self.reference.text}"

    def apply(self, scene: Scene) -> Scene:
        return Scene((self.reference.resolve(scene),), "white", scene.style)

    def outcome(self, scene: Scene) -> str:
        return f"only the {describe(self.reference.resolve(scene))}, on plain white"


@dataclass(frozen=True)
class Add:
    """Put a new thing at a named place, or beside another thing."""

    size: str
    colour: str
    shape: str
    place: str | None = None
    side: str | None = None
    beside: Reference | None = None
    kind: ClassVar[str] = "add"

    @property
    def text(self) -> str:
        where = f"at the {self.place}" if self.beside is None else f"{self.side} {self.beside.text}"
        return f"add a {self.size} {self.colour} {self.shape} {where}"

    @property
    def referential(self) -> bool:
        return self.beside is not None

    def thing(self, scene: Scene) -> Thing:
        """The new thing, where it will lie."""
        if self.place is not None:
            return Thing(self.shape, self.colour, self.size, *PLACES[self.place])
        if self.beside is None or self.side is None:
            raise InputError(f"nowhere to put the {self.size} {self.colour} {self.shape}")
        anchor, (dx, dy) = self.beside.resolve(scene), SIDES[self.side]
        x, y = round(anchor.x + dx * _BESIDE, 3), round(anchor.y + dy * _BESIDE, 3)
        return Thing(self.shape, self.colour, self.size, x, y)

    def apply(self, scene: Scene) -> Scene:
        return placed(scene, self.thing(scene))

    def area(self, scene: Scene) -> str:
        return f"free place, {self.thing(scene).place}"

    def outcome(self, scene: Scene) -> str:
        return f"{describe(self.thing(scene))}; {_REST}"


@dataclass(frozen=True)
class Background:
    """Change the table under the things."""

    background: str
    kind: ClassVar[str] = "background"
    referential: ClassVar[bool] = False

    @property
    def text(self) -> str:
        return f"change the background to {self.background}"

    def apply(self, scene: Scene) -> Scene:
        if scene.background == self.background:
            raise InputError(f"the background is {self.background} already")
        return replace(scene, background=self.background)

    def area(self, scene: Scene) -> str:
        return f"the {scene.background} background"

    def outcome(self, scene: Scene) -> str:
        return f"the same objects on {self.background}"


@dataclass(frozen=True)
class Style:
    """Draw everything as outlines, or fill everything with colour."""

    style: str
    kind: ClassVar[str] = "style"
    referential: ClassVar[bool] = False

    @property
    def text(self) -> str:
        return _STYLE_TEXTS[self.style]

    def apply(self, scene: Scene) -> Scene:
        if scene.style == self.style:
            raise InputError(f"the drawing style is {self.style} already")
        return replace(scene, style=self.style)

    def area(self, scene: Scene) -> str:
        return "all objects"

    def outcome(self, scene: Scene) -> str:
        drawn = "outlines" if self.style == "outline" else "flat colour"
        return f"the same objects as {drawn}"


@dataclass(frozen=True)
class Match:
    """Make as many things of one shape as there are of another.

    New things look like the first of their shape and go to the first free places in reading order;
    surplus ones are taken away from the end of the reading order.
    """

    shape: str
    like: str
    kind: ClassVar[str] = "count"
    referential: ClassVar[bool] = True

    @property
    def text(self) -> str:
        return f"make as many {self.shape}s as there are {self.like}s"

    def apply(self, scene: Scene) -> Scene:
        for thing in self._surplus(scene):
            scene = scene.without(thing)
        return scene.having(*self._new(scene))

    def area(self, scene: Scene) -> str:
        surplus = [describe(thing) for thing in self._surplus(scene)]
        return "; ".join(surplus + [f"free place, {thing.place}" for thing in self._new(scene)])

    def outcome(self, scene: Scene) -> str:
        gone = [f"empty {scene.background}, {thing.place}" for thing in self._surplus(scene)]
        return "; ".join([*gone, *(describe(thing) for thing in self._new(scene)), _REST])

    def _count(self, scene: Scene) -> tuple[list[Thing], int]:
        mine = [thing for thing in scene.objects if thing.shape == self.shape]
        wanted = sum(thing.shape == self.like for thing in scene.objects)
        if not mine or len(mine) == wanted:
            raise InputError(f"cannot {self.text}: there are {len(mine)} and {wanted}")
        return mine, wanted

    def _surplus(self, scene: Scene) -> list[Thing]:
        mine, wanted = self._count(scene)
        return mine[wanted:]

    def _new(self, scene: Scene) -> list[Thing]:
        mine = [thing for thing in scene.objects if thing.shape == self.shape]
        missing = sum(thing.shape == self.like for thing in scene.objects) - len(mine)
        new: list[Thing] = []
        for x, y in PLACES.values():
            thing = mine[0].at(x, y) if mine else None
            if thing is not None and len(new) < missing and fits(thing, [*scene.objects, *new]):
                new.append(thing)
        if len(new) < missing:
            raise InputError(f"no room on the table to {self.text}")
        return new


@dataclass(frozen=True)
class Compose:
    """Two operations, one after the other."""

    first: Operation
    second: Operation
    kind: ClassVar[str] = "compose"

    @property
    def text(self) -> str:
        return f"{self.first.text} and then {self.second.text}"

    @property
    def referential(self) -> bool:
        return self.first.referential or self.second.referential

    def apply(self, scene: Scene) -> Scene:
        return self.second.apply(self.first.apply(scene))

    def area(self, scene: Scene) -> str:
        return f"{self.first.area(scene)}; {self.second.area(self.first.apply(scene))}"

    def outcome(self, scene: Scene) -> str:
        first = self.first.outcome(scene).removesuffix(f"; {_REST}")
        return f"{first}; {self.second.outcome(self.first.apply(scene))}"


def parse(text: str) -> Operation:
    """Read an instruction; raises ``InputError`` when it asks for nothing this world can do."""
    words = " ".join(text.lower().split()).rstrip(".")
    first, composed, second = words.partition(" and then ")
    if composed:
        return Compose(parse(first), parse(second))
    for pattern, build in _FORMS:
        if match := pattern.fullmatch(words):
            return build(*match.groups())
    raise InputError(f"not an instruction about the table: {text!r}")


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _add(size: str, colour: str, shape: str, place: str | None, side: str, anchor: str) -> Add:
    beside = parse_reference(anchor) if anchor else None
    return Add(size, colour, shape, place, side, beside)


_FORMS: list[tuple[re.Pattern[str], Callable[..., Operation]]] = [
    (re.compile(r"remove (.+)"), lambda r: Remove(parse_reference(r))),
    (
        re.compile(rf"replace (.+) with an? ({_COLOUR}) ({_SHAPE})"),
        lambda r, colour, shape: Replace(parse_reference(r), colour, shape),
    ),
    (
        re.compile(rf"make as many ({_SHAPE})s as there are ({_SHAPE})s"),
        lambda shape, like: Match(shape, like),
    ),
    (re.compile(rf"make (.+) ({_COLOUR})"), lambda r, colour: Recolour(parse_reference(r), colour)),
    (re.compile(rf"make (.+) ({_SIZE})"), lambda r, size: Resize(parse_reference(r), size)),
    (re.compile(rf"move (.+) to the ({_PLACE})"), lambda r, place: Move(parse_reference(r), place)),
    (re.compile(r"extract (.+)"), lambda r: Extract(parse_reference(r))),
    (
        re.compile(
            rf"add an? ({_SIZE}) ({_COLOUR}) ({_SHAPE}) (?:at the ({_PLACE})|({_SIDE}) (.+))"
        ),
        _add,
    ),
    (re.compile(rf"change the background to ({_TABLE})"), Background),
    *((re.compile(text), partial(Style, style)) for style, text in _STYLE_TEXTS.items()),
]
