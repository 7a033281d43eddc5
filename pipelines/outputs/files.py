"""The files of an output: how records become Parquet, as they come and in little memory.

Where a file and a row group end follows from the records alone and not from how they arrived, so
the same records always make the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dim.records import FAILED as FAILED_SCHEMA
from dim.records import REJECT as REJECT_SCHEMA
from infra.storage import Store
from pipelines.outcome import FAILED, KEPT, REJECTED
from pipelines.outputs.manifest import FileEntry

FOLDERS = {KEPT: "data", REJECTED: "rejected", FAILED: "failed"}
GROUP_ROWS = 256
GROUP_BYTES = 32 << 20  # a reader that wants one record fetches no more than this

_READ = 8 << 20  # bytes

Name = Callable[[int, str], str]
"""What a file is called: which one of several it is, and the hash of what it holds."""


@dataclass(frozen=True)
class Limits:
    """How large files and their row groups are.

    Attributes:
        rows_per_file: kept records per file at most.
        target_bytes: size of a file at most, before compression; a larger record has its own.
        group_bytes: the same of a row group, the least that a reader can fetch; None = 32 MiB.
    """

    rows_per_file: int
    target_bytes: int = 256 << 20
    group_bytes: int | None = None


def schemas_of(kept: pa.Schema) -> dict[str, pa.Schema]:
    """The columns of the records of each outcome."""
    return {KEPT: kept, REJECTED: REJECT_SCHEMA, FAILED: FAILED_SCHEMA}


def write_files(
    store: Store, schema: pa.Schema, tables: Iterable[pa.Table], limits: Limits, name: Name
) -> Iterator[FileEntry]:
    """Write records, in the order in which they come; nothing if there are none.

    Args:
        store: the job's output folder.
        schema: the columns, which the tables have.
        tables: the records; no more of them than a row group are in memory.
        limits: how large a file is.
        name: what a file is called.

    Raises:
        StorageError: a file cannot be written.
    """
    in_files = groupby(_numbered(_groups(tables, limits), limits), itemgetter(0))
    for number, numbered in in_files:
        yield _write_file(store, schema, (group for _, group in numbered), name, number)


def write_empty(store: Store, schema: pa.Schema, name: Name) -> FileEntry:
    """A file without records, of which a reader learns the columns."""
    return _write_file(store, schema, [schema.empty_table()], name, 0)


def _write_file(
    store: Store, schema: pa.Schema, groups: Iterable[pa.Table], name: Name, number: int
) -> FileEntry:
    rows = 0
    with (
        store.open_unnamed(name(number, ""), lambda file: name(number, file.sha256)) as file,
        pq.ParquetWriter(file, schema, **_parquet_options(schema)) as writer,
    ):
        for group in groups:
            writer.write_table(group, row_group_size=group.num_rows or None)
            rows += group.num_rows
    path = name(number, file.sha256)
    return FileEntry(path=path, rows=rows, bytes=file.size, sha256=file.sha256)


def split(table: pa.Table, schemas: dict[str, pa.Schema]) -> Iterator[tuple[str, pa.Table]]:
    """The records of each outcome, with the columns that they have in the output."""
    for outcome, schema in schemas.items():
        chosen = _where(table, pc.equal(table["outcome"], outcome))
        if chosen.num_rows:
            yield outcome, fit(chosen, schema)


def fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema``; those that this kind of record does not have are null."""
    columns = [
        table[field.name].cast(field.type)
        if field.name in table.schema.names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def count_reasons(rejected: Iterable[pa.Table]) -> dict[str, int]:
    """How many records were rejected for what."""
    return dict(Counter(chain.from_iterable(table["reason"].to_pylist() for table in rejected)))


def by_place(table: pa.Table) -> pa.Table:
    """The rows by place in the input; the table itself when they lie so already."""
    places = table["index"].to_numpy()
    return table if (places[1:] >= places[:-1]).all() else table.sort_by("index")


def size_and_hash(store: Store, name: str) -> tuple[int, str]:
    """How many bytes a file has, and their SHA-256 in hex, a few of them in memory at a time.

    Raises:
        StorageError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with store.open_input(name) as file:
        while data := file.read(_READ):
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()


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


def _numbered(groups: Iterable[pa.Table], limits: Limits) -> Iterator[tuple[int, pa.Table]]:
    """Row groups, each with the number of its file: a file has one at least."""
    number, rows, size = 0, 0, 0
    for group in groups:
        more = int(row_bytes(group).sum())
        is_full = rows + group.num_rows > limits.rows_per_file or size + more > limits.target_bytes
        if rows and is_full:
            number, rows, size = number + 1, 0, 0
        rows, size = rows + group.num_rows, size + more
        yield number, group


def _groups(tables: Iterable[pa.Table], limits: Limits) -> Iterator[pa.Table]:
    """The row groups of records, each as long as the limits allow."""
    most_rows = min(GROUP_ROWS, limits.rows_per_file)
    most_bytes = min(limits.group_bytes or GROUP_BYTES, limits.target_bytes)
    waiting: pa.Table | None = None
    for table in tables:
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        *whole, last = _cut(row_bytes(waiting), most_bytes, most_rows)
        for run in whole:
            yield waiting.slice(run.start, run.stop - run.start).combine_chunks()
        waiting = waiting.slice(last.start)
    if waiting is not None and waiting.num_rows:
        yield waiting.combine_chunks()


def _cut(sizes: NDArray[np.int64], most_bytes: int, most_rows: int) -> list[slice]:
    """Divide records into runs, one at least, each as long as the limits allow.

    A run ends where the next record would make it larger than ``most_bytes``.
    """
    ends = np.cumsum(sizes)
    runs: list[slice] = []
    first = 0
    while first < len(sizes):
        before = ends[first] - sizes[first]
        by_bytes = int(np.searchsorted(ends, before + most_bytes, side="right"))
        end = max(first + 1, min(by_bytes, first + most_rows))
        runs.append(slice(first, end))
        first = end
    return runs or [slice(0, 0)]


def _where(table: pa.Table, mask: pa.ChunkedArray) -> pa.Table:
    """The rows of a mask; the table itself when that is all, for a filter copies every image."""
    return table if pc.all(mask, skip_nulls=False).as_py() else table.filter(mask)


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
