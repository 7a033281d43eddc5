"""DIM-T2I: raw images → filter → duplicates → long caption → T2I shards."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import ray.data
import typer

from dim import designers
from dim.config import load_config
from dim.records import RAW_IMAGE, T2I
from pipelines.calls.engine import answer_beforehand
from pipelines.calls.worker import CalledModel, batches_at_once
from pipelines.command import ConfigFile, Out, Overrides, Overwrite, RetryFailed, settings
from pipelines.filters import FilterImages, ImageRules
from pipelines.filters.duplicates import DuplicateRules
from pipelines.filters.verdicts import identity_of, judge
from pipelines.job import AskingConfig, Job, OnProgress, Remaining
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.shards import Shards
from pipelines.outputs.summary import summary
from pipelines.ranges import AskRanges, Piece, ReadRanges, ranges_of, rows_per_range
from pipelines.stages.caption import CaptionRules, WriteCaptions


class T2IConfig(AskingConfig):
    """How raw images become DIM-T2I."""

    raw: str
    """Address of the raw images, as ``dim data ingest`` makes them."""
    captioner: str
    """Who writes the captions; see :mod:`dim.designers`."""
    filters: ImageRules = ImageRules()
    duplicates: DuplicateRules = DuplicateRules()
    captions: CaptionRules = CaptionRules()


def run(
    config: T2IConfig,
    *,
    overwrite: bool = False,
    retry_failed: bool = False,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Make DIM-T2I. See :meth:`pipelines.job.Job.run` for reruns and errors."""
    designers.check(config.captioner, captioner=True)
    raw = Shards.open(config.raw, RAW_IMAGE)
    ranges = ranges_of(raw, rows_per_range(raw.rows, config.rows_per_file))
    job = Job(
        "t2i",
        config,
        T2I,
        identity=identity_of(raw, config.duplicates),
        rows=raw.rows,
        ranges=len(ranges),
        asks=config.captioner,
    )
    return job.run(
        lambda work: caption(raw, ranges, config, work),
        overwrite=overwrite,
        retry_failed=retry_failed,
        on_progress=on_progress,
    )


def caption(
    raw: Shards, ranges: list[list[Piece]], config: T2IConfig, work: Remaining
) -> ray.data.Dataset:
    """Raw images → filter → duplicates → long caption."""
    rows, judged = judge(
        raw,
        ranges,
        work.todo,
        FilterImages(config.filters),
        config.duplicates,
        config.batch_size,
        store=work.output.store,
        key=work.key,
        retry=work.retry,
        num_cpus=1,
        timeout_s=config.range_timeout_s,
    )
    todo = ray.data.from_items(rows, override_num_blocks=len(rows))

    steps = (partial(WriteCaptions, rules=config.captions),)
    model = CalledModel.metered(
        config.captioner, designers.create_captioner, config.calls, work.output.store
    )
    reasks = config.captions.reasks
    kept = todo.map_batches(ReadRanges(judged.records), batch_format="pyarrow", batch_size=1)
    answer_beforehand(kept, steps, model, config.engine, workers=config.workers, reasks=reasks)
    return todo.map_batches(
        AskRanges,
        fn_constructor_args=(steps, model.open, judged.surely, work.output),
        num_cpus=config.cpus_per_worker,
        compute=ray.data.ActorPoolStrategy(
            size=config.workers_for(sum(each["rows"] for each in rows)),
            max_concurrent_calls_per_actor=batches_at_once(config.captioner),
            enable_true_multi_threading=True,
        ),
        batch_format="pyarrow",
        batch_size=1,
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
