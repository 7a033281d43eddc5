"""Rows of shards by number: of features, as ``dim data features`` wrote them, or of images.

Files come opened. Where they lie and how they are reached is not known here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dim import records
from dim.config import validate_config
from dim.errors import InputError
from dim.features.format import Encoding, Preparation

Row = dict[str, Any]

_AT_ONCE = 8  # reads in flight: an object store answers each in tens of milliseconds


@dataclass(frozen=True)
class ShardFile:
    """A Parquet file of kept records, wherever it lies.

    ``folder`` and ``address`` are what to call its output and itself in a message. ``open`` gives
    the file for a while, with options as pyarrow's ``ParquetFile`` takes them. It raises
    ``StorageError`` where the file cannot be opened, or not be read inside.
    """

    folder: str
    address: str
    open: Callable[..., AbstractContextManager[pq.ParquetFile]]


@dataclass(frozen=True)
class _Known:
    """A file and its footer."""

    file: ShardFile
    metadata: pq.FileMetaData

    @cached_property
    def schema(self) -> pa.Schema:
        return self.metadata.schema.to_arrow_schema()


class FeatureShards:
    """The features of one or more outputs, in order; nothing but their footers is held.

    A row is fetched with the row group that it lies in, which the features job makes small, so
    rows can be read in any order from a disk or an object store, and need neither memory nor disk
    of this machine. Footers stay in memory: about 2 kB a row group.

    Args:
        files: The files, in order.
        texts: The texts that the stage trains on.
        edits: Whether the stage needs features of edits.
        where: What to call the whole in a message.

    Raises:
        InputError: they are of another kind of record, lack a text, were not all made alike, or
            there are none.
        StorageError: a file cannot be read.
    """

    def __init__(
        self, files: Sequence[ShardFile], texts: Sequence[str], *, edits: bool, where: str
    ) -> None:
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="features")
        self._files = list(self._pool.map(_footer, files))
        groups = [
            (number, group, known.metadata.row_group(group).num_rows)
            for number, known in enumerate(self._files)
            for group in range(known.metadata.num_row_groups)
        ]
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        self._check(texts, edits, where)

    @property
    def rows(self) -> int:
        """Samples in all."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @cached_property
    def edits(self) -> bool:
        """Whether there is a source latent."""
        return records.kind_of(self._files[0].schema) == records.FEATURES_OF["edit"]

    @cached_property
    def encoding(self) -> Encoding:
        """How hidden states are kept."""
        return cast(Encoding, self._files[0].schema.metadata[records.ENCODING_KEY].decode())

    @cached_property
    def preparation(self) -> Preparation:
        """How the features were made."""
        return _preparation(self._files[0])

    def check_preparation(self, needed: Preparation) -> None:
        """Refuse features that the model to be trained would not make itself.

        Raises:
            InputError: they were prepared otherwise; the message says what differs.
        """
        if differing := self.preparation.differences(needed):
            raise InputError(
                f"the features in {self._files[0].file.folder} are stale, for they were made with "
                f"another preparation: {'; '.join(differing)}. Make them again with "
                "`dim data features`"
            )

    def read(self, rows: NDArray[np.int64], columns: Sequence[str]) -> list[Row]:
        """Rows by number, in the order asked for (a row may be asked for twice).

        Raises:
            InputError: a value is missing in one of the rows.
            StorageError: a file cannot be read.
        """
        distinct, inverse = np.unique(rows, return_inverse=True)
        group = np.searchsorted(self._ends, distinct, side="right")
        files = self._groups[group, 0]
        parts = self._pool.map(
            lambda file: self._read(file, distinct[files == file], group[files == file], columns),
            np.unique(files),
        )
        read = [row for part in parts for row in part]
        return [read[place] for place in inverse]

    def _read(
        self,
        number: int,
        rows: NDArray[np.int64],
        groups: NDArray[np.int64],
        columns: Sequence[str],
    ) -> list[Row]:
        """Ascending rows of one file, each of which lies in the group named beside it."""
        known = self._files[number]
        needed, at = np.unique(groups, return_inverse=True)
        sizes = self._groups[needed, 2]
        before = self._ends[needed] - sizes  # rows of the data before each group
        start = np.cumsum(sizes) - sizes  # rows read before each group
        with known.file.open(metadata=known.metadata, pre_buffer=True) as parquet:
            table = parquet.read_row_groups(
                self._groups[needed, 1].tolist(), columns=["id", *columns], use_threads=False
            )
            found = table.take(pa.array(rows - before[at] + start[at])).to_pylist()
        for row in found:
            if missing := [name for name in columns if row[name] is None]:
                raise InputError(
                    f"sample {row['id']!r} in {known.file.address} has no {missing[0]}"
                )
        return found

    def _check(self, texts: Sequence[str], edits: bool, where: str) -> None:
        if not self.rows:
            raise InputError(f"the training data in {where} is empty")
        wanted = records.FEATURES_OF["edit" if edits else "t2i"]
        first = self._files[0]
        for known in self._files:
            file, schema = known.file, known.schema
            records.check_version(schema, file.address)
            kind = records.kind_of(schema)
            if kind != wanted:
                raise InputError(f"{file.address} holds {kind} and this stage needs {wanted}")
            lacking = [text for text in texts if f"{text}_states" not in schema.names]
            if lacking:
                held = [name[:-7] for name in schema.names if name.endswith("_states")]
                raise InputError(
                    f"the features in {file.folder} are of the texts {', '.join(held)}, and "
                    f"this stage also trains on {lacking[0]!r}: make them again with "
                    f"texts=[{','.join(texts)}]"
                )
            if schema.metadata != first.schema.metadata:
                differing = _preparation(first).differences(_preparation(known))
                raise InputError(
                    f"{first.file.folder} and {file.folder} hold features that were made "
                    f"differently: {(differing or ['the encoding'])[0]}"
                )


