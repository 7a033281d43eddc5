"""Feature shards: what ``dim data features`` wrote, checked and read row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dim import records
from dim.config import validate_config
from dim.errors import InputError
from dim.features.packing import Encoding
from dim.features.preparation import Preparation
from infra import storage
from infra.storage import Store

Row = dict[str, Any]

_AT_ONCE = 8  # reads in flight: an object store answers each in tens of milliseconds


@dataclass(frozen=True)
class _File:
    store: Store
    name: str
    metadata: pq.FileMetaData

    @property
    def address(self) -> str:
        return self.store.address(self.name)

    @cached_property
    def schema(self) -> pa.Schema:
        return self.metadata.schema.to_arrow_schema()


class FeatureShards:
    """The features of one or more output folders, in order; nothing but their footers is held.

    A row is fetched with the row group that it lies in, which the features job makes small, so
    rows can be read in any order from a disk or an object store, and need neither memory nor disk
    of this machine. Footers stay in memory: about 2 kB a row group.
    """

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = files
        groups = [
            (number, group, file.metadata.row_group(group).num_rows)
            for number, file in enumerate(files)
            for group in range(file.metadata.num_row_groups)
        ]
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="features")

    @classmethod
    def open(cls, uris: Sequence[str], texts: Sequence[str], *, edits: bool) -> FeatureShards:
        """Open feature shards for a stage, and check that they are whole and what it needs.

        Raises:
            InputError: they are of another kind of record, lack a text, were not all made alike,
                or there are none; or a file is not as long as its manifest says.
            StorageError: a folder or file cannot be read.
        """
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            entries = [entry for uri in uris for entry in _entries(uri)]
            files = list(pool.map(lambda entry: _open(*entry), entries))
        shards = cls(files)
        shards._check(uris, texts, edits)
        return shards

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
                f"the features in {self._files[0].store.uri} are stale, for they were made with "
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
        file = self._files[number]
        needed, at = np.unique(groups, return_inverse=True)
        sizes = self._groups[needed, 2]
        before = self._ends[needed] - sizes  # rows of the data before each group
        start = np.cumsum(sizes) - sizes  # rows read before each group
        with file.store.open_parquet(file.name, metadata=file.metadata, pre_buffer=True) as parquet:
            table = parquet.read_row_groups(
                self._groups[needed, 1].tolist(), columns=["id", *columns], use_threads=False
            )
            found = table.take(pa.array(rows - before[at] + start[at])).to_pylist()
        for row in found:
            if missing := [name for name in columns if row[name] is None]:
                raise InputError(f"sample {row['id']!r} in {file.address} has no {missing[0]}")
        return found

    def _check(self, uris: Sequence[str], texts: Sequence[str], edits: bool) -> None:
        where = ", ".join(uris)
        if not self.rows:
            raise InputError(f"the training data in {where} is empty")
        wanted = records.FEATURES_OF["edit" if edits else "t2i"]
        first = self._files[0]
        for file in self._files:
            records.check_version(file.schema, file.address)
            kind = records.kind_of(file.schema)
            if kind != wanted:
                raise InputError(f"{file.address} holds {kind} and this stage needs {wanted}")
            lacking = [text for text in texts if f"{text}_states" not in file.schema.names]
            if lacking:
                held = [name[:-7] for name in file.schema.names if name.endswith("_states")]
                raise InputError(
                    f"the features in {file.store.uri} are of the texts {', '.join(held)}, and "
                    f"this stage also trains on {lacking[0]!r}: make them again with "
                    f"texts=[{','.join(texts)}]"
                )
            if file.schema.metadata != first.schema.metadata:
                differing = _preparation(first).differences(_preparation(file)) or ["the encoding"]
                raise InputError(
                    f"{first.store.uri} and {file.store.uri} hold features that were made "
                    f"differently: {differing[0]}"
                )


def holds_features(uris: Sequence[str]) -> bool:
    """Whether the data folders of a stage hold features (or images and texts, as is usual).

    Raises:
        InputError: some do and some do not.
        StorageError: a folder cannot be read.
    """
    kinds = [records.kind_of(storage.open_dataset([uri]).schema) for uri in uris]
    features = [kind in records.FEATURES_OF.values() for kind in kinds]
    if any(features) and not all(features):
        yes, no = uris[features.index(True)], uris[features.index(False)]
        raise InputError(f"{yes} holds features and {no} does not: a stage takes one kind of data")
    return all(features)


def _entries(uri: str) -> list[tuple[Store, str]]:
    """The files of kept records that the manifest at ``uri`` names, all of them whole."""
    store = storage.open_store(uri)
    manifest = json.loads(store.read("manifest.json"))
    files = [file for file in manifest["files"] if file["path"].startswith("data/")]
    there = dict(store.list("data"))
    for file in files:
        size = there.get(file["path"])
        if size != file["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes"
            raise InputError(
                f"{store.address(file['path'])} {state}, and its manifest says "
                f"{file['bytes']} bytes: the copy is not complete"
            )
    return [(store, file["path"]) for file in files]


def _open(store: Store, name: str) -> _File:
    with store.open_parquet(name) as parquet:
        return _File(store, name, parquet.metadata)


def _preparation(file: _File) -> Preparation:
    stored = json.loads(file.schema.metadata[records.PREPARATION_KEY])
    return validate_config(Preparation, stored, where=file.address)
