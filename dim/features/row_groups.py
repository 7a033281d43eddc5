"""Rows of Parquet files by number, each fetched with the row group that it lies in.

So rows can be read in any order from a disk or an object store, and need neither memory nor disk
of this machine. Files come opened. Where they lie and how they are reached is not known here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tenacity import RetryCallState, retry, retry_if_exception_type, wait_random_exponential

from dim.errors import InputError, SampleError, StorageUnavailable, UnreadableFile

Row = dict[str, Any]
ResultT = TypeVar("ResultT")

_AT_ONCE = 16  # reads in flight: an object store answers each in tens of milliseconds
_FOOTERS = 128  # that are kept; what many files have would be gigabytes
_TRIES = 6  # of a store that does not answer: half a minute at most
_TRIES_OF_DAMAGE = 3  # a file may look damaged because an answer broke off


@dataclass(frozen=True)
class ShardFile:
    """A Parquet file of kept records, wherever it lies.

    ``folder`` and ``address`` are what to call its output and itself in a message; ``rows`` is how
    many it has. ``open`` gives the file for a while, with options as pyarrow's ``ParquetFile``
    takes them. It raises ``UnreadableFile`` where the file is not there or damaged,
    ``StorageUnavailable`` where another try may go well, and ``StorageError`` where it will not.
    """

    folder: str
    address: str
    rows: int
    open: Callable[..., AbstractContextManager[pq.ParquetFile]]


@dataclass(frozen=True)
class _Footer:
    """A file's footer; ``ends`` (row groups,) are the rows up to the end of each row group."""

    metadata: pq.FileMetaData
    ends: NDArray[np.int64]


