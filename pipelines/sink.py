"""The sink of every job: kept, rejected and failed records from one pass, committed at the end.

Write tasks put pieces into a staging folder under names of their own, so that a task that Ray runs
twice leaves only litter. The driver then commits: it cuts the records, in the order of the input,
into files of about ``target_bytes``, by the places and sizes of the records alone and not by how
Ray cut its blocks. Files are put together a row group at a time, so memory does not grow with them.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult

from dim.errors import DimError
from dim.records import FAILED as FAILED_SCHEMA
from dim.records import REJECT as REJECT_SCHEMA
from infra.storage import Store
from pipelines.manifest import FileEntry
from pipelines.stages.outcome import FAILED, KEPT, REJECTED

FOLDERS = {KEPT: "data", REJECTED: "rejected", FAILED: "failed"}
STAGING = "staging"
ROWS_PER_RANGE = 512
"""Places in the input that are read, and staged, together."""

_LEFT_OUT_PER_FILE = 100_000
_STAGE_BYTES = 64 << 20  # a write task holds no more than this of its blocks
_COMMIT_IN_DRIVER = 256 << 20  # bytes; more than this is put together by the cluster
GROUP_PLACES = 256
GROUP_BYTES = 32 << 20  # a reader that wants one record fetches no more than this


@dataclass(frozen=True)
class Piece:
    """A staged file: the records of one outcome and one range that one write task held.

    ``places`` and ``sizes`` (both int64, one per record) are its records' places in the input,
    ascending, and their sizes in bytes before compression.
    """

    outcome: str
    name: str
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    reasons: dict[str, int]


class OutcomeSink(Datasink[list[Piece]]):
    """Writes batches that carry outcomes.

    Args:
        store: the job's output folder.
        schema: the columns of kept records.
        rows_per_file: places in the input per file of ``data/`` at most.
        target_bytes: size of a file at most, before compression; a larger record has its own.
        group_bytes: the same of a row group, the least that a reader can fetch; None = 32 MiB.
        rows_per_write: records that are handed over together at least, for a stage that makes a
            few at a time; None = each task writes what it made itself, for stages that read ranges.
            Ray counts the *inputs* of a stage that it runs together with the sink, and would wait
            for that many ranges.
    """

    def __init__(
        self,
        store: Store,
        schema: pa.Schema,
        rows_per_file: int,
        target_bytes: int = 256 << 20,
        group_bytes: int | None = None,
        rows_per_write: int | None = ROWS_PER_RANGE,
    ) -> None:
        self._store = store
        self._schemas = {KEPT: schema, REJECTED: REJECT_SCHEMA, FAILED: FAILED_SCHEMA}
        self._rows_per_file = rows_per_file
        self._target_bytes = target_bytes
        self._group_bytes = group_bytes or GROUP_BYTES
        self._rows_per_write = rows_per_write
        self.pieces: list[Piece] = []

    def write(self, blocks: Iterable[Block], ctx: object) -> list[Piece]:
        """Stage what one task holds; runs on a worker."""
        pieces: list[Piece] = []
        waiting: list[pa.Table] = []
        for block in blocks:
            table = BlockAccessor.for_block(block).to_arrow()
            if table.num_rows:
                waiting.append(table)
            if sum(table.nbytes for table in waiting) >= _STAGE_BYTES:
                pieces += self._stage(waiting)
                waiting = []
        return pieces + self._stage(waiting)

    def on_write_complete(self, write_result: WriteResult[list[Piece]]) -> None:
        """Remember what the tasks that count have staged; runs on the driver."""
        self.pieces = [piece for pieces in write_result.write_returns for piece in pieces]

    @property
    def min_rows_per_write(self) -> int | None:
        """Small blocks are handed over together."""
        if self._rows_per_write is None:
            return None
        return min(self._rows_per_file, self._rows_per_write)

    def commit(self) -> list[FileEntry]:
        """Turn the pieces into the output's files; returns them in order of name.

        Raises:
            DimError: two records have the same place in the input.
            StorageError: a file cannot be written, or a piece cannot be read.
        """
        plans = [plan for outcome in FOLDERS for plan in self._plan(outcome)]
        if sum(int(piece.sizes.sum()) for piece in self.pieces) < _COMMIT_IN_DRIVER:
            files = [plan.write(self._store) for plan in plans]
        else:
            write = ray.remote(_FilePlan.write)
            files = ray.get([write.remote(plan, self._store) for plan in plans])
        return sorted(files, key=lambda file: file.path)

    def _plan(self, outcome: str) -> Iterator[_FilePlan]:
        """Which records make which file; a reader finds the columns also where nothing is."""
        pieces = [piece for piece in self.pieces if piece.outcome == outcome]
        firsts = np.array([piece.places[0] for piece in pieces], np.int64)
        lasts = np.array([piece.places[-1] for piece in pieces], np.int64)
        places, sizes = _in_order(pieces)
        cuts = _cut(places, sizes, self._target_bytes, self._rows_in_file(outcome))
        for number, (start, end) in enumerate(cuts or [(0, 0)]):
            groups = [
                (int(places[start + low]), int(places[start + high - 1]))
                for low, high in _cut(
                    places[start:end], sizes[start:end], self._group_bytes, GROUP_PLACES
                )
            ]
            first, last = (groups[0][0], groups[-1][1]) if groups else (0, -1)
            within = [
                (pieces[at].name, int(firsts[at]), int(lasts[at]))
                for at in np.flatnonzero((lasts >= first) & (firsts <= last))
            ]
            name = f"{FOLDERS[outcome]}/part-{number:05d}.parquet"
            yield _FilePlan(name, self._schemas[outcome], within, groups, end - start)

    def _rows_in_file(self, outcome: str) -> int:
        return self._rows_per_file if outcome == KEPT else _LEFT_OUT_PER_FILE

    def _stage(self, tables: list[pa.Table]) -> list[Piece]:
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
        size = ROWS_PER_RANGE if outcome == KEPT else _LEFT_OUT_PER_FILE
        table = _fit(_where(table, pc.equal(table["outcome"], outcome)), schema)
        places = table["index"].to_numpy()
        for unit in np.unique(places // size):
            yield _by_place(_where(table, pa.array(places // size == unit)))

    def _stage_piece(self, outcome: str, table: pa.Table) -> Piece:
        name = f"{STAGING}/{uuid.uuid4().hex}.arrow"
        with (
            self._store.open_passing(name) as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
        reasons = Counter(table["reason"].to_pylist()) if outcome == REJECTED else {}
        places = table["index"].to_numpy()
        return Piece(outcome, name, places, row_bytes(table), dict(reasons))


@dataclass(frozen=True)
class _FilePlan:
    """One file of the output: the pieces that its records lie in, and its row groups.

    A piece is a name with the first and the last place in it; a group is its first and last place.
    """

    name: str
    schema: pa.Schema
    pieces: list[tuple[str, int, int]]
    groups: list[tuple[int, int]]
    rows: int

    def write(self, store: Store) -> FileEntry:
        """Put the file together; the same bytes for the same records."""
        rows = 0
        with store.open_output(self.name) as file:
            with pq.ParquetWriter(file, self.schema, **_parquet_options(self.schema)) as writer:
                for group in self._read_groups(store):
                    writer.write_table(group, row_group_size=group.num_rows)
                    rows += group.num_rows
            if rows != self.rows:
                raise DimError(f"{self.name} has {rows} of the {self.rows} records it should have")
            return FileEntry(path=self.name, rows=rows, bytes=file.size, sha256=file.sha256)

    def _read_groups(self, store: Store) -> Iterator[pa.Table]:
        """The records of each group; a piece is in memory while groups need it and not longer."""
        held: dict[str, pa.Table] = {}
        for first, last in self.groups:
            needed = [name for name, start, end in self.pieces if end >= first and start <= last]
            held = {name: held[name] if name in held else _open(store, name) for name in needed}
            parts = [_between(table, first, last) for table in held.values()]
            yield _by_place(pa.concat_tables(parts)).combine_chunks()


def row_bytes(table: pa.Table) -> NDArray[np.int64]:
    """The size of every row in bytes before compression: int64 of shape (rows,).

    It follows from the values alone, unlike ``nbytes``, which depends on how they are sliced.
    """
    total = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        total += _value_bytes(column.combine_chunks())
    return total


def _value_bytes(column: pa.Array) -> NDArray[np.int64]:
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_string(kind):
        return pc.fill_null(pc.binary_length(column), 0).to_numpy().astype(np.int64)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
        inner = np.concatenate([[0], np.cumsum(_value_bytes(pc.list_flatten(column)))])
        ends = np.cumsum(lengths)
        return inner[ends] - inner[ends - lengths]
    try:
        width = kind.byte_width
    except ValueError:
        width = 8  # booleans, structs: small beside images and texts
    return np.full(len(column), width, np.int64)


def _in_order(pieces: list[Piece]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places, ascending, and sizes of all records.

    Raises:
        DimError: a place comes twice.
    """
    none = np.zeros(0, np.int64)
    places = np.concatenate([none, *(piece.places for piece in pieces)])
    sizes = np.concatenate([none, *(piece.sizes for piece in pieces)])
    order = np.argsort(places, kind="stable")
    places, sizes = places[order], sizes[order]
    twice = np.flatnonzero(places[1:] == places[:-1])
    if len(twice):
        raise DimError(f"two records have the place {places[twice[0]]} of the input")
    return places, sizes


