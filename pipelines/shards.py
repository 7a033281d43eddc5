"""The output of one job as the input of the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import ray.data

from dim import records
from dim.errors import InputError
from infra.storage import Store, open_store
from pipelines import manifest as manifests
from pipelines.manifest import Manifest


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
        store = open_store(uri)
        manifest = manifests.read(store)
        if manifest is None:
            state = "is not finished" if store.exists() else "does not exist"
            raise InputError(f"the input {uri} {state} (no {manifests.NAME})")
        shards = cls(store, manifest)
        shards._check_kind(kinds)
        return shards

    @property
    def rows(self) -> int:
        """Kept records."""
        return self.manifest.counts.kept

    @property
    def identity(self) -> dict[str, Any]:
        """The same exactly when the records are: a hash over the files' hashes, in order."""
        hashes = "".join(file.sha256 for file in self.manifest.files if _is_data(file.path))
        return {"uri": self.store.uri, "files": records.sha256_hex(hashes.encode())}

    @property
    def names(self) -> list[str]:
        """The files of kept records, in order."""
        return [file.path for file in self.manifest.files if _is_data(file.path)]

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the kept records, with their kind and schema version as metadata."""
        with self.store.open_parquet(self.names[0]) as file:
            return file.schema_arrow

    def read(self, rows_per_block: int = 64) -> ray.data.Dataset:
        """The kept records as a Ray data set; images stay encoded.

        Ray reads small files together into one block; ``rows_per_block`` is what one worker gets
        at a time, so that a few hundred records keep more than one worker busy.
        """
        paths = [self.store.path(name) for name in self.names]
        records_read = ray.data.read_parquet(paths, filesystem=self.store.filesystem)
        return records_read.repartition(target_num_rows_per_block=rows_per_block)

    def pool(
        self, workers: int, rows_per_block: int, batches_at_once: int = 1
    ) -> ray.data.ActorPoolStrategy:
        """``workers`` processes for a stage that holds something; fewer for a few records.

        ``batches_at_once``: batches that each works on, in threads; for a stage that mostly waits,
        which would otherwise stand idle while the last of a batch comes in.
        """
        return ray.data.ActorPoolStrategy(
            size=max(1, min(workers, self.rows // rows_per_block)),
            max_concurrent_calls_per_actor=batches_at_once,
            enable_true_multi_threading=batches_at_once > 1,
        )

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


def _is_data(path: str) -> bool:
    return path.startswith("data/")
