"""Ingest: edit pairs, images or tabletop scenes into raw shards."""

from __future__ import annotations

from typing import Annotated, Self

import ray.data
import typer
from pydantic import Field, model_validator

from dim.config import load_config
from infra import storage
from pipelines import sources
from pipelines.command import ConfigFile, Out, Overrides, Overwrite, RetryFailed, settings, summary
from pipelines.job import Job, JobConfig
from pipelines.manifest import Manifest
from pipelines.sources import Source
from pipelines.stages.readers import TabletopImages, TabletopPairs
from pipelines.world import TabletopConfig

_MOST_TASKS = 2_000  # ranges share a task beyond this; each task costs the driver a few ms


class IngestConfig(TabletopConfig, JobConfig):
    """What to take in: exactly one of ``pairs``, ``images``, ``tabletop``, ``tabletop_images``."""

    pairs: str | None = None
    """JSONL of edit pairs: id, image_path, image_path_target, instruction or prompt."""
    images: str | None = None
    """JSONL of images (id, image_path, caption if any), or a folder of images."""
    tabletop: int | None = Field(None, ge=1)
    """This many tabletop edit pairs."""
    tabletop_images: int | None = Field(None, ge=1)
    """This many tabletop images with captions."""
    source: str | None = None
    """What the records call their source; the file's or folder's name unless given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [self.pairs, self.images, self.tabletop, self.tabletop_images]
        if sum(value is not None for value in given) != 1:
            raise ValueError("give exactly one of pairs, images, tabletop, tabletop_images")
        return self


def run(config: IngestConfig, *, overwrite: bool = False, retry_failed: bool = False) -> Manifest:
    """Read the source into raw shards. See :meth:`pipelines.job.Job.run` for reruns and errors."""
    source = open_source(config)
    job = Job("ingest", config, source.schema, identity=source.identity, rows=source.rows)
    return job.run(lambda: read(source), overwrite=overwrite, retry_failed=retry_failed)


def read(source: Source) -> ray.data.Dataset:
    """Ranges → records."""
    blocks = min(len(source.units), _MOST_TASKS)
    units = ray.data.from_items(source.units, override_num_blocks=blocks)
    return units.map_batches(source.reader, batch_format="pyarrow", batch_size=1)


def open_source(config: IngestConfig) -> Source:
    """The source that a configuration names, cut into ranges."""
    rows = config.rows_per_range
    if config.pairs is not None:
        return sources.pairs_from_lines(config.pairs, config.source, rows)
    if config.images is not None:
        if storage.open_store(config.images).is_file():
            return sources.images_from_lines(config.images, config.source, rows)
        return sources.images_from_folder(config.images, config.source, rows)
    world = config.model_dump(include={"seed", "size", "objects", "outlines"})
    if config.tabletop_images is not None:
        return sources.tabletop_images(config.tabletop_images, rows, TabletopImages(**world))
    reader = TabletopPairs(**world, kinds=config.kinds, referential=config.referential)
    return sources.tabletop_pairs(config.tabletop or 0, rows, reader)


def main(
    out: Out,
    overrides: Overrides = None,
    pairs: Annotated[str | None, typer.Option(help="JSONL of edit pairs.")] = None,
    images: Annotated[str | None, typer.Option(help="JSONL of images, or their folder.")] = None,
    tabletop_pairs: Annotated[
        int | None, typer.Option("--tabletop", help="This many tabletop edit pairs.")
    ] = None,
    tabletop_images: Annotated[
        int | None, typer.Option(help="This many tabletop images with captions.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="What the records call their source.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the tabletop records.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of tabletop images in pixels.")] = None,
    kinds: Annotated[
        str | None, typer.Option(help="Kinds of tabletop edits, with commas between.")
    ] = None,
    referential: Annotated[
        float | None, typer.Option(help="Share of indirect tabletop instructions.")
    ] = None,
    config: ConfigFile = None,
    overwrite: Overwrite = False,
    retry_failed: RetryFailed = False,
) -> None:
    """Take edit pairs or images in: into Parquet shards with image bytes, hashes and provenance.

    Give one of --pairs, --images, --tabletop and --tabletop-images.
    """
    given = settings(
        out=out,
        pairs=pairs,
        images=images,
        tabletop=tabletop_pairs,
        tabletop_images=tabletop_images,
        source=source,
        seed=seed,
        size=size,
        kinds=None if kinds is None else [kind.strip() for kind in kinds.split(",")],
        referential=referential,
    )
    chosen = load_config(IngestConfig, config, [*(overrides or []), *given])
    summary(out, run(chosen, overwrite=overwrite, retry_failed=retry_failed))


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