class ImageShards:
    """The images and texts of one or more outputs, in order. Images stay encoded.

    Args:
        dataset: Their files, in order.
        columns: What the stage reads of them.
        where: What to call the whole in a message.

    Raises:
        InputError: there is no sample, a column is missing, or these are features.
    """

    def __init__(self, dataset: ds.Dataset, columns: Sequence[str], *, where: str) -> None:
        if are_features(dataset.schema):
            raise InputError(f"{where} holds features, and images are needed here")
        missing = [name for name in columns if name not in dataset.schema.names]
        if missing:
            raise InputError(
                f"the training data in {where} lacks the column {missing[0]!r}; "
                f"it has {', '.join(dataset.schema.names)}"
            )
        self._dataset = dataset
        self._columns = list(columns)
        self.rows: int = dataset.count_rows()
        if self.rows == 0:
            raise InputError(f"the training data in {where} is empty")

    def read(self, rows: NDArray[np.int64]) -> pa.Table:
        """Rows by number, in the order asked for (a row may be asked for twice).

        The data are streamed once and only the rows asked for are kept.

        Raises:
            InputError: a value is missing (null) in one of the rows.
        """
        wanted, inverse = np.unique(rows, return_inverse=True)
        kept: list[pa.RecordBatch] = []
        first = 0
        for batch in self._dataset.to_batches(columns=self._columns):
            low, high = np.searchsorted(wanted, [first, first + batch.num_rows])
            if high > low:
                kept.append(batch.take(pa.array(wanted[low:high] - first)))
            first += batch.num_rows
        table = pa.Table.from_batches(kept)
        for name in self._columns:
            if table.column(name).null_count:
                at = table.column(name).is_null().to_pylist().index(True)
                sample = table.column("id")[at].as_py()
                raise InputError(f"sample {sample!r} has no {name}, which this stage trains on")
        return table.take(pa.array(inverse))

    def head(self, count: int, column: str) -> pa.ChunkedArray | None:
        """The first ``count`` values of a column that not all data have; ``None`` without it."""
        if column not in self._dataset.schema.names:
            return None
        return self._dataset.head(count, columns=[column]).column(column)


def are_features(schema: pa.Schema) -> bool:
    """Whether records of ``schema`` are features (or images and texts, as is usual)."""
    return records.kind_of(schema) in records.FEATURES_OF.values()


def _footer(file: ShardFile) -> _Known:
    with file.open() as parquet:
        return _Known(file, parquet.metadata)


def _preparation(known: _Known) -> Preparation:
    stored = json.loads(known.schema.metadata[records.PREPARATION_KEY])
    return validate_config(Preparation, stored, where=known.file.address)
