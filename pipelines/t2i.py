"""DIM-T2I: raw images → filter → long caption → T2I shards."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import ray.data
import typer
from pydantic import Field

from dim import designers
from dim.config import load_config
from dim.designers import CallOptions
from dim.records import RAW_IMAGE, T2I
from infra.storage import Store
from pipelines.calls.answers import set_unusable_aside
from pipelines.calls.ask import batches_at_once
from pipelines.calls.bill import biller
from pipelines.calls.engine import EngineOptions, answer_beforehand
from pipelines.calls.exchange import share_meter
from pipelines.command import ConfigFile, Out, Overrides, Overwrite, RetryFailed, settings
from pipelines.filters import FilterImages, ImageRules
from pipelines.filters.duplicates import DuplicateRules
from pipelines.filters.verdicts import without_duplicates
from pipelines.job import Job, JobConfig
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.shards import Shards
from pipelines.outputs.summary import summary
from pipelines.ranges import scan
from pipelines.stages.caption import CaptionRules, WriteCaptions


class T2IConfig(JobConfig):
    """How raw images become DIM-T2I."""

    raw: str
    """Address of the raw images, as ``dim data ingest`` makes them."""
    captioner: str
    """Who writes the captions; see :mod:`dim.designers`."""
    filters: ImageRules = ImageRules()
    duplicates: DuplicateRules = DuplicateRules()
    captions: CaptionRules = CaptionRules()
    calls: CallOptions = CallOptions()
    engine: EngineOptions = EngineOptions()
    """How a local model (``vllm:MODEL``) runs."""
    workers: int = Field(1, ge=1)
    """Processes that each hold a captioner."""
    cpus_per_worker: float = Field(0.5, gt=0)
    """What each is reckoned to need: one that calls a server mostly waits."""
    batch_size: int = Field(64, ge=1)
    """Records that a stage works on at a time."""


def run(config: T2IConfig, *, overwrite: bool = False, retry_failed: bool = False) -> Manifest:
    """Make DIM-T2I. See :meth:`pipelines.job.Job.run` for reruns and errors."""
    designers.check(config.captioner, captioner=True)
    raw = Shards.open(config.raw, RAW_IMAGE)
    job = Job("t2i", config, T2I, identity=raw.identity, rows=raw.rows)
    if retry_failed:
        set_unusable_aside(job.store)
    return job.run(
        lambda: caption(raw, config, job.store),
        overwrite=overwrite,
        retry_failed=retry_failed,
        cost=biller(config.captioner, job.store),
    )


def caption(raw: Shards, config: T2IConfig, store: Store) -> ray.data.Dataset:
    """Raw images → filter → long caption."""
    batches = {"batch_format": "pyarrow", "batch_size": config.batch_size}
    keep = without_duplicates(
        raw, FilterImages(config.filters), config.duplicates, config.batch_size, num_cpus=1
    )
    checked = scan(raw, keep, config.batch_size, num_cpus=1)
    checked = checked.repartition(target_num_rows_per_block=config.batch_size)
    settings = {"calls": config.calls, "rules": config.captions, "store": store}
    stage = partial(WriteCaptions, **settings)
    rounds = config.captions.reasks + 1
    answer_beforehand(checked, stage, config.captioner, config, store, rounds)
    at_once = batches_at_once(config.captioner)
    exchange = share_meter(config.captioner, config.calls, store)
    return checked.map_batches(
        WriteCaptions,
        fn_constructor_args=(config.captioner,),
        fn_constructor_kwargs={**settings, "exchange": exchange},
        compute=ray.data.ActorPoolStrategy(
            size=max(1, min(config.workers, raw.rows // config.batch_size)),
            max_concurrent_calls_per_actor=at_once,
            enable_true_multi_threading=at_once > 1,
        ),
        num_cpus=config.cpus_per_worker,
        **batches,
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
