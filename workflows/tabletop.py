"""Tabletop records as the workflows make them: ingest, and a designer's blueprints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines import edit, ingest, t2i
from pipelines.job import TrackingConfig
from pipelines.outputs.manifest import Manifest
from pipelines.readers.tabletop import TabletopConfig

# Flat colours and drawn things are no photographs, and tables are alike on purpose.
_NOT_PHOTOGRAPHIC = dict.fromkeys(("min_entropy", "min_sharpness", "max_text_area"))
_DUPLICATES = {"exact": False, "max_distance": None}
# A new table changes most pixels, a small thing very few: both are edits here.
_EDITS = {"max_shift": None, "min_ssim": -1, "min_changed": 0.0005}


def raw_pairs(
    world: TabletopConfig, out: str, count: int, tracking: TrackingConfig, *, seed: int
) -> Manifest:
    """``count`` edit pairs of the world as raw shards."""
    chosen = {"kinds": world.kinds, "referential": world.referential, **_shown(world)}
    return ingest.run(
        ingest.IngestConfig(out=out, tabletop=count, seed=seed, tracking=tracking, **chosen)
    )


def raw_images(
    world: TabletopConfig, out: str, count: int, tracking: TrackingConfig, *, seed: int
) -> Manifest:
    """``count`` images of the world with captions as raw shards."""
    return ingest.run(
        ingest.IngestConfig(
            out=out, tabletop_images=count, seed=seed, tracking=tracking, **_shown(world)
        )
    )


def designed(
    world: TabletopConfig, raw: str, out: str, tracking: TrackingConfig, *, designer: str
) -> Manifest:
    """DIM-Edit of raw pairs."""
    return edit.run(
        edit.EditConfig(
            raw=raw,
            out=out,
            designer=designer,
            filters={**_filters(world), **_EDITS},
            duplicates=_DUPLICATES,
            workers=2,
            tracking=tracking,
        )
    )


def captioned(world: TabletopConfig, raw: str, out: str, tracking: TrackingConfig) -> Manifest:
    """DIM-T2I of raw images."""
    return t2i.run(
        t2i.T2IConfig(
            raw=raw,
            out=out,
            captioner="oracle",
            filters=_filters(world),
            duplicates=_DUPLICATES,
            tracking=tracking,
        )
    )


def _shown(world: TabletopConfig) -> Mapping[str, Any]:
    return {"size": world.size, "objects": world.objects, "outlines": world.outlines}


def _filters(world: TabletopConfig) -> dict[str, Any]:
    return {"min_side": min(world.size, 256), **_NOT_PHOTOGRAPHIC}
