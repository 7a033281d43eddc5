"""The filtering of a whole data set, as the jobs begin with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from dim.errors import InputError
from infra.storage import Store
from pipelines.filters import FilterImages, FilterPairs, scorers
from pipelines.filters.duplicates import (
    TWINS,
    ApplyVerdicts,
    DuplicateRules,
    Judge,
    drop_duplicates,
)
from pipelines.filters.rules import ImageRules
from pipelines.outcome import KEPT, OUTCOMES, Row
from pipelines.outputs.commit import Piece, by_place, count_reasons, fit, row_bytes
from pipelines.outputs.shards import Part, Shards

_MATCHED_PER_TASK = 20_000  # signatures
_SIZE = pa.field("bytes", pa.int64())


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


@dataclass(frozen=True)
class WithSizes:
    """A stage that also says how large each record was that went in.

    Args:
        stage: from a batch to a batch of the same records.
    """

    stage: Callable[[pa.Table], pa.Table]

    def __call__(self, batch: pa.Table) -> pa.Table:
        """What ``stage`` makes of the batch, and the column ``bytes``."""
        return self.stage(batch).append_column(_SIZE, pa.array(row_bytes(batch)))


@dataclass(frozen=True)
class Judged(Piece):
    """Records of one outcome that still lie in the job's input.

    Attributes:
        input: the folder that they lie in.
        part: where there.
        verdicts: of these records, by place.
    """

    input: Store
    part: Part
    verdicts: pa.Table

    def read(self, store: Store, schema: pa.Schema) -> pa.Table:
        """The records with their verdicts; pictures are only read where ``schema`` has them.

        Raises:
            InputError: one of them is no longer there.
        """
        marks = [name for name in schema.names if name in self.verdicts.schema.names]
        table = self.part.read(self.input, ["index", *(set(schema.names) - set(marks))])
        table = self._mine(table).drop_columns("index")
        for name in marks:
            table = table.append_column(name, self.verdicts[name])
        return fit(table, schema)

    def _mine(self, table: pa.Table) -> pa.Table:
        """The rows of these records, by place; the table itself where it has no others."""
        found = table["index"].to_numpy()
        if np.array_equal(found, self.places):
            return table
        order = np.argsort(found, kind="stable")
        rows = np.searchsorted(found[order], self.places)
        rows = order[np.minimum(rows, len(order) - 1)] if len(order) else rows
        if not len(order) or (found[rows] != self.places).any():
            raise InputError(f"{self.input.address(self.part.name)} changed while it was read")
        return table.take(pa.array(rows))


def judged(
    raw: Shards, stage: FilterImages | FilterPairs, duplicates: DuplicateRules, batch_size: int
) -> list[Judged]:
    """Raw records → which of them the filters keep, and which are no duplicates of others.

    No picture is kept or moved on the way: whoever writes the records reads them again.

    Raises:
        InputError: a model's folder is not there.
    """
    check_models(stage.rules, duplicates)
    found = raw.gather(WithSizes(Judge.of(stage, duplicates)), batch_size)
    verdicts = drop_duplicates(pa.concat_tables(found.values()), duplicates, _find)
    return [piece for part, seen in found.items() for piece in _pieces(raw, part, seen, verdicts)]


def _pieces(raw: Shards, part: Part, seen: pa.Table, verdicts: pa.Table) -> Iterator[Judged]:
    """What became of the records of one part, as pieces."""
    seen = by_place(seen.select(["index", "bytes"]))
    places, sizes = (seen[name].to_numpy() for name in ("index", "bytes"))
    own = verdicts.take(pa.array(np.searchsorted(verdicts["index"].to_numpy(), places)))
    for outcome in OUTCOMES:
        chosen = np.flatnonzero(pc.equal(own["outcome"], outcome).to_numpy())
        if not len(chosen):
            continue
        marks = own.take(pa.array(chosen))
        reasons = count_reasons(outcome, marks)
        # What is left out has no pictures any more, and little besides its verdict.
        size = sizes[chosen] if outcome == KEPT else row_bytes(marks)
        yield Judged(outcome, places[chosen], size, reasons, raw.store, part, marks)


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
    found = raw.gather(Judge.of(stage, duplicates), batch_size)
    verdicts = drop_duplicates(pa.concat_tables(found.values()), duplicates, _find)
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
