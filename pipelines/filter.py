"""Filter: raw records → those worth a model's time, before one is asked."""

from __future__ import annotations

from typing import Annotated, ClassVar, Unpack

import pyarrow as pa
import ray.data
import typer

from dim.config import load_config
from dim.records import FILTERED_IMAGE, FILTERED_PAIR, RAW_IMAGE, RAW_PAIR, kind_of
from pipelines.command import ConfigFile, Out, Overrides, Overwrite, RetryFailed, settings
from pipelines.filters import FilterImages, FilterPairs, ImageRules, PairRules
from pipelines.filters.verdicts import identity_of
from pipelines.job import HowToRun, Job, Remaining
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.receipts import WriteRanges
from pipelines.outputs.shards import Shards
from pipelines.outputs.summary import summary
from pipelines.ranges import Piece, ranges_of, rows_per_range, tasks_for
from pipelines.steps import FilterConfig, filtered


class FilterPairsConfig(FilterConfig):
    """Which edit pairs are kept."""

    kept: ClassVar[pa.Schema] = FILTERED_PAIR
    filters: PairRules = PairRules()

    def stage(self) -> FilterPairs:
        """The filters by these rules."""
        return FilterPairs(self.filters)


class FilterImagesConfig(FilterConfig):
    """Which images are kept."""

    kept: ClassVar[pa.Schema] = FILTERED_IMAGE
    filters: ImageRules = ImageRules()

    def stage(self) -> FilterImages:
        """The filters by these rules."""
        return FilterImages(self.filters)


def run(config: FilterPairsConfig | FilterImagesConfig, **how: Unpack[HowToRun]) -> Manifest:
    """Filter raw records. See :meth:`pipelines.job.Job.run` for reruns and errors."""
    raw = Shards.open(config.raw, config.kept)
    ranges = ranges_of(raw, rows_per_range(raw.rows, config.rows_per_file))
    identity = identity_of(raw, config.duplicates)
    job = Job("filter", config, config.kept, identity, raw.rows, len(ranges))
    return job.run(lambda work: keep(raw, ranges, config, work), **how)


def keep(
    raw: Shards,
    ranges: list[list[Piece]],
    config: FilterPairsConfig | FilterImagesConfig,
    work: Remaining,
) -> ray.data.Dataset:
    """Raw records → filter → duplicates."""
    todo, judged = filtered(raw, ranges, config.stage(), config, work)
    return ray.data.from_items(todo, override_num_blocks=tasks_for(len(todo))).map_batches(
        WriteRanges(judged.records, work.output),
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=1,
    )


def config_for(raw: str) -> type[FilterPairsConfig] | type[FilterImagesConfig]:
    """How the records at an address are filtered: as pairs or as images.

    Raises:
        InputError: there are no finished raw records.
        StorageError: they cannot be read.
    """
    found = kind_of(Shards.open(raw, RAW_PAIR, RAW_IMAGE).schema)
    return FilterPairsConfig if found == kind_of(RAW_PAIR) else FilterImagesConfig


def main(
    raw: Annotated[str, typer.Option(help="Raw pairs or images: the output of `dim data ingest`.")],
    out: Out,
    overrides: Overrides = None,
    config: ConfigFile = None,
    overwrite: Overwrite = False,
    retry_failed: RetryFailed = False,
) -> None:
    """Filter raw pairs or images, and drop duplicates, before a model is paid for.

    The output is raw records again, for `dim data edit` or `dim data t2i`, with what was measured.
    """
    given = settings(raw=raw, out=out)
    chosen = load_config(config_for(raw), config, [*(overrides or []), *given])
    summary(out, run(chosen, overwrite=overwrite, retry_failed=retry_failed))


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
