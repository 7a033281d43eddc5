"""The sink of every job: kept, rejected and failed records from one pass, committed at the end.

Write tasks put pieces into a staging folder under names of their own, so that a task that Ray runs
twice leaves only litter. The driver then commits: pieces become files whose contents depend on
the records' places alone and not on how Ray cut its blocks. A range of ``rows_per_file`` places is
one file of ``data/``, in the order of the input; the small rejected and failed records share files.
"""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from dim.records import FAILED as FAILED_SCHEMA
from dim.records import REJECT as REJECT_SCHEMA
from infra.storage import Store
from pipelines.manifest import FileEntry
from pipelines.stages.outcome import FAILED, KEPT, REJECTED

FOLDERS = {KEPT: "data", REJECTED: "rejected", FAILED: "failed"}
STAGING = "staging"

_LEFT_OUT_PER_FILE = 100_000
_COMMIT_IN_DRIVER = 256 << 20  # bytes; more than this is put together by the cluster
_ROW_GROUP = 256  # a reader holds one at a time: about 100 MB of photographs


@dataclass(frozen=True)
class Piece:
    """A staged file: the records of one outcome and one range that one write task held."""

    outcome: str
    unit: int
    file: FileEntry
    reasons: dict[str, int]


class OutcomeSink(Datasink[list[Piece]]):
    """Writes batches that carry outcomes.

    Args:
        store: the job's output folder.
        schema: the columns of kept records.
        rows_per_file: places in the input per file of ``data/``.
    """

    def __init__(self, store: Store, schema: pa.Schema, rows_per_file: int) -> None:
        self._store = store
        self._schemas = {KEPT: schema, REJECTED: REJECT_SCHEMA, FAILED: FAILED_SCHEMA}
        self._rows_per_file = rows_per_file
        self.pieces: list[Piece] = []

    def write(self, blocks: Iterable[Block], ctx: object) -> list[Piece]:
        """Stage what one task holds; runs on a worker."""
        tables = [BlockAccessor.for_block(block).to_arrow() for block in blocks]
        tables = [table for table in tables if table.num_rows]
        if not tables:
            return []
        return [
            self._stage(outcome, unit, table)
            for outcome, unit, table in self._split(pa.concat_tables(tables))
        ]

    def on_write_complete(self, write_result: WriteResult[list[Piece]]) -> None:
        """Remember what the tasks that count have staged; runs on the driver."""
        self.pieces = [piece for pieces in write_result.write_returns for piece in pieces]

    @property
    def min_rows_per_write(self) -> int:
        """Blocks are handed over by the file, as far as they come in its order."""
        return self._rows_per_file

    def commit(self) -> list[FileEntry]:
        """Turn the pieces into the output's files; returns them in order of name."""
        units: dict[tuple[str, int], list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            units[piece.outcome, piece.unit].append(piece)
        for outcome in FOLDERS:
            if not any(key[0] == outcome for key in units):
                units[outcome, 0] = []  # a reader finds the columns also where nothing is
        work = [
            (self._store, self._schemas[outcome], f"{FOLDERS[outcome]}/part-{unit:05d}.parquet", p)
            for (outcome, unit), p in units.items()
        ]
        if sum(piece.file.bytes for piece in self.pieces) < _COMMIT_IN_DRIVER:
            files = [_commit(*item) for item in work]
        else:
            files = ray.get([ray.remote(_commit).remote(*item) for item in work])
        return sorted(files, key=lambda file: file.path)

    def _split(self, table: pa.Table) -> Iterator[tuple[str, int, pa.Table]]:
        for outcome, schema in self._schemas.items():
            rows = table.filter(pc.equal(table["outcome"], outcome))
            rows = _fit(rows, schema)
            size = self._rows_per_file if outcome == KEPT else _LEFT_OUT_PER_FILE
            units = [index // size for index in rows["index"].to_pylist()]
            for unit in sorted(set(units)):
                yield outcome, unit, rows.filter(pa.array([other == unit for other in units]))

    def _stage(self, outcome: str, unit: int, table: pa.Table) -> Piece:
        reasons = Counter(table["reason"].to_pylist()) if outcome == REJECTED else {}
        file = _write(self._store, f"{STAGING}/{uuid.uuid4().hex}.parquet", table)
        return Piece(outcome, unit, file, dict(reasons))


def _commit(store: Store, schema: pa.Schema, name: str, pieces: list[Piece]) -> FileEntry:
    if len(pieces) == 1:
        store.move(pieces[0].file.path, name)
        return pieces[0].file.model_copy(update={"path": name})
    staged = (pa.BufferReader(store.read(piece.file.path)) for piece in pieces)
    tables = [schema.empty_table(), *map(pq.read_table, staged)]
    return _write(store, name, pa.concat_tables(tables))


def _fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema``; those that this kind of record does not have are null."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.schema.names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _write(store: Store, name: str, table: pa.Table) -> FileEntry:
    """Write ``table`` in the order of its ``index``, the same bytes for the same rows."""
    table = table.sort_by("index").combine_chunks()
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, row_group_size=_ROW_GROUP, compression="zstd")
    data = buffer.getvalue()
    store.write(name, data)
    digest = hashlib.sha256(data).hexdigest()
    return FileEntry(path=name, rows=table.num_rows, bytes=data.size, sha256=digest)
