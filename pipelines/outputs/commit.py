"""The commit of every job: records that lie in pieces become the files of its output.

The driver cuts the records, in the order of the input, into files of about ``target_bytes``, by the
places and sizes of the records alone and not by how Ray cut its blocks. Files are put together a
row group at a time, so memory does not grow with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from dim.errors import DimError
from dim.records import FAILED as FAILED_SCHEMA
from dim.records import REJECT as REJECT_SCHEMA
from infra.storage import Store
from pipelines.attempts import stop_after
from pipelines.outcome import FAILED, KEPT, REJECTED
from pipelines.outputs.manifest import FileEntry

FOLDERS = {KEPT: "data", REJECTED: "rejected", FAILED: "failed"}
GROUP_PLACES = 256
GROUP_BYTES = 32 << 20  # a reader that wants one record fetches no more than this
LEFT_OUT_PER_FILE = 100_000
"""Places in the input per file of records that were not kept."""

_COMMIT_IN_DRIVER = 256 << 20  # bytes; more than this is put together by the cluster


@dataclass(frozen=True)
class Piece(ABC):
    """Records of one outcome that lie together somewhere.

    Attributes:
        outcome: what became of them.
        places: int64 (records,), their places in the input, ascending.
        sizes: int64 (records,), their sizes in bytes before compression.
        reasons: how many were rejected for what.
    """

    outcome: str
    places: NDArray[np.int64]
    sizes: NDArray[np.int64]
    reasons: Mapping[str, int]

    @abstractmethod
    def read(self, store: Store, schema: pa.Schema) -> pa.Table:
        """Its records as ``schema`` has them, by place; ``store`` is the job's output."""


@dataclass(frozen=True)
class Limits:
    """How large files and their row groups are.

    Attributes:
        rows_per_file: places in the input per file of kept records at most.
        target_bytes: size of a file at most, before compression; a larger record has its own.
        group_bytes: the same of a row group, the least that a reader can fetch; None = 32 MiB.
    """

    rows_per_file: int
    target_bytes: int = 256 << 20
    group_bytes: int | None = None


def schemas_of(kept: pa.Schema) -> dict[str, pa.Schema]:
    """The columns of the records of each outcome."""
    return {KEPT: kept, REJECTED: REJECT_SCHEMA, FAILED: FAILED_SCHEMA}


def commit(
    store: Store, schema: pa.Schema, pieces: Sequence[Piece], limits: Limits
) -> list[FileEntry]:
    """Turn the pieces into the output's files; returns them in order of name.

    Args:
        store: the job's output folder.
        schema: the columns of kept records.
        pieces: where the records lie.
        limits: how large a file is.

    Raises:
        DimError: two records have the same place in the input.
        StorageError: a file cannot be written, or a piece cannot be read.
    """
    plans = [
        plan
        for outcome, columns in schemas_of(schema).items()
        for plan in _plan(outcome, columns, pieces, limits)
    ]
    if sum(int(piece.sizes.sum()) for piece in pieces) < _COMMIT_IN_DRIVER:
        files = [plan.write(store) for plan in plans]
    else:
        write = ray.remote(_FilePlan.write_on_cluster)
        files = ray.get([write.remote(plan, store) for plan in plans])
    return sorted(files, key=lambda file: file.path)


def _plan(
    outcome: str, schema: pa.Schema, pieces: Sequence[Piece], limits: Limits
) -> Iterator[_FilePlan]:
    """Which records make which file; a reader finds the columns also where nothing is."""
    pieces = [piece for piece in pieces if piece.outcome == outcome]
    firsts = np.array([piece.places[0] for piece in pieces], np.int64)
    lasts = np.array([piece.places[-1] for piece in pieces], np.int64)
    places, sizes = _in_order(pieces)
    rows_per_file = limits.rows_per_file if outcome == KEPT else LEFT_OUT_PER_FILE
    group_bytes = limits.group_bytes or GROUP_BYTES
    cuts = _cut(places, sizes, limits.target_bytes, rows_per_file)
    for number, (start, end) in enumerate(cuts or [(0, 0)]):
        groups = [
            (int(places[start + low]), int(places[start + high - 1]))
            for low, high in _cut(places[start:end], sizes[start:end], group_bytes, GROUP_PLACES)
        ]
        first, last = (groups[0][0], groups[-1][1]) if groups else (0, -1)
        within = [pieces[at] for at in np.flatnonzero((lasts >= first) & (firsts <= last))]
        name = f"{FOLDERS[outcome]}/part-{number:05d}.parquet"
        yield _FilePlan(name, schema, within, groups, end - start)


@dataclass(frozen=True)
class _FilePlan:
    """One file of the output: the pieces that its records lie in, and its row groups.

    A group is the first and the last place in it.
    """

    name: str
    schema: pa.Schema
    pieces: list[Piece]
    groups: list[tuple[int, int]]
    rows: int

    def write_on_cluster(self, store: Store) -> FileEntry:
        """The same by a task; Ray would try for ever what takes more memory than there is."""
        stop_after()
        return self.write(store)

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
        held: dict[int, pa.Table] = {}
        for first, last in self.groups:
            held = {
                number: held[number] if number in held else piece.read(store, self.schema)
                for number, piece in enumerate(self.pieces)
                if piece.places[-1] >= first and piece.places[0] <= last
            }
            parts = [_between(table, first, last) for table in held.values()]
            yield by_place(pa.concat_tables(parts)).combine_chunks()


def row_bytes(table: pa.Table) -> NDArray[np.int64]:
    """The size of every row in bytes before compression: int64 of shape (rows,).

    It follows from the values alone, unlike ``nbytes``, which depends on how they are sliced.
    """
    total = np.zeros(table.num_rows, np.int64)
    for column in table.columns:
        if column.num_chunks:
            total += np.concatenate([_value_bytes(chunk) for chunk in column.chunks])
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


def _in_order(pieces: Sequence[Piece]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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


def fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema``; those that this kind of record does not have are null."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.schema.names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def count_reasons(outcome: str, table: pa.Table) -> dict[str, int]:
    """How many of the records of one outcome were rejected for what."""
    return dict(Counter(table["reason"].to_pylist())) if outcome == REJECTED else {}


def by_place(table: pa.Table) -> pa.Table:
    """The rows by place in the input; the table itself when they lie so already."""
    places = table["index"].to_numpy()
    return table if (places[1:] >= places[:-1]).all() else table.sort_by("index")


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
