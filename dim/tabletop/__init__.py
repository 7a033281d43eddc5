"""A procedural world of objects on a table, with exact ground truth.

Scenes are drawn by seed and rendered at any resolution; edits of every kind come with their exact
target and an oracle blueprint; a checker reads an image and says what is on the table. It stands in
for photographs wherever a number must be measured and not judged.
"""

from __future__ import annotations

from dim.tabletop.checker import Judgement, Reading, exact, exact_strictly, judge, matches, read
from dim.tabletop.edits import (
    KINDS,
    Edit,
    another_edit,
    caption,
    lay_out,
    sample_edit,
    understand,
)
from dim.tabletop.world import (
    BACKGROUNDS,
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    STYLES,
    Scene,
    Thing,
    render,
    sample_scene,
)

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "KINDS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "STYLES",
    "Edit",
    "Judgement",
    "Reading",
    "Scene",
    "Thing",
    "another_edit",
    "caption",
    "exact",
    "exact_strictly",
    "judge",
    "lay_out",
    "matches",
    "read",
    "render",
    "sample_edit",
    "sample_scene",
    "understand",
]
