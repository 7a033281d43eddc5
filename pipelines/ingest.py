"""Ingest: edit pairs, images or tabletop scenes into raw shards."""

from __future__ import annotations

import math
from typing import Annotated, Any, Self, Unpack

import ray.data
import typer
from pydantic import Field, model_validator
from ray.data import ActorPoolStrategy

from dim.config import load_config
from infra import storage
from pipelines.attempts import Attempts, TimeLimits
from pipelines.command import ConfigFile, Out, Overrides, Overwrite, RetryFailed, settings
from pipelines.job import HowToRun, Job, JobConfig, Remaining
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.receipts import WriteRanges
from pipelines.outputs.summary import summary
from pipelines.readers import containers, sources
from pipelines.readers.bounds import MAX_BYTES
from pipelines.readers.fetch import FetchConfig
from pipelines.readers.join import MediaConfig
from pipelines.readers.layout import load_layout
from pipelines.readers.records import ROWS_PER_PART, Records
from pipelines.readers.sources import Source
from pipelines.readers.tabletop import TabletopConfig

RANGES_AT_ONCE = 16
"""In a worker that fetches: while one waits for its last link, others keep the hosts busy."""

_CPUS_TO_FETCH = 0.5
_MOST_TASKS = 2_000  # ranges share a task beyond this; each task costs the driver a few ms


class IngestConfig(TabletopConfig, JobConfig):
    """What to take in: exactly one of ``pairs``, ``images``, ``tabletop``, ``tabletop_images``."""

    pairs: str | None = None
    """Edit pairs: a JSONL or JSON file, or Parquet, Arrow or WebDataset tars, one or a folder."""
    images: str | None = None
    """Images: the same, or a folder of image files."""
    layout: str | None = None
    """Which columns hold what: a name of pipelines/readers/layouts, or a YAML file. Unless given,
    the names of the public forms: image_path, image_path_target, instruction or prompt, caption."""
    media: MediaConfig | None = None
    """Where the images lie that the records name by a key."""
    fetch: FetchConfig | None = None
    """How images behind URLs are fetched; without it they are not."""
    max_bytes: int | None = Field(None, ge=1)
    """Size of an encoded image at most, whatever holds it; 50,000,000 unless given. A larger one is
    not read. Behind a URL it may have no more than ``fetch.max_bytes`` either."""
    read_from: tuple[str, ...] | None = None
    """Folders, local or ``s3://bucket/prefix``, that names in the data may lead to. Without it they
    lead to the data's own folder only."""
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
        tabletop = self.pairs is None and self.images is None
        if tabletop and (self.layout or self.media or self.fetch or self.read_from):
            raise ValueError("layout, media, fetch and read_from go with pairs or images")
        return self


def run(config: IngestConfig, **how: Unpack[HowToRun]) -> Manifest:
    """Read the source into raw shards. See :meth:`pipelines.job.Job.run` for reruns and errors."""
    source = open_source(config)
    job = Job("ingest", config, source.schema, source.identity, source.rows, len(source.ranges))
    return job.run(lambda work: read(source, config, work), **how)


