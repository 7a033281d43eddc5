"""Which part of the tabletop world a job draws from."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dim.config import StrictModel
from dim.tabletop import KINDS

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
