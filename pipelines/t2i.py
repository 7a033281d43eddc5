"""DIM-T2I: raw images → filter → duplicates → long caption → T2I shards."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Unpack

import ray.data
import typer

from dim import designers
from dim.config import load_config
from dim.records import RAW_IMAGE, T2I
from pipelines.calls.worker import CalledModel
from pipelines.command import ConfigFile, Out, Overrides, Overwrite, RetryFailed, settings
from pipelines.filters import FilterImages, ImageRules
from pipelines.filters.verdicts import identity_of
from pipelines.job import HowToRun, Job, Remaining
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.shards import Shards
from pipelines.outputs.summary import summary
from pipelines.ranges import Piece, names_of, ranges_of, rows_per_range
from pipelines.stages.caption import CaptionRules, WriteCaptions
from pipelines.steps import AskingConfig, asked, filtered


class T2IConfig(AskingConfig):
    """How raw images become DIM-T2I."""

    captioner: str
    """Who writes the captions; see :mod:`dim.designers`."""
    filters: ImageRules = ImageRules()
    captions: CaptionRules = CaptionRules()


def run(config: T2IConfig, **how: Unpack[HowToRun]) -> Manifest:
    """Make DIM-T2I. See :meth:`pipelines.job.Job.run` for reruns and errors."""
    designers.check(config.captioner, captioner=True)
    raw = Shards.open(config.raw, RAW_IMAGE)
    ranges = ranges_of(raw, rows_per_range(raw.rows, config.rows_per_file))
    identity = identity_of(raw, config.duplicates)
    job = Job("t2i", config, T2I, identity, raw.rows, len(ranges), asks=config.captioner)
    return job.run(lambda work: caption(raw, ranges, config, work), **how)


def caption(
    raw: Shards, ranges: list[list[Piece]], config: T2IConfig, work: Remaining
) -> ray.data.Dataset:
    """Raw images → filter → duplicates → long caption."""
    todo, judged = filtered(raw, ranges, FilterImages(config.filters), config, work)
    create, store = designers.create_captioner, work.output.store
    return asked(
        todo,
        judged,
        (partial(WriteCaptions, rules=config.captions),),
        CalledModel.metered(config.captioner, create, config.calls, store, names_of(ranges)),
        work.output,
        engine=config.engine,
        reasks=config.captions.reasks,
        num_cpus=config.cpus_per_worker,
        concurrency=config.workers_for(todo),
    )


def main(
    raw: Annotated[str, typer.Option(help="Raw images: the output of `dim data ingest`.")],
    captioner: Annotated[
        str, typer.Option(help="openai:MODEL@URL, vllm:MODEL, replay:PATH or oracle.")
    ],
    out: Out,
    overrides: Overrides = None,
    config: ConfigFile = None,
    overwrite: Overwrite = False,
    retry_failed: RetryFailed = False,
) -> None:
    """Make DIM-T2I from raw images: filter, and caption along 21 dimensions.

    Killed and run again, no captioner call that was answered is made twice.
    """
    given = settings(raw=raw, captioner=captioner, out=out)
    chosen = load_config(T2IConfig, config, [*(overrides or []), *given])
    summary(out, run(chosen, overwrite=overwrite, retry_failed=retry_failed))


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