class RowGroups:
    """The rows of many files, in order, by number.

    Of all files their names and numbers of rows are held, a few hundred bytes a file; of row groups
    nothing, but for the footers of the files read last. Reads that fail are tried again, with
    growing pauses of random length.

    Args:
        files: The files, in order.
        check: Is shown each file's schema when its footer is read, and raises ``InputError`` where
            the file will not do.
    """

    def __init__(
        self, files: Sequence[ShardFile], check: Callable[[ShardFile, pa.Schema], None]
    ) -> None:
        self.files = list(files)
        self._check = check
        self._ends = np.cumsum([file.rows for file in self.files], dtype=np.int64)
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="row-groups")
        self._footers: OrderedDict[int, _Footer] = OrderedDict()
        self._lock = Lock()
        self._walks: tuple[int, int, int] | None = None
        self._largest = 0
        self.held = HeldGroups()

    def hold(self, walks: int, span: int, runs: int) -> None:
        """Keep in memory the row groups that walks through the rows come back to.

        Args:
            walks: How many there are.
            span: Rows that a walk moves among at a time.
            runs: Runs of neighbouring rows that these may belong to.
        """
        self._walks = walks, span, runs
        with self._lock:
            self._make_room(0)

    @property
    def rows(self) -> int:
        """Samples in all."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def schema(self, number: int = 0) -> pa.Schema:
        """The columns of file ``number``.

        Raises:
            InputError: the file will not do.
            StorageError: it cannot be read.
        """
        return self._footer(number).metadata.schema.to_arrow_schema()

    def check_files(self) -> None:
        """Read the footer of every file once, many at a time.

        Raises:
            InputError: a file will not do.
            StorageError: one cannot be read.
        """
        for _ in self._pool.map(self._footer, range(len(self.files))):
            pass

    def read(
        self, number: int, look: Callable[[pq.ParquetFile], ResultT], **options: Any
    ) -> ResultT:
        """What ``look`` makes of file ``number``; it may be called again where reading fails.

        ``options`` are those of pyarrow's ``ParquetFile``.

        Raises:
            InputError: the file will not do.
            UnreadableFile: it is not there, or damaged.
            StorageError: the store does not answer, or refuses.
        """
        footer = self._footer(number)

        def once() -> ResultT:
            with self.files[number].open(metadata=footer.metadata, **options) as parquet:
                return look(parquet)

        return _patiently(once)()

    def fetch(
        self, rows: NDArray[np.int64], columns: Sequence[str], optional: Sequence[str] = ()
    ) -> list[Row | SampleError]:
        """Rows by number, in the order asked for (a row may be asked for twice).

        Each comes with its ``id``, and with its values of the ``optional`` columns that its file
        has. In place of a row that has no value in one of ``columns``, or lies in a part of a file
        that is damaged, stands the error that says so.

        Raises:
            InputError: a file is not what it must be.
            StorageError: the store does not answer, or refuses.
        """
        distinct, inverse = np.unique(rows, return_inverse=True)
        files = np.searchsorted(self._ends, distinct, side="right")
        needed, of_file = np.unique(files, return_inverse=True)
        footers = list(self._pool.map(self._footer_or_error, needed.tolist()))
        jobs: list[Callable[[], list[Row | SampleError]]] = []
        for place, (number, footer) in enumerate(zip(needed.tolist(), footers, strict=True)):
            begin = int(self._ends[number]) - self.files[number].rows
            within = distinct[of_file == place] - begin
            if isinstance(footer, UnreadableFile):
                jobs.append(partial(self._unreadable, number, within, footer))
                continue
            jobs.extend(
                partial(self._read, number, footer, group, places, columns, optional)
                for group, places in _by_group(within, footer)
            )
        found = [row for part in self._pool.map(lambda job: job(), jobs) for row in part]
        return [found[place] for place in inverse]

    def _read(
        self,
        number: int,
        footer: _Footer,
        group: int,
        places: NDArray[np.int64],
        columns: Sequence[str],
        optional: Sequence[str],
    ) -> list[Row | SampleError]:
        """Rows of a row group by their places in their file."""
        there = footer.metadata.schema.names if optional else []
        names = ["id", *columns, *(name for name in optional if name in there)]
        try:
            table = self._group(number, footer, group, names)
            begin = int(footer.ends[group]) - table.num_rows
            rows = table.take(pa.array(places - begin)).to_pylist()
        except (UnreadableFile, UnicodeDecodeError) as error:
            return self._unreadable(number, places, error)
        return [self._whole(number, row, columns) for row in rows]

    def _whole(self, number: int, row: Row, columns: Sequence[str]) -> Row | SampleError:
        missing = [name for name in columns if row[name] is None]
        if not missing:
            return row
        where = self.files[number].address
        return SampleError(f"sample {row['id']!r} in {where} has no {missing[0]}", "missing_value")

    def _unreadable(
        self, number: int, places: NDArray[np.int64], error: Exception
    ) -> list[Row | SampleError]:
        where = self.files[number].address
        return [
            SampleError(f"row {place} of {where} cannot be read: {error}", "unreadable")
            for place in places.tolist()
        ]

    def _group(self, number: int, footer: _Footer, group: int, columns: list[str]) -> pa.Table:
        return self.held.get(
            (number, group, *columns),
            footer.metadata.row_group(group).num_rows,
            partial(_patiently(self._read_group), number, footer, group, columns),
        )

    def _read_group(self, number: int, footer: _Footer, group: int, columns: list[str]) -> pa.Table:
        with self.files[number].open(metadata=footer.metadata, pre_buffer=True) as parquet:
            return parquet.read_row_groups([group], columns=columns, use_threads=False)

    def _footer_or_error(self, number: int) -> _Footer | UnreadableFile:
        try:
            return self._footer(number)
        except UnreadableFile as error:
            return error

    def _footer(self, number: int) -> _Footer:
        with self._lock:
            if number in self._footers:
                self._footers.move_to_end(number)
                return self._footers[number]
        footer = _patiently(self._read_footer)(number)
        with self._lock:
            self._footers[number] = footer
            while len(self._footers) > _FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def _read_footer(self, number: int) -> _Footer:
        file = self.files[number]
        with file.open() as parquet:
            metadata = parquet.metadata
        if metadata.num_rows != file.rows:
            raise InputError(
                f"{file.address} has {metadata.num_rows} rows, and its manifest says {file.rows}"
            )
        self._check(file, metadata.schema.to_arrow_schema())
        groups = range(metadata.num_row_groups)
        sizes = [metadata.row_group(group).num_rows for group in groups]
        with self._lock:
            self._make_room(max(sizes, default=0))
        return _Footer(metadata, np.cumsum(sizes, dtype=np.int64))

    def _make_room(self, rows: int) -> None:
        """For row groups as large as any met so far, and of ``rows`` rows."""
        self._largest = max(self._largest, rows)
        if self._walks is not None:
            walks, span, runs = self._walks
            # Both ends of a run may lie in the middle of a row group.
            self.held.rows = walks * (span + 2 * runs * self._largest)


class HeldGroups:
    """Row groups that will soon be asked for again: those used last.

    ``rows`` is how many rows are held at most, in whole row groups; 0 holds none. Who asks for a
    row group that another thread is reading waits for it.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._tables: OrderedDict[tuple[Any, ...], tuple[int, Future[pa.Table]]] = OrderedDict()
        self._count = 0
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        """Memory they take."""
        with self._lock:
            futures = [future for _, future in self._tables.values() if future.done()]
        return sum(future.result().nbytes for future in futures if not future.exception())

    def get(self, key: tuple[Any, ...], rows: int, read: Callable[[], pa.Table]) -> pa.Table:
        """The row group of ``rows`` rows that is called ``key``, from memory or by ``read``."""
        if rows > self.rows:
            return read()
        with self._lock:
            known = self._tables.get(key)
            future = known[1] if known else Future[pa.Table]()
            if known:
                self._tables.move_to_end(key)
            else:
                self._tables[key] = rows, future
                self._count += rows
            while self._count > self.rows:
                self._count -= self._tables.popitem(last=False)[1][0]
        if not known:
            self._read(key, future, read)
        return future.result()

    def _read(self, key: tuple[Any, ...], future: Future[pa.Table], read: Any) -> None:
        try:
            future.set_result(read())
        except BaseException as error:
            with self._lock:
                if (gone := self._tables.pop(key, None)) is not None:
                    self._count -= gone[0]
            future.set_exception(error)


def whole(found: Sequence[ResultT | SampleError]) -> list[ResultT]:
    """What was found, where every sample is usable.

    Raises:
        SampleError: the first that is not.
    """
    good: list[ResultT] = []
    for item in found:
        if isinstance(item, SampleError):
            raise item
        good.append(item)
    return good


def _by_group(
    places: NDArray[np.int64], footer: _Footer
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Ascending places in a file, by the row group that they lie in."""
    groups = np.searchsorted(footer.ends, places, side="right")
    for group in np.unique(groups).tolist():
        yield group, places[groups == group]


def _patiently(read: Callable[..., ResultT]) -> Callable[..., ResultT]:
    """``read``, tried again where another try may go well."""
    return retry(
        retry=retry_if_exception_type((StorageUnavailable, UnreadableFile)),
        stop=_enough,
        wait=wait_random_exponential(0.5, max=15),
        reraise=True,
    )(read)


def _enough(state: RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    tries = _TRIES_OF_DAMAGE if isinstance(error, UnreadableFile) else _TRIES
    return state.attempt_number >= tries
