"""What jobs on raw records share: filter all of them first, then ask a model about those kept."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Annotated, Any

import pyarrow as pa
import ray.data
from pydantic import Field

from dim.config import HowOnly
from dim.designers import CallOptions
from pipelines.calls.answers import name_of
from pipelines.calls.bill import is_billed, sums_of
from pipelines.calls.engine import EngineOptions, answer_beforehand
from pipelines.calls.worker import AskingWorker, CalledModel, Step, batches_at_once
from pipelines.filters import FilterImages, FilterPairs
from pipelines.filters.duplicates import DuplicateRules
from pipelines.filters.verdicts import Judged, judge
from pipelines.job import JobConfig, Remaining
from pipelines.outputs.receipts import Paid, RangeOutput
from pipelines.outputs.shards import Shards
from pipelines.ranges import Piece


class FilterConfig(JobConfig):
    """What a job is told that reads raw records, and keeps some of them."""

    raw: str
    """Address of the raw records, as ``dim data ingest`` makes them."""
    duplicates: DuplicateRules = DuplicateRules()
    batch_size: Annotated[int, HowOnly] = Field(64, ge=1)
    """Records that a step works on at a time."""


class AskingConfig(FilterConfig):
    """What a job is told that asks a model about every record it keeps."""

    calls: CallOptions = CallOptions()
    engine: Annotated[EngineOptions, HowOnly] = EngineOptions()
    """How a local model (``vllm:MODEL``) runs."""
    workers: Annotated[int, HowOnly] = Field(1, ge=1)
    """Processes that each hold the model; fewer for a few records."""
    cpus_per_worker: Annotated[float, HowOnly] = Field(0.5, gt=0)
    """What each is reckoned to need: one that calls a server mostly waits."""

    def workers_for(self, todo: Sequence[dict[str, Any]]) -> int:
        """How many workers the records of so many ranges keep busy."""
        return max(1, min(self.workers, sum(each["rows"] for each in todo) // self.batch_size))


def filtered(
    raw: Shards,
    ranges: list[list[Piece]],
    stage: FilterImages | FilterPairs,
    config: FilterConfig,
    work: Remaining,
) -> tuple[list[dict[str, Any]], Judged]:
    """The ranges to be done, as rows of a data set, and who reads their records; see ``judge``."""
    return judge(
        raw,
        ranges,
        work.todo,
        stage,
        config.duplicates,
        config.batch_size,
        store=work.output.store,
        key=work.key,
        retry=work.retry,
        timeout_s=config.range_timeout_s,
    )


def asked(
    todo: list[dict[str, Any]],
    judged: Judged,
    steps: Sequence[Step],
    model: CalledModel,
    output: RangeOutput,
    *,
    engine: EngineOptions,
    reasks: int,
    num_cpus: float,
    concurrency: int,
) -> ray.data.Dataset:
    """Ranges → their records → each step in turn → files and receipts.

    All steps are in one process: they share the model, how often it is asked again, and its limits.
    ``num_cpus`` is of a worker, of which there are ``concurrency``.
    """
    ranges = ray.data.from_items(todo, override_num_blocks=len(todo))
    answer_beforehand(
        ranges, judged.records, steps, model, engine, workers=concurrency, reasks=reasks
    )
    pool = ray.data.ActorPoolStrategy(
        size=concurrency,
        max_concurrent_calls_per_actor=batches_at_once(model.spec),
        enable_true_multi_threading=True,
    )
    return ranges.map_batches(
        AskRanges,
        fn_constructor_args=(steps, model, judged, output),
        num_cpus=num_cpus,
        compute=pool,
        batch_format="pyarrow",
        batch_size=1,
    )


class AskRanges:
    """What a worker that asks a model does with ranges: reads their records, asks about some after
    others, and writes what comes of them."""

    def __init__(
        self, steps: Sequence[Step], model: CalledModel, judged: Judged, output: RangeOutput
    ) -> None:
        self._worker = AskingWorker(steps, model)
        self._records = judged.surely
        self._output = output
        self._is_billed = is_billed(model.spec)

    def __call__(self, ranges: pa.Table) -> Iterator[pa.Table]:
        """Ranges in, receipts out; safe for several threads."""
        for each in ranges.to_pylist():
            paid = partial(self._paid, name_of(each["pieces"]))
            with closing(self._asked(each)) as asked:
                receipt = self._output.done(each["number"], each["rows"], asked, paid)
            yield receipt

    def _paid(self, name: str) -> Paid | None:
        """What was paid for a range of which all answers are stored."""
        if not self._is_billed:
            return None
        return Paid(folder=name, sums=sums_of(self._output.store, name))

    def _asked(self, each: dict[str, Any]) -> Generator[pa.Table]:
        """All answers are stored when these have come to an end, so before there is a receipt."""
        with self._worker.of_range(name_of(each["pieces"])) as ask:
            yield from map(ask, self._records(each))
