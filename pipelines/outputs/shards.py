"""The output of one job as the input of the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from rich.console import Console
from rich.progress import track

from dim import records
from dim.errors import InputError
from infra.storage import Store, open_store
from pipelines.cluster import keep_freed_memory
from pipelines.outputs import manifest as manifests
from pipelines.outputs.commit import GROUP_BYTES, GROUP_PLACES
from pipelines.outputs.manifest import FileEntry, Manifest

_TASKS_PER_CORE = 4
_PARTS_PER_TASK = 4
_SHARES_AT_END = 4
_MOST_TASKS = 10_000  # each costs the driver a few ms


Share = tuple[int, int]
"""Which one of how many about equal shares of a part's records."""


@dataclass(frozen=True)
class Part:
    """One of about equal parts of a file's row groups: what one task reads.

    Attributes:
        name: of the file.
        part: which part it is.
        parts: how many there are; one may be empty.
    """

    name: str
    part: int
    parts: int

    def batches(self, store: Store, rows: int, share: Share = (0, 1)) -> Iterator[pa.Table]:
        """The records of a share of it, at most ``rows`` at a time; if there are none, no rows."""
        with self._open(store) as (file, groups):
            count = sum(file.metadata.row_group(group).num_rows for group in groups)
            number, shares = share
            first, end = count * number // shares, count * (number + 1) // shares
            if first == end:
                yield file.schema_arrow.empty_table()
                return
            for batch in file.iter_batches(rows, row_groups=groups):
                low, high = max(first, 0), min(end, batch.num_rows)
                if low < high:
                    yield pa.Table.from_batches([batch.slice(low, high - low)])
                first, end = first - batch.num_rows, end - batch.num_rows

    def read(self, store: Store, columns: Sequence[str]) -> pa.Table:
        """Those of the named columns that it has, of all its records."""
        with self._open(store) as (file, groups):
            return file.read_row_groups(groups, columns=list(columns))

    @contextmanager
    def _open(self, store: Store) -> Iterator[tuple[pq.ParquetFile, list[int]]]:
        with store.open_parquet(self.name, pre_buffer=True) as file:
            first, end = (
                file.num_row_groups * place // self.parts for place in (self.part, self.part + 1)
            )
            yield file, list(range(first, end))


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

    def read(self, rows_per_block: int = 64) -> ray.data.Dataset:
        """The kept records as a Ray data set; images stay encoded.

        ``rows_per_block`` is what one worker gets at a time, so that a few hundred records keep
        more than one worker busy.
        """
        records_read = self.scan(_as_it_is, rows_per_block)
        return records_read.repartition(target_num_rows_per_block=rows_per_block)

    def scan(self, stage: Callable[[pa.Table], pa.Table], rows: int = 64) -> ray.data.Dataset:
        """What ``stage`` makes of the kept records, in order, ``rows`` of them at a time.

        The stage runs where the records are read, a part of a file at a time, so that no image
        goes through Ray's object store: the way for stages that need no process of their own.
        """
        parts = [asdict(part) for part in self.parts]
        tasks = ray.data.from_items(parts, override_num_blocks=_tasks(len(parts)))
        scan = _Scan(self.store, stage, rows)
        return tasks.map_batches(scan, batch_format="pyarrow", batch_size=1)

    def gather(self, stage: Callable[[pa.Table], pa.Table], rows: int = 64) -> dict[Part, pa.Table]:
        """The same here, by part: for stages that leave a few hundred bytes of a record.

        Raises:
            RayTaskError: the stage failed; its error is the cause.
        """
        # Tasks of Ray's own wait in its queue. Ray Data starts one when it has seen another end,
        # and for the first second only one; that costs the filters a twentieth of their time.
        run = ray.remote(_Scan.table).options(scheduling_strategy="SPREAD")
        scan = ray.put(_Scan(self.store, stage, rows))
        shares = list(_shares(self.parts))
        tasks = [run.remote(scan, part, share) for part, share in shares]
        shown = Console(stderr=True)
        waiting = track(tasks, "reading", console=shown, disable=not shown.is_terminal)
        found: dict[Part, list[pa.Table]] = {}
        try:
            for (part, _), task in zip(shares, waiting, strict=True):
                found.setdefault(part, []).append(ray.get(task))
        except BaseException:
            for task in tasks:
                ray.cancel(task)
            raise
        return {part: pa.concat_tables(tables) for part, tables in found.items()}

    @property
    def parts(self) -> list[Part]:
        """All kept records, in order, in parts of about a row group."""
        return [
            Part(file.path, part, parts)
            for file in self.files
            for parts in [_groups(file)]
            for part in range(parts)
        ]

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


def _as_it_is(batch: pa.Table) -> pa.Table:
    return batch


@dataclass(frozen=True)
class _Scan:
    """A stage with the reading of its records before it."""

    store: Store
    stage: Callable[[pa.Table], pa.Table]
    rows: int

    def __call__(self, parts: pa.Table) -> Iterator[pa.Table]:
        """Parts of files in, what the stage makes of their records out."""
        for part in parts.to_pylist():
            yield from self._tables(Part(**part))

    def table(self, part: Part, share: Share) -> pa.Table:
        """The same for a share of one part."""
        return pa.concat_tables(self._tables(part, share))

    def _tables(self, part: Part, share: Share = (0, 1)) -> Iterator[pa.Table]:
        keep_freed_memory()
        return (self.stage(batch) for batch in part.batches(self.store, self.rows, share))


def _shares(parts: list[Part]) -> Iterator[tuple[Part, Share]]:
    """Whole parts, but for the last one of each core: those are worked on in small shares.

    So the cores end together. What it costs is that the row groups of these parts are read once
    for every share.
    """
    whole = len(parts) - _cores()
    for place, part in enumerate(parts):
        shares = 1 if place < whole else _SHARES_AT_END
        for number in range(shares):
            yield part, (number, shares)


def _cores() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def _tasks(parts: int) -> int:
    """How many tasks read so many parts: a few for every core, or one for every few parts.

    Ray Data starts a task a tenth of a second after it saw another end, so longer ones are better.
    """
    return min(
        parts, max(_TASKS_PER_CORE * _cores(), math.ceil(parts / _PARTS_PER_TASK)), _MOST_TASKS
    )


def _groups(file: FileEntry) -> int:
    """About how many row groups a file of a job has; its footer is read where it is needed."""
    return max(1, math.ceil(file.bytes / GROUP_BYTES), math.ceil(file.rows / GROUP_PLACES))
