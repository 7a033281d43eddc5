"""DIM-Edit: raw pairs → filter → triage → blueprint → edit shards."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import ray.data
import typer
from pydantic import Field

from dim import designers
from dim.config import load_config
from dim.designers import CallOptions
from dim.records import EDIT, RAW_PAIR
from infra.storage import Store
from pipelines.calls.answers import set_unusable_aside
from pipelines.calls.ask import batches_at_once
from pipelines.calls.bill import biller
from pipelines.calls.engine import EngineOptions, answer_beforehand
from pipelines.calls.exchange import share_meter
from pipelines.command import ConfigFile, Out, Overrides, Overwrite, RetryFailed, settings
from pipelines.filters import FilterPairs, PairRules
from pipelines.filters.duplicates import DuplicateRules
from pipelines.filters.verdicts import without_duplicates
from pipelines.job import Job, JobConfig
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.shards import Shards
from pipelines.outputs.summary import summary
from pipelines.ranges import scan
from pipelines.stages.blueprint import TriageBy, WriteBlueprints

_QUESTIONS_PER_PAIR = 2  # triage and blueprint


class EditConfig(JobConfig):
    """How raw pairs become DIM-Edit."""

    raw: str
    """Address of the raw pairs, as ``dim data ingest`` makes them."""
    designer: str
    """Who writes the blueprints; see :mod:`dim.designers`."""
    with_target: bool = True
    """Show the designer the target, to judge and refine the instruction by it."""
    triage: TriageBy = "own_call"
    """``own_call``: the instruction is judged and refined before its blueprint is asked for;
    ``same_call``: one answer does both. Only a model over HTTP can be asked twice."""
    reasks: int = Field(2, ge=0)
    """How often a designer is asked again, told what was wrong, before the pair fails."""
    filters: PairRules = PairRules()
    duplicates: DuplicateRules = DuplicateRules()
    calls: CallOptions = CallOptions()
    engine: EngineOptions = EngineOptions()
    """How a local model (``vllm:MODEL``) runs."""
    workers: int = Field(1, ge=1)
    """Processes that each hold a designer."""
    cpus_per_worker: float = Field(0.5, gt=0)
    """What each is reckoned to need: one that calls a server mostly waits."""
    batch_size: int = Field(64, ge=1)
    """Records that a stage works on at a time."""


def run(config: EditConfig, *, overwrite: bool = False, retry_failed: bool = False) -> Manifest:
    """Make DIM-Edit. See :meth:`pipelines.job.Job.run` for reruns and errors."""
    designers.check(config.designer)
    raw = Shards.open(config.raw, RAW_PAIR)
    job = Job("edit", config, EDIT, identity=raw.identity, rows=raw.rows)
    if retry_failed:
        set_unusable_aside(job.store)
    return job.run(
        lambda: edit(raw, config, job.store),
        overwrite=overwrite,
        retry_failed=retry_failed,
        cost=biller(config.designer, job.store),
    )


def edit(raw: Shards, config: EditConfig, store: Store) -> ray.data.Dataset:
    """Raw pairs → filter → triage → blueprint."""
    batches = {"batch_format": "pyarrow", "batch_size": config.batch_size}
    keep = without_duplicates(
        raw, FilterPairs(config.filters), config.duplicates, config.batch_size, num_cpus=1
    )
    checked = scan(raw, keep, config.batch_size, num_cpus=1)
    checked = checked.repartition(target_num_rows_per_block=config.batch_size)
    settings = {
        "calls": config.calls,
        "with_target": config.with_target,
        "store": store,
        "triage": config.triage,
        "reasks": config.reasks,
    }
    rounds = _QUESTIONS_PER_PAIR * (config.reasks + 1)
    stage = partial(WriteBlueprints, **settings)
    answer_beforehand(checked, stage, config.designer, config, store, rounds)
    at_once = batches_at_once(config.designer)
    exchange = share_meter(config.designer, config.calls, store)
    return checked.map_batches(
        WriteBlueprints,
        fn_constructor_args=(config.designer,),
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
    raw: Annotated[str, typer.Option(help="Raw pairs: the output of `dim data ingest`.")],
    designer: Annotated[
        str,
        typer.Option(
            help="openai:MODEL@URL, vllm:MODEL, replay:PATH, oracle, self or self:MODEL_FOLDER."
        ),
    ],
    out: Out,
    overrides: Overrides = None,
    config: ConfigFile = None,
    overwrite: Overwrite = False,
    retry_failed: RetryFailed = False,
) -> None:
    """Make DIM-Edit from raw pairs: filter, triage, blueprint.

    Killed and run again, no designer call that was answered is made twice.
    """
    given = settings(raw=raw, designer=designer, out=out)
    chosen = load_config(EditConfig, config, [*(overrides or []), *given])
    summary(out, run(chosen, overwrite=overwrite, retry_failed=retry_failed))


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
