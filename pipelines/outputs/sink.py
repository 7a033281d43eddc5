"""The sink of every job: kept, rejected and failed records from one pass.

Write tasks put pieces into a staging folder under names of their own, so that a task that Ray runs
twice leaves only litter. The driver then commits them (:mod:`pipelines.outputs.commit`).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from infra.storage import Store
from pipelines.outcome import KEPT
from pipelines.outputs.commit import (
    LEFT_OUT_PER_FILE,
    Piece,
    by_place,
    count_reasons,
    fit,
    row_bytes,
    schemas_of,
)

STAGING = "staging"
ROWS_PER_RANGE = 512
"""Places in the input that are read, and staged, together."""

_STAGE_BYTES = 64 << 20  # a write task holds no more than this of its blocks


@dataclass(frozen=True)
class Staged(Piece):
    """A file in the staging folder: what one write task held of one outcome and one range."""

    name: str

    def read(self, store: Store, schema: pa.Schema) -> pa.Table:
        """On a local disk, a record is not in memory until it is looked at."""
        with store.open_arrow(self.name) as (found, batches):
            return pa.Table.from_batches(batches, found)


class OutcomeSink(Datasink[list[Staged]]):
    """Stages batches that carry outcomes.

    Args:
        store: the job's output folder.
        schema: the columns of kept records.
        rows_per_write: records that are handed over together at least, for a stage that makes a
            few at a time; None = each task writes what it made itself, for stages that read ranges.
            Ray counts the *inputs* of a stage that it runs together with the sink, and would wait
            for that many ranges.
    """

    def __init__(self, store: Store, schema: pa.Schema, rows_per_write: int | None = None) -> None:
        self._store = store
        self._schemas = schemas_of(schema)
        self._rows_per_write = rows_per_write
        self.pieces: list[Staged] = []

    def write(self, blocks: Iterable[Block], ctx: object) -> list[Staged]:
        """Stage what one task holds; runs on a worker."""
        pieces: list[Staged] = []
        waiting: list[pa.Table] = []
        for block in blocks:
            table = BlockAccessor.for_block(block).to_arrow()
            if table.num_rows:
                waiting.append(table)
            if sum(table.nbytes for table in waiting) >= _STAGE_BYTES:
                pieces += self._stage(waiting)
                waiting = []
        return pieces + self._stage(waiting)

    def on_write_complete(self, write_result: WriteResult[list[Staged]]) -> None:
        """Remember what the tasks that count have staged; runs on the driver."""
        self.pieces = [piece for pieces in write_result.write_returns for piece in pieces]

    @property
    def min_rows_per_write(self) -> int | None:
        """Small blocks are handed over together."""
        return self._rows_per_write

    def _stage(self, tables: list[pa.Table]) -> list[Staged]:
        if not tables:
            return []
        table = pa.concat_tables(tables)
        return [
            self._stage_piece(outcome, rows)
            for outcome, schema in self._schemas.items()
            for rows in self._ranges(outcome, schema, table)
        ]

    def _ranges(self, outcome: str, schema: pa.Schema, table: pa.Table) -> Iterator[pa.Table]:
        """The records of one outcome, by range of the input, so that a file needs few pieces."""
        size = ROWS_PER_RANGE if outcome == KEPT else LEFT_OUT_PER_FILE
        table = fit(_where(table, pc.equal(table["outcome"], outcome)), schema)
        places = table["index"].to_numpy()
        for number in np.unique(places // size):
            yield by_place(_where(table, pa.array(places // size == number)))

    def _stage_piece(self, outcome: str, table: pa.Table) -> Staged:
        name = f"{STAGING}/{uuid.uuid4().hex}.arrow"
        with (
            self._store.open_passing(name) as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
        places = table["index"].to_numpy()
        return Staged(outcome, places, row_bytes(table), count_reasons(outcome, table), name)


def _where(table: pa.Table, mask: pa.ChunkedArray | pa.Array) -> pa.Table:
    """The rows of a mask; the table itself when that is all, for a filter copies every image."""
    return table if pc.all(mask, skip_nulls=False).as_py() else table.filter(mask)
