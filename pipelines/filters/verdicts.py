"""Verdicts: what becomes of every record of a data set, known before the first one goes on.

Duplicates need all signatures first. So the pictures are read twice and decoded once: the first
pass leaves verdicts of a few hundred bytes a record, the second gives them to the records. In both,
pictures stay in the process that read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data

from dim.errors import InputError
from infra.storage import Store
from pipelines.attempts import stop_after
from pipelines.filters import FilterImages, FilterPairs, scorers
from pipelines.filters.duplicates import SIGNATURE, TWINS, DuplicateRules, drop_duplicates
from pipelines.filters.images import STAGE
from pipelines.filters.rules import ImageRules
from pipelines.filters.signatures import Signer
from pipelines.outcome import IMAGES, KEPT, OUTCOMES, Row, failed, to_table, travelling
from pipelines.outputs.commit import Piece, by_place, count_reasons, fit, row_bytes
from pipelines.outputs.shards import Shards
from pipelines.ranges import TIMEOUT_S, FallibleStage, Range, Stage, gather

_MATCHED_PER_TASK = 20_000  # signatures
_SIZE = pa.field("bytes", pa.int64())


def without_duplicates(
    raw: Shards,
    stage: FilterImages | FilterPairs,
    rules: DuplicateRules,
    rows: int,
    *,
    num_cpus: float = 1,
    timeout_s: float = TIMEOUT_S,
) -> Stage:
    """The stage that keeps what ``stage`` keeps of raw records, but of several alike one.

    Without anything to look for that is ``stage`` itself; else all records are read here, by tasks
    of ``num_cpus`` on ``rows`` at a time, and the stage says what was found of each. A range may
    take ``timeout_s``.

    Raises:
        InputError: a model's folder is not there.
    """
    check_models(stage.rules, rules)
    if not rules.wanted:
        return stage
    signed = GiveVerdicts.of(stage, rules)
    found = gather(raw, signed, rows, num_cpus=num_cpus, timeout_s=timeout_s)
    verdicts = drop_duplicates(pa.concat_tables(found.values()), rules, _find)
    return WithTable(ApplyVerdicts(stage.schema), ray.put(verdicts))


def verdict_pieces(
    raw: Shards,
    stage: FilterImages | FilterPairs,
    rules: DuplicateRules,
    rows: int,
    *,
    num_cpus: float = 1,
    timeout_s: float = TIMEOUT_S,
) -> list[InPlace]:
    """The same for a job that only filters: its records, by outcome, where they lie.

    No picture is kept or moved on the way: whoever writes the records reads them again.

    Raises:
        InputError: a model's folder is not there.
    """
    check_models(stage.rules, rules)
    signed = WithSizes(GiveVerdicts.of(stage, rules))
    found = gather(raw, signed, rows, num_cpus=num_cpus, timeout_s=timeout_s)
    verdicts = drop_duplicates(pa.concat_tables(found.values()), rules, _find)
    return [piece for each, seen in found.items() for piece in _pieces(raw, each, seen, verdicts)]


@dataclass(frozen=True)
class GiveVerdicts:
    """Filters records into verdicts, which have no pictures."""

    filter: FilterImages | FilterPairs

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Raw records in; their outcomes, measures and :data:`SIGNATURE` out."""
        return to_table(self.filter.verdicts(batch), SIGNATURE)

    def lost(self, record: pa.Table, why: str) -> pa.Table:
        """The verdict on a record that the filter does not survive."""
        return to_table(failed(record, STAGE, why), SIGNATURE)

    @classmethod
    def of(cls, chosen: FilterImages | FilterPairs, rules: DuplicateRules) -> GiveVerdicts:
        """By ``chosen``, with the signatures that ``rules`` look at."""
        signing: Any = replace(chosen, signer=Signer(rules.embedding_model))
        return cls(signing)


