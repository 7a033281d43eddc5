"""The output of one job as the input of the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
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
    def open(cls, uri: str, kind: pa.Schema) -> Shards:
        """Open the output at ``uri``, which must hold records of the schema ``kind``.

        Raises:
            InputError: it does not exist, is not finished, or holds other records.
            StorageError: it cannot be read.
        """
        store = open_store(uri)
        manifest = manifests.read(store)
        if manifest is None:
            state = "is not finished" if store.exists() else "does not exist"
            raise InputError(f"the input {uri} {state} (no {manifests.NAME})")
        shards = cls(store, manifest)
        shards._check_kind(kind)
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

    def _check_kind(self, wanted: pa.Schema) -> None:
        with self.store.open_input(self.names[0]) as file:
            found = records.kind_of(pq.read_schema(file))
        if found != records.kind_of(wanted):
            raise InputError(
                f"{self.store.uri} holds {found or 'unknown'} records, and "
                f"{records.kind_of(wanted)} records are needed"
            )


def _is_data(path: str) -> bool:
    return path.startswith("data/")