def _cut(
    places: NDArray[np.int64], sizes: NDArray[np.int64], most_bytes: int, most_places: int
) -> list[tuple[int, int]]:
    """Divide records into runs of (first, end) positions, each as long as the limits allow.

    A run ends where the next record would make it larger than ``most_bytes``, and at every
    multiple of ``most_places`` places of the input.
    """
    ends = np.cumsum(sizes)
    runs: list[tuple[int, int]] = []
    first = 0
    while first < len(places):
        before = ends[first] - sizes[first]
        by_bytes = int(np.searchsorted(ends, before + most_bytes, side="right"))
        limit = (places[first] // most_places + 1) * most_places
        by_places = int(np.searchsorted(places, limit, side="left"))
        end = max(first + 1, min(by_bytes, by_places))
        runs.append((first, end))
        first = end
    return runs


def _fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema``; those that this kind of record does not have are null."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.schema.names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _where(table: pa.Table, mask: pa.ChunkedArray | pa.Array) -> pa.Table:
    """The rows of a mask; the table itself when that is all, for a filter copies every image."""
    return table if pc.all(mask, skip_nulls=False).as_py() else table.filter(mask)


def _by_place(table: pa.Table) -> pa.Table:
    """The rows by place in the input; the table itself when they lie so already."""
    places = table["index"].to_numpy()
    return table if (places[1:] >= places[:-1]).all() else table.sort_by("index")


def _open(store: Store, name: str) -> pa.Table:
    """A piece; on a local disk it is not in memory until it is looked at."""
    with pa.ipc.open_stream(store.map(name)) as reader:
        return reader.read_all()


def _between(table: pa.Table, first: int, last: int) -> pa.Table:
    """The rows of a table, sorted by ``index``, that lie between two places."""
    places = table["index"].to_numpy()
    start = int(np.searchsorted(places, first, side="left"))
    return table.slice(start, int(np.searchsorted(places, last, side="right")) - start)


def _parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """How columns are stored: encoded images as they are, everything else small and searchable."""
    images = {field.name for field in schema if pa.types.is_large_binary(field.type)}
    others = [field.name for field in schema if field.name not in images]
    return {
        "compression": {name: "NONE" if name in images else "ZSTD" for name in schema.names},
        "use_dictionary": [field.name for field in schema if pa.types.is_string(field.type)],
        "write_statistics": others,
        "write_page_index": True,
    }