@dataclass(frozen=True)
class ApplyVerdicts:
    """Gives raw records the outcomes that were found without them.

    Args:
        schema: what the records are.
    """

    schema: pa.Schema

    def __call__(self, batch: pa.Table, verdicts: pa.Table) -> pa.Table:
        """Raw records in, the same with outcomes out; ``verdicts`` are sorted by index.

        Raises:
            InputError: a record has no verdict.
        """
        wanted = batch["index"].to_numpy()
        places = np.searchsorted(verdicts["index"].to_numpy(), wanted)
        chosen = verdicts.take(pa.array(np.minimum(places, max(verdicts.num_rows - 1, 0))))
        strangers = np.flatnonzero(chosen["index"].to_numpy() != wanted)
        if len(strangers):
            name = batch["id"][int(strangers[0])].as_py()
            raise InputError(f"the input changed while it was read: record {name}")
        kept = pc.equal(chosen["outcome"], KEPT)
        # By columns, for a picture that only passes need not become a Python object.
        columns = [
            chosen[field.name]
            if field.name in chosen.schema.names and field.name not in self.schema.names
            else _only(kept, batch[field.name])
            if field.name in IMAGES
            else batch[field.name]
            for field in travelling(self.schema)
        ]
        return pa.table(columns, schema=travelling(self.schema))


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
        """What ``stage`` makes of the batch.

        Raises:
            DimError: the task was begun too often; nothing of it can fail by itself.
        """
        stop_after()
        return self.stage(batch, ray.get(self.table))


@dataclass(frozen=True)
class WithSizes:
    """A stage that also says how large each record was that went in.

    Args:
        stage: from a batch to a batch of the same records.
    """

    stage: FallibleStage

    def __call__(self, batch: pa.Table) -> pa.Table:
        """What ``stage`` makes of the batch, and the column ``bytes``."""
        return self._sized(self.stage(batch), batch)

    def lost(self, record: pa.Table, why: str) -> pa.Table:
        """What ``stage`` says of the record, and its size without pictures."""
        return self._sized(self.stage.lost(record, why), record)

    def _sized(self, made: pa.Table, batch: pa.Table) -> pa.Table:
        return made.append_column(_SIZE, pa.array(row_bytes(batch)))


@dataclass(frozen=True)
class InPlace(Piece):
    """Records of one outcome that still lie in the job's input.

    Attributes:
        input: the folder that they lie in.
        range: where there.
        verdicts: of these records, by place.
    """

    input: Store
    range: Range
    verdicts: pa.Table

    def read(self, store: Store, schema: pa.Schema) -> pa.Table:
        """The records with their verdicts; pictures are only read where ``schema`` has them.

        Raises:
            InputError: one of them is no longer there.
        """
        found = [name for name in schema.names if name in self.verdicts.schema.names]
        table = self.range.read(self.input, ["index", *(set(schema.names) - set(found))])
        table = self._mine(table).drop_columns("index")
        for name in found:
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
            raise InputError(f"{self.input.address(self.range.file)} changed while it was read")
        return table.take(pa.array(rows))


def check_models(rules: ImageRules, duplicates: DuplicateRules) -> None:
    """See that every model is there before the first record is read.

    Raises:
        InputError: one is not.
    """
    settings = [*rules.model_dump().items(), *duplicates.model_dump().items()]
    for name, path in settings:
        if name.endswith("_model") and path is not None:
            scorers.check_folder(path)


def _pieces(raw: Shards, each: Range, seen: pa.Table, verdicts: pa.Table) -> Iterator[InPlace]:
    """What became of the records of one range."""
    seen = by_place(seen.select(["index", "bytes"]))
    places, sizes = (seen[name].to_numpy() for name in ("index", "bytes"))
    own = verdicts.take(pa.array(np.searchsorted(verdicts["index"].to_numpy(), places)))
    for outcome in OUTCOMES:
        chosen = np.flatnonzero(pc.equal(own["outcome"], outcome).to_numpy())
        if not len(chosen):
            continue
        mine = own.take(pa.array(chosen))
        reasons = count_reasons(outcome, mine)
        # What is left out has no pictures any more, and little besides its verdict.
        size = sizes[chosen] if outcome == KEPT else row_bytes(mine)
        yield InPlace(outcome, places[chosen], size, reasons, raw.store, each, mine)


def _find(matcher: Callable[..., pa.Table], tasks: list[Row], signatures: pa.Table) -> pa.Table:
    """Run a matcher over its tasks on the cluster."""
    # Matching a few thousand is quicker than starting a task for each part of it.
    blocks = min(len(tasks), 1 + signatures.num_rows // _MATCHED_PER_TASK)
    work = ray.data.from_items(tasks, override_num_blocks=blocks)
    match = WithTable(matcher, ray.put(signatures))
    twins = work.map_batches(match, batch_format="pyarrow", batch_size=None)
    tables = ray.get(twins.to_arrow_refs())
    return pa.concat_tables([TWINS.empty_table(), *tables])


def _only(kept: pa.ChunkedArray, images: pa.ChunkedArray) -> pa.ChunkedArray:
    """The pictures of kept records; a record that is out travels on without."""
    if pc.all(kept).as_py():
        return images
    return pc.if_else(kept, images, pa.scalar(None, images.type))
