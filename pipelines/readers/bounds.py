"""Bounds: how much is read of what others made, found out before it is read.

A few bytes of a table or a tar can stand for an image of any size, in any number of records: by
compression, by a dictionary that many rows point to, by a hole, or by a header that lies.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dim import tables
from dim.errors import InputError
from infra.storage import Store, TooLargeError
from pipelines.outcome import Rejection
from pipelines.readers import forms

MAX_BYTES = 50_000_000
"""Size of an encoded image at most, unless a job is told otherwise."""

READ_AHEAD = 1 << 20

_OF_A_CELL = 1024  # bytes that Arrow keeps of a cell besides its own, at most
_OF_A_CHUNK = 256 << 20  # bytes that the cells of a row group may have beyond what is allowed
_KEYS_AT_ONCE = 4096
_LONGEST_KEY = 1 << 16  # bytes
_ROWS_OF_A_BYTE = 64  # of a file, at most: numbered names take far less when they are compressed
_WRAPPERS = (pa.DictionaryScalar, pa.ExtensionScalar, pa.RunEndEncodedScalar, pa.UnionScalar)


def too_many_bytes(name: str, size: int, most: int) -> Rejection:
    """What becomes of an image that is too large to be read."""
    return Rejection(
        "image.too_many_bytes", f"{name} has {size:,} bytes, and max_bytes is {most:,}", size, most
    )


def read_file(store: Store, name: str, most: int) -> bytes:
    """The bytes of a file of a store.

    Raises:
        Rejection: it has more than ``most`` bytes; no more than that was read.
        StorageError: it cannot be read.
    """
    try:
        return store.read(name, most)
    except TooLargeError as error:
        raise too_many_bytes(error.address, error.size, error.most) from None


def cells(batch: pa.RecordBatch, row: int, most: int) -> dict[str, Any]:
    """The values of a row; in the place of one of more than ``most`` bytes, why it is not read."""
    found: dict[str, Any] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        size = column.slice(row, 1).nbytes
        if size > most + _OF_A_CELL:
            size = _bytes_of(column[row], most)  # the slice of a dictionary has all of its values
        large = size > most + _OF_A_CELL
        found[name] = too_many_bytes(repr(name), size, most) if large else column[row].as_py()
    return found


def _bytes_of(value: pa.Scalar, most: int) -> int:
    """The size of a value; for one of several parts, about as much of it as is over ``most``."""
    if not value.is_valid:
        return 0
    if isinstance(value, pa.BinaryScalar):
        return value.as_buffer().size
    if isinstance(value, _WRAPPERS):
        return _bytes_of(value.value, most)
    if isinstance(value, pa.StructScalar):
        parts: Iterable[pa.Scalar] = value.values()
    elif isinstance(value, pa.ListScalar) and not pa.types.is_primitive(value.values.type):
        parts = value.values
    else:
        return value.values.nbytes if isinstance(value, pa.ListScalar) else 16
    size = 0
    for part in parts:
        size += _bytes_of(part, most)
        if size > most + _OF_A_CELL:
            break
    return size


def batches(
    store: Store, name: str, columns: frozenset[str], start: int, stop: int, most: int
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of a Parquet or Arrow file that touch rows ``start`` to ``stop``, with each
    batch's first row.

    A batch of a Parquet file is one row: a few bytes there can stand for an image of any size in
    any number of rows, and only what is in memory can be measured.

    Args:
        most: bytes of a cell at most; a row group that has more on average is not read.

    Raises:
        InputError: there is such a row group, or a column that is more than data.
    """
    where = store.address(name)
    with ExitStack() as stack:
        file = stack.enter_context(store.open_input(name))
        if forms.is_parquet(file):
            table = tables.open_parquet(file, where)
            yield from _parquet_batches(table, where, columns, start, stop, most)
            return
        if store.is_local:
            file = stack.enter_context(pa.memory_map(store.path(name)))
        _, found = tables.open_arrow(file, where, columns)
        first = 0
        for batch in found:
            if first >= stop:
                return
            if first + batch.num_rows > start:
                yield batch.select([c for c in batch.schema.names if c in columns]), first
            first += batch.num_rows


def _parquet_batches(
    file: pq.ParquetFile, where: str, columns: frozenset[str], start: int, stop: int, most: int
) -> Iterator[tuple[pa.RecordBatch, int]]:
    known = [name for name in file.schema_arrow.names if name in columns]
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first + rows > start and first < stop:
            _check_chunks(file.metadata.row_group(group), where, columns, most)
            found = file.iter_batches(1, row_groups=[group], columns=known)
            for place, batch in enumerate(found, first):
                if place >= stop:
                    return
                if place >= start:
                    yield batch, place
        first += rows