def read(source: Source, config: IngestConfig, work: Remaining) -> ray.data.Dataset:
    """Ranges → records, as many ranges at once as there are cores; more where they are fetched."""
    rows = [
        {"number": number, "rows": source.reader.count(source.ranges[number])}
        | source.ranges[number]
        for number in work.todo
    ]
    blocks = min(len(rows), _MOST_TASKS)
    attempts = attempts_at(source, config)
    todo = ray.data.from_items(rows, override_num_blocks=blocks)
    if config.fetch is None:
        write = WriteRanges(attempts.tables, work.output)
        return todo.map_batches(write, batch_format="pyarrow", batch_size=1)
    # A worker mostly waits for hosts. It has a view of each, so few workers keep to their limits
    # with many ranges.
    return todo.map_batches(
        WriteRanges,
        fn_constructor_args=(attempts.tables, work.output),
        num_cpus=_CPUS_TO_FETCH,
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=max(1, min(config.fetch.workers, blocks // RANGES_AT_ONCE)),
            max_concurrent_calls_per_actor=RANGES_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        batch_format="pyarrow",
        batch_size=1,
    )


def attempts_at(source: Source, config: IngestConfig) -> Attempts[dict[str, Any]]:
    """How the ranges of a source are read."""
    if isinstance(source.reader, Records) and config.fetch is not None:
        return Attempts(source.reader, _limits(config), source.reader.fetch_ahead)
    return Attempts(source.reader, _limits(config))


def _limits(config: IngestConfig) -> TimeLimits:
    """With what its URLs may take on top, which have time limits of their own."""
    limits = TimeLimits.of(config.range_timeout_s)
    if config.fetch is None:
        return limits
    parts = math.ceil(config.rows_per_range / ROWS_PER_PART)
    urls = parts * config.fetch.longest_s(2 * ROWS_PER_PART * RANGES_AT_ONCE)
    return TimeLimits(limits.range_s + urls, limits.record_s + config.fetch.longest_s(2))


def open_source(config: IngestConfig) -> Source:
    """The source that a configuration names, cut into ranges."""
    rows, max_bytes = config.rows_per_range, config.max_bytes or MAX_BYTES
    uri = config.pairs if config.pairs is not None else config.images
    if uri is not None:
        if config.images is not None and not (config.layout or config.media) and _is_folder(uri):
            return sources.images_from_folder(
                uri, config.source, rows, max_bytes, read_from=config.read_from or ()
            )
        pairs = config.pairs is not None
        layout = load_layout(config.layout or ("pairs" if pairs else "images"), pairs=pairs)
        return sources.from_records(
            uri,
            layout,
            config.source,
            rows,
            media=config.media,
            fetch=_fetch(config),
            max_bytes=max_bytes,
            read_from=config.read_from or (),
        )
    count = config.tabletop or config.tabletop_images or 0
    return sources.from_tabletop(config, count, rows, pairs=config.tabletop is not None)


def _fetch(config: IngestConfig) -> FetchConfig | None:
    fetch, most = config.fetch, config.max_bytes
    if fetch is None or most is None:
        return fetch
    return fetch.model_copy(update={"max_bytes": min(fetch.max_bytes, most)})


def _is_folder(uri: str) -> bool:
    """Whether an address is a folder without tables or tars, so one of image files."""
    return not storage.open_store(uri).is_file() and not containers.find_files(uri).files


def main(
    out: Out,
    overrides: Overrides = None,
    pairs: Annotated[
        str | None, typer.Option(help="Edit pairs: JSONL, Parquet, Arrow or WebDataset tars.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Images: the same, or a folder of image files.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="Whose columns: a layout's name, or a YAML file.")
    ] = None,
    media: Annotated[
        str | None, typer.Option(help="Where the images lie that the records name.")
    ] = None,
    media_key: Annotated[
        str | None, typer.Option(help="The column there that holds the records' image_path.")
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Fetch the images that are given as URLs.")
    ] = False,
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
        layout=layout,
        tabletop=tabletop_pairs,
        tabletop_images=tabletop_images,
        source=source,
        seed=seed,
        size=size,
        kinds=None if kinds is None else [kind.strip() for kind in kinds.split(",")],
        referential=referential,
    )
    fetching = ["fetch={}"] if fetch else []
    given += settings(**{"media.uri": media, "media.key": media_key})
    chosen = load_config(IngestConfig, config, [*fetching, *(overrides or []), *given])
    manifest = run(chosen, overwrite=overwrite, retry_failed=retry_failed)
    hidden = manifest.input.get("hidden")
    if hidden:
        typer.echo(f"{hidden:,} hidden files were left out")
    summary(out, manifest)


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
