"""Records of the tabletop world: which part of it a job draws from, and the drawing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from dim import tabletop
from dim.config import StrictModel
from dim.images import encode_png
from dim.records import RAW_IMAGE, RAW_PAIR
from dim.tabletop import KINDS, Scene
from pipelines.outcome import KEPT, Row
from pipelines.readers.records import Singles, image_columns, pair_columns

_MOST_OBJECTS = 6  # that a table surely has room for


class TabletopConfig(StrictModel):
    """The tabletop records to draw."""

    seed: int = Field(0, ge=0)
    size: int = Field(64, ge=16)
    """Side of the images in pixels."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of edits."""
    referential: float = Field(0.3, ge=0, le=1)
    """Share of the instructions that name their object indirectly."""
    objects: tuple[int, int] = (2, 4)
    """Fewest and most things on a table before the edit."""
    outlines: float = Field(0.2, ge=0, le=1)
    """Share of the tables whose things are drawn as outlines."""

    @model_validator(mode="after")
    def _check_world(self) -> Self:
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown:
            raise ValueError(f"unknown kind {unknown[0]!r}; there are {', '.join(KINDS)}")
        fewest, most = self.objects
        if not 2 <= fewest <= most <= _MOST_OBJECTS:
            raise ValueError(
                f"objects must be [fewest, most] between 2 and {_MOST_OBJECTS}, "
                f"not [{fewest}, {most}]"
            )
        return self


def reader(world: TabletopConfig, *, pairs: bool) -> Singles:
    """Edit pairs of the world, or scenes with their captions.

    Record ``i`` is drawn from the seed pair ``[seed, i]``.
    """
    draw, schema = (_pair, RAW_PAIR) if pairs else (_image, RAW_IMAGE)
    return Singles(partial(_begin, world.seed), partial(draw, world), schema)


def _begin(seed: int, each: Row) -> Iterator[Row]:
    for index in range(each["first"], each["first"] + each["count"]):
        yield {
            "id": f"tabletop-{seed}-{index:06d}",
            "index": index,
            "source": "tabletop",
            "provenance": _provenance(),
            "outcome": KEPT,
        }


def _pair(world: TabletopConfig, row: Row) -> Row:
    edit = tabletop.sample_edit(
        np.random.default_rng([world.seed, row["index"]]),
        **world.model_dump(include={"kinds", "referential", "objects", "outlines"}),
    )
    images = (tabletop.render(scene, world.size) for scene in (edit.source, edit.target))
    return {
        "provenance": _provenance(
            kind=edit.kind,
            referential=edit.referential,
            source_scene=_plain(edit.source),
            target_scene=_plain(edit.target),
        ),
        "instruction": edit.instruction,
        **pair_columns(edit.instruction, *map(encode_png, images)),
    }


def _image(world: TabletopConfig, row: Row) -> Row:
    rng = np.random.default_rng([world.seed, row["index"]])
    scene = tabletop.sample_scene(rng, world.objects, outlines=world.outlines)
    image = encode_png(tabletop.render(scene, world.size))
    return {
        "provenance": _provenance(scene=_plain(scene)),
        **image_columns(image, tabletop.caption(scene)),
    }


def _provenance(**of: Any) -> str:
    return json.dumps({"tabletop": of})


def _plain(scene: Scene) -> Any:
    return json.loads(scene.to_json())
