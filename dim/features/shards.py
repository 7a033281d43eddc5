"""The samples of a stage by number: features, as ``dim data features`` wrote them, or images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dim import records
from dim.config import validate_config
from dim.errors import InputError, SampleError
from dim.features.format import Encoding, Preparation
from dim.features.row_groups import Row, RowGroups, ShardFile, whole


class Samples(Protocol):
    """Some samples with their images, by position."""

    def __len__(self) -> int: ...

    def fetch(self, positions: NDArray[np.int64]) -> list[Row | SampleError]:
        """The samples at ``positions``, in that order, or what is wrong with them."""
        ...

    def stored_order(self) -> NDArray[np.int64]:
        """All positions, in the order in which reading them costs least."""
        ...


class FeatureShards:
    """The features of one or more outputs, in order.

    Args:
        files: The files, in order.
        texts: The texts that the stage trains on.
        edits: Whether the stage needs features of edits.
        where: What to call the whole in a message.

    Raises:
        InputError: the first file is of another kind of record or lacks a text, or there is no
            sample. Other files are checked when they are first read, or by ``check_files``.
        StorageError: a file cannot be read.
    """

    def __init__(
        self, files: Sequence[ShardFile], texts: Sequence[str], *, edits: bool, where: str
    ) -> None:
        self._texts = list(texts)
        self._kind = records.FEATURES_OF["edit" if edits else "t2i"]
        self.groups = RowGroups(files, self._check)
        self._first: tuple[ShardFile, pa.Schema] | None = None
        if not self.groups.rows:
            raise InputError(f"the training data in {where} is empty")
        self._first = self.groups.files[0], self.groups.schema()

    @property
    def rows(self) -> int:
        """Samples in all."""
        return self.groups.rows

    def check_files(self) -> None:
        """See ``RowGroups.check_files``."""
        self.groups.check_files()

    @cached_property
    def edits(self) -> bool:
        """Whether there is a source latent."""
        return self._kind == records.FEATURES_OF["edit"]

    @cached_property
    def encoding(self) -> Encoding:
        """How hidden states are kept."""
        return cast(Encoding, self.groups.schema().metadata[records.ENCODING_KEY].decode())

    @cached_property
    def preparation(self) -> Preparation:
        """How the features were made."""
        return _preparation(self.groups.files[0], self.groups.schema())

    def check_preparation(self, needed: Preparation) -> None:
        """Refuse features that the model to be trained would not make itself.

        Raises:
            InputError: they were prepared otherwise; the message says what differs.
        """
        if differing := self.preparation.differences(needed):
            raise InputError(
                f"the features in {self.groups.files[0].folder} are stale, for they were made with "
                f"another preparation: {'; '.join(differing)}. Make them again with "
                "`dim data features`"
            )

    def fetch(self, rows: NDArray[np.int64], columns: Sequence[str]) -> list[Row | SampleError]:
        """See ``RowGroups.fetch``."""
        return self.groups.fetch(rows, columns)

    def read(self, rows: NDArray[np.int64], columns: Sequence[str]) -> list[Row]:
        """Rows by number, in the order asked for (a row may be asked for twice).

        Raises:
            SampleError: one of the rows cannot be used.
            InputError, StorageError: as for ``fetch``.
        """
        return whole(self.fetch(rows, columns))

    def _check(self, file: ShardFile, schema: pa.Schema) -> None:
        records.check_version(schema, file.address)
        kind = records.kind_of(schema)
        if kind != self._kind:
            raise InputError(f"{file.address} holds {kind} and this stage needs {self._kind}")
        lacking = [text for text in self._texts if f"{text}_states" not in schema.names]
        if lacking:
            held = [name[:-7] for name in schema.names if name.endswith("_states")]
            raise InputError(
                f"the features in {file.folder} are of the texts {', '.join(held)}, and "
                f"this stage also trains on {lacking[0]!r}: make them again with "
                f"texts=[{','.join(self._texts)}]"
            )
        if self._first is None:
            return
        first, other = self._first
        if schema.metadata != other.metadata:
            differing = _preparation(first, other).differences(_preparation(file, schema))
            raise InputError(
                f"{first.folder} and {file.folder} hold features that were made "
                f"differently: {(differing or ['the encoding'])[0]}"
            )


class ImageShards:
    """The images and texts of one or more outputs, in order. Images stay encoded.

    Args:
        files: The files, in order.
        columns: What the stage reads of them besides the id.
        where: What to call the whole in a message.

    Raises:
        InputError: there is no sample, a column is missing, or these are features. Of the first
            file; others are checked when they are first read, or by ``check_files``.
        StorageError: a file cannot be read.
    """

    def __init__(self, files: Sequence[ShardFile], columns: Sequence[str], *, where: str) -> None:
        self._columns = [name for name in columns if name != "id"]
        self._where = where
        self.groups = RowGroups(files, self._check)
        if not self.groups.rows:
            raise InputError(f"the training data in {where} is empty")
        self.groups.schema()

    @property
    def rows(self) -> int:
        """Samples in all."""
        return self.groups.rows

    def check_files(self) -> None:
        """See ``RowGroups.check_files``."""
        self.groups.check_files()

    def fetch(
        self, rows: NDArray[np.int64], optional: Sequence[str] = ()
    ) -> list[Row | SampleError]:
        """See ``RowGroups.fetch``."""
        return self.groups.fetch(rows, self._columns, optional)

    def read(self, rows: NDArray[np.int64]) -> pa.Table:
        """A few rows by number, in the order asked for (a row may be asked for twice).

        Raises:
            SampleError: one of the rows cannot be used.
            InputError, StorageError: as for ``fetch``.
        """
        schema = self.groups.schema()
        fields = [schema.field(name) for name in ["id", *self._columns]]
        return pa.Table.from_pylist(whole(self.fetch(rows)), pa.schema(fields))

    def head(self, count: int, column: str) -> pa.ChunkedArray | None:
        """The first ``count`` values of a column that not all data have; ``None`` without it."""
        schema = self.groups.schema()
        if column not in schema.names:
            return None
        found = self.groups.fetch(np.arange(min(count, self.rows)), [column])
        values = [None if isinstance(row, SampleError) else row[column] for row in found]
        return pa.chunked_array([values], schema.field(column).type)

    def _check(self, file: ShardFile, schema: pa.Schema) -> None:
        if are_features(schema):
            raise InputError(f"{file.folder} holds features, and images are needed here")
        records.check_version(schema, file.address)
        missing = [name for name in ["id", *self._columns] if name not in schema.names]
        if missing:
            raise InputError(
                f"the training data in {self._where} lacks the column {missing[0]!r}; "
                f"{file.address} has {', '.join(schema.names)}"
            )


@dataclass(frozen=True)
class Share:
    """A worker's rows of image shards, with the ``optional`` columns where there are such."""

    shards: ImageShards
    rows: NDArray[np.int64]
    optional: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, positions: NDArray[np.int64]) -> list[Row | SampleError]:
        """See ``Samples.fetch``."""
        return self.shards.fetch(self.rows[positions], self.optional)

    def stored_order(self) -> NDArray[np.int64]:
        """See ``Samples.stored_order``."""
        return np.argsort(self.rows, kind="stable")


@dataclass(frozen=True)
class TableSamples:
    """A few samples in memory."""

    table: pa.Table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def fetch(self, positions: NDArray[np.int64]) -> list[Row | SampleError]:
        """See ``Samples.fetch``."""
        return list(self.table.take(pa.array(positions)).to_pylist())

    def stored_order(self) -> NDArray[np.int64]:
        """See ``Samples.stored_order``."""
        return np.arange(len(self))


def are_features(schema: pa.Schema) -> bool:
    """Whether records of ``schema`` are features (or images and texts, as is usual)."""
    return records.kind_of(schema) in records.FEATURES_OF.values()


def _preparation(file: ShardFile, schema: pa.Schema) -> Preparation:
    stored = json.loads(schema.metadata[records.PREPARATION_KEY])
    return validate_config(Preparation, stored, where=file.address)
