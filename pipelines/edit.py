"""DIM-Edit: raw pairs → filter → duplicates → triage → blueprint → edit shards."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Unpack

import ray.data
import typer
from pydantic import Field

from dim import designers
from dim.config import load_config
from dim.records import EDIT, RAW_PAIR
from pipelines.calls.worker import CalledModel
from pipelines.command import ConfigFile, Out, Overrides, Overwrite, RetryFailed, settings
from pipelines.filters import FilterPairs, PairRules
from pipelines.filters.verdicts import identity_of
from pipelines.job import HowToRun, Job, Remaining
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.shards import Shards
from pipelines.outputs.summary import summary
from pipelines.ranges import Piece, names_of, ranges_of, rows_per_range
from pipelines.stages.blueprint import WriteBlueprints
from pipelines.stages.triage import TriageBy, TriageInstructions
from pipelines.steps import AskingConfig, asked, filtered


class EditConfig(AskingConfig):
    """How raw pairs become DIM-Edit."""

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


def run(config: EditConfig, **how: Unpack[HowToRun]) -> Manifest:
    """Make DIM-Edit. See :meth:`pipelines.job.Job.run` for reruns and errors."""
    designers.check(config.designer)
    raw = Shards.open(config.raw, RAW_PAIR)
    ranges = ranges_of(raw, rows_per_range(raw.rows, config.rows_per_file))
    identity = identity_of(raw, config.duplicates)
    job = Job("edit", config, EDIT, identity, raw.rows, len(ranges), asks=config.designer)
    return job.run(lambda work: edit(raw, ranges, config, work), **how)


def edit(
    raw: Shards, ranges: list[list[Piece]], config: EditConfig, work: Remaining
) -> ray.data.Dataset:
    """Raw pairs → filter → duplicates → triage → blueprint."""
    todo, judged = filtered(raw, ranges, FilterPairs(config.filters), config, work)
    triage = partial(TriageInstructions, reasks=config.reasks)
    blueprint = partial(WriteBlueprints, with_target=config.with_target, reasks=config.reasks)
    own_call = config.with_target and config.triage == "own_call"
    model = CalledModel.metered(
        config.designer, designers.create, config.calls, work.output.store, names_of(ranges)
    )
    return asked(
        todo,
        judged,
        (triage, blueprint) if own_call else (blueprint,),
        model,
        work.output,
        engine=config.engine,
        reasks=config.reasks,
        num_cpus=config.cpus_per_worker,
        concurrency=config.workers_for(todo),
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