def _check_chunks(
    group: pq.RowGroupMetaData, where: str, columns: frozenset[str], most: int
) -> None:
    """Refuse a row group whose footer promises absurdly much of a column."""
    for number in range(group.num_columns):
        chunk = group.column(number)
        name, size = chunk.path_in_schema.partition(".")[0], chunk.total_uncompressed_size
        if name in columns and size > group.num_rows * most + _OF_A_CHUNK:
            raise InputError(
                f"the column {name!r} of {where} has {size:,} bytes in a row group of "
                f"{group.num_rows:,}, and max_bytes is {most:,}"
            )


@contextmanager
def open_keys(
    store: Store, name: str, size: int, columns: Sequence[str]
) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """The schema of a Parquet or Arrow file, and its rows with only those of ``columns`` it has.

    Args:
        size: bytes of the file.

    Raises:
        InputError: a column is more than data; while the rows are read, one has a value of more
            than 65,536 bytes, or there are more rows than the file can hold.
        ArrowException, OSError: the file is damaged; also while the rows are read.
    """
    where = store.address(name)
    with store.open_input(name) as file:
        if forms.is_parquet(file):
            schema, found = _parquet_keys(file, where, columns)
        else:
            schema, found = tables.open_arrow(file, where, columns)
        yield schema, _checked_keys(found, where, size, columns)


def _parquet_keys(
    file: pa.NativeFile, where: str, columns: Sequence[str]
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    schema = tables.open_parquet(file, where).schema_arrow
    chosen = [name for name in schema.names if name in columns]
    # As a dictionary, what a page says once is in memory once, in however many rows it is.
    flat = [name for name in chosen if not schema.field(name).type.num_fields]
    table = tables.open_parquet(file, where, read_dictionary=flat)
    return schema, table.iter_batches(_KEYS_AT_ONCE if flat == chosen else 1, columns=chosen)


def _checked_keys(
    found: Iterator[pa.RecordBatch], where: str, size: int, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    rows = 0
    for batch in found:
        rows += batch.num_rows
        if rows > size * _ROWS_OF_A_BYTE:
            raise InputError(f"{where} says it has {rows:,} rows or more, in {size:,} bytes")
        batch = batch.select([name for name in batch.schema.names if name in columns])
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            longest = _longest(column)
            if longest > _LONGEST_KEY:
                raise InputError(
                    f"the column {name!r} of {where} has a value of {longest:,} bytes, and a key "
                    f"may have {_LONGEST_KEY:,}"
                )
        for first in range(0, batch.num_rows, _KEYS_AT_ONCE):
            yield _without_dictionaries(batch.slice(first, _KEYS_AT_ONCE))


def _longest(column: pa.Array) -> int:
    """Bytes of the largest value."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _longest(column.dictionary)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        return _longest(column.cast(pa.large_binary()))
    try:
        return pc.max(pc.binary_length(column)).as_py() or 0
    except pa.ArrowNotImplementedError:  # it is neither text nor bytes
        nested = range(len(column)) if kind.num_fields else ()
        return max((column.slice(row, 1).nbytes for row in nested), default=0)


def _without_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same values, which are then Python's in a tenth of the time."""
    columns = [
        column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        for column in batch.columns
    ]
    if not columns:
        return batch
    return pa.RecordBatch.from_arrays(columns, batch.schema.names)


class TarReader(io.BufferedReader):
    """A tar whose headers cannot make us read without end: a header says how long it goes on.

    Args:
        file: the tar.
        most: bytes that are read at once at most.
    """

    def __init__(self, file: pa.NativeFile, most: int, read_ahead: int = READ_AHEAD) -> None:
        super().__init__(file, read_ahead)
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes.

        Raises:
            tarfile.ReadError: more are asked for than are allowed.
        """
        if size is None or not 0 <= size <= self._most:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, most: int) -> bytes:
    """The bytes of a file in a tar.

    Raises:
        InputError: it is sparse, so that a few bytes stand for any number of them.
        Rejection: it has more than ``most`` bytes; they are not read.
        tarfile.ReadError: it ends early.
    """
    if member.issparse():
        raise InputError("it is sparse")
    if member.size > most:
        raise too_many_bytes(member.name, member.size, most)
    opened = tar.extractfile(member)
    data = opened.read() if opened else b""
    if len(data) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return data
