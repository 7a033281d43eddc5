"""A finished output, as the next job finds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from dim import records
from dim.errors import InputError
from infra.storage import Store
from pipelines.outputs import manifest as manifests
from pipelines.outputs.manifest import FileEntry, Manifest


@dataclass(frozen=True)
class Shards:
    """A finished output folder."""

    store: Store
    manifest: Manifest

    @classmethod
    def open(cls, uri: str, *kinds: pa.Schema) -> Shards:
        """Open the output at ``uri``, which must hold records of one of the schemas ``kinds``.

        Raises:
            InputError: it does not exist, is not finished, or holds other records or a newer
                schema than this program knows.
            StorageError: it cannot be read.
        """
        shards = cls(*manifests.open_finished(uri, "input"))
        shards._check_kind(kinds)
        return shards

    @property
    def rows(self) -> int:
        """Kept records."""
        return self.manifest.counts.kept

    @property
    def identity(self) -> dict[str, Any]:
        """The same exactly when the records are: a hash over the files' hashes, in order."""
        hashes = "".join(file.sha256 for file in self.files)
        return {"uri": self.store.uri, "files": records.sha256_hex(hashes.encode())}

    @property
    def names(self) -> list[str]:
        """The files of kept records, in order."""
        return [file.path for file in self.files]

    @property
    def files(self) -> list[FileEntry]:
        """What the manifest says of the files of kept records, in order."""
        return [file for file in self.manifest.files if file.path.startswith("data/")]

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the kept records, with their kind and schema version as metadata."""
        with self.store.open_parquet(self.names[0]) as file:
            return file.schema_arrow

    def batches(self, rows: int = 64, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The kept records in order, a few in memory at a time; all columns unless named.

        Raises:
            StorageError: they cannot be read.
        """
        for name in self.names:
            with self.store.open_parquet(name) as file:
                for batch in file.iter_batches(batch_size=rows, columns=columns):
                    yield pa.Table.from_batches([batch])

    def _check_kind(self, kinds: tuple[pa.Schema, ...]) -> None:
        schema = self.schema
        records.check_version(schema, self.store.uri)
        found, wanted = records.kind_of(schema), [records.kind_of(kind) for kind in kinds]
        if found not in wanted:
            raise InputError(
                f"{self.store.uri} holds {found or 'unknown'} records, and "
                f"{' or '.join(map(str, wanted))} records are needed"
            )
