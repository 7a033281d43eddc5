"""The filtering of a whole data set, as the jobs begin with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
import ray
import ray.data

from pipelines.shards import Shards
from pipelines.stages.duplicates import (
    TWINS,
    ApplyVerdicts,
    DuplicateRules,
    Judge,
    drop_duplicates,
)
from pipelines.stages.filters import FilterImages, FilterPairs, scorers
from pipelines.stages.filters.rules import ImageRules
from pipelines.stages.outcome import Row

_MATCHED_PER_TASK = 20_000  # signatures


@dataclass(frozen=True)
class WithTable:
    """A stage that looks at one table with every batch; a machine holds it once.

    Args:
        stage: from a batch and the table to a batch.
        table: where the table is; Ray Data does not look it up itself.
    """

    stage: Callable[[pa.Table, pa.Table], pa.Table]
    table: ray.ObjectRef

    def __call__(self, batch: pa.Table) -> pa.Table:
        """What ``stage`` makes of the batch."""
        return self.stage(batch, ray.get(self.table))


def filtered(
    raw: Shards, stage: FilterImages | FilterPairs, duplicates: DuplicateRules, batch_size: int
) -> ray.data.Dataset:
    """Raw records → the same with outcomes: by the filters, and no record twice.

    Duplicates need all signatures before the first record can go on. So the pictures are read
    twice and decoded once: the first pass leaves verdicts of a few hundred bytes a record, the
    second gives them to the records. In both, pictures stay in the process that read them.

    Raises:
        InputError: a model's folder is not there.
    """
    check_models(stage.rules, duplicates)
    if not duplicates.wanted:
        return raw.scan(stage, batch_size)
    verdicts = raw.gather(Judge.of(stage, duplicates), batch_size)
    verdicts = drop_duplicates(verdicts, duplicates, _find)
    apply = WithTable(ApplyVerdicts(stage.schema), ray.put(verdicts))
    return raw.scan(apply, batch_size)


def check_models(rules: ImageRules, duplicates: DuplicateRules) -> None:
    """See that every model is there before the first record is read.

    Raises:
        InputError: one is not.
    """
    settings = [*rules.model_dump().items(), *duplicates.model_dump().items()]
    for name, path in settings:
        if name.endswith("_model") and path is not None:
            scorers.check_folder(path)


def _find(matcher: Callable[..., pa.Table], tasks: list[Row], signatures: pa.Table) -> pa.Table:
    """Run a matcher over its tasks on the cluster."""
    # Matching a few thousand is quicker than starting a task for each part of it.
    blocks = min(len(tasks), 1 + signatures.num_rows // _MATCHED_PER_TASK)
    work = ray.data.from_items(tasks, override_num_blocks=blocks)
    match = WithTable(matcher, ray.put(signatures))
    twins = work.map_batches(match, batch_format="pyarrow", batch_size=None)
    return pa.concat_tables([TWINS.empty_table(), _collect(twins)])


def _collect(dataset: ray.data.Dataset) -> pa.Table:
    """All of a data set that is small without its pictures."""
    return pa.concat_tables(ray.get(dataset.to_arrow_refs()))
