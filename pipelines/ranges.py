"""A finished output as the next job's input: cut into ranges, and read by tasks where it lies.

A range is what a job does, writes and, if it was killed, has done: see
:mod:`pipelines.outputs.receipts`. It is one piece of a file or several that follow one another, and
depends on the input alone. No picture goes through Ray's object store on the way to a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from rich.console import Console
from rich.progress import track

from infra.memory import keep_freed_memory
from infra.storage import Store
from pipelines.attempts import Attempts, TimeLimits, limited, stop_after
from pipelines.calls.answers import name_of
from pipelines.outcome import IMAGES
from pipelines.outputs.files import GROUP_BYTES, GROUP_ROWS
from pipelines.outputs.manifest import FileEntry
from pipelines.outputs.shards import Shards

_TASKS_PER_CORE = 4
_PIECES_PER_TASK = 4
_CUT_AT_END = 4
_MOST_TASKS = 10_000  # each costs the driver a few ms

_LEAST_ROWS, _MOST_ROWS = 256, 4096  # of a range
_MOST_RANGES = 2_000  # unless they would have more rows

TIMEOUT_S = 1800.0
"""Seconds that a range may take unless a job says otherwise."""

Stage = Callable[[pa.Table], pa.Table]
Keep = Callable[["Piece", Callable[[], pa.Table]], pa.Table]


@runtime_checkable
class FallibleStage(Protocol):
    """A stage that can say of a record that it failed, as one that decodes pictures must.

    What another one cannot work on ends the job.
    """

    def __call__(self, batch: pa.Table, /) -> pa.Table:
        """What becomes of a batch."""
        ...

    def lost(self, record: pa.Table, why: str) -> pa.Table:
        """What becomes of one record, given without pictures, that the stage does not survive."""
        ...


@dataclass(frozen=True)
class Piece:
    """Records of a file that lie together: one of about equal runs of its row groups.

    Attributes:
        file: its name in the output.
        number: which run it is.
        of: how many there are; one may be empty.
        cut: which one of about equal cuts of the run's records, where it was cut further.
        cuts: how many there are.
    """

    file: str
    number: int
    of: int
    cut: int = 0
    cuts: int = 1

    def split(self, cuts: int) -> list[Piece]:
        """The same records as so many pieces; each reads the row groups of all of them."""
        return [
            replace(self, cut=self.cut * cuts + cut, cuts=self.cuts * cuts) for cut in range(cuts)
        ]

    def batches(self, store: Store, rows: int) -> Iterator[pa.Table]:
        """Its records, at most ``rows`` at a time; if there are none, a table without rows."""
        with self._open(store) as (file, groups):
            first, end = self._cut(file, groups)
            if first == end:
                yield file.schema_arrow.empty_table()
                return
            for batch in file.iter_batches(rows, row_groups=groups):
                low, high = max(first, 0), min(end, batch.num_rows)
                if low < high:
                    yield pa.Table.from_batches([batch.slice(low, high - low)])
                first, end = first - batch.num_rows, end - batch.num_rows
                if end <= 0:
                    return

    def size(self, store: Store) -> int:
        """How many records it has."""
        with self._open(store) as (file, groups):
            first, end = self._cut(file, groups)
            return end - first

    def bare(self, store: Store, number: int) -> pa.Table:
        """One of its records, counted from 0, without pictures."""
        with self._open(store) as (file, groups):
            columns = [name for name in file.schema_arrow.names if name not in IMAGES]
            table = file.read_row_groups(groups, columns=columns)
            return table.slice(self._cut(file, groups)[0] + number, 1)

    def _cut(self, file: pq.ParquetFile, groups: list[int]) -> tuple[int, int]:
        """The first of its records among those of the row groups, and the end of them."""
        count = sum(file.metadata.row_group(group).num_rows for group in groups)
        return count * self.cut // self.cuts, count * (self.cut + 1) // self.cuts

    @contextmanager
    def _open(self, store: Store) -> Iterator[tuple[pq.ParquetFile, list[int]]]:
        with store.open_parquet(self.file, pre_buffer=True) as file:
            first, end = (
                file.num_row_groups * number // self.of for number in (self.number, self.number + 1)
            )
            yield file, list(range(first, end))


def rows_per_range(rows: int, most: int) -> int:
    """How many records a range has of an input of so many: ``most`` at most."""
    return min(most, max(_LEAST_ROWS, min(math.ceil(rows / _MOST_RANGES), _MOST_ROWS)))


def pieces_of(shards: Shards, rows: int = GROUP_ROWS) -> list[Piece]:
    """All kept records, in order, in pieces of about a row group, or of ``rows`` if that is less.

    It follows from what the manifest says of the files alone.
    """
    return [
        piece
        for file in shards.files
        for of in [_groups(file)]
        for number in range(of)
        for piece in Piece(file.path, number, of).split(max(1, math.ceil(file.rows / of / rows)))
    ]


def ranges_of(shards: Shards, rows: int) -> list[list[Piece]]:
    """The same in ranges of about ``rows`` at most."""
    sizes = {file.path: file.rows for file in shards.files}
    ranges: list[list[Piece]] = []
    size = 0.0
    for piece in pieces_of(shards, rows):
        more = sizes[piece.file] / (piece.of * piece.cuts)
        if not ranges or size + more > rows:
            ranges.append([])
            size = 0.0
        ranges[-1].append(piece)
        size += more
    return ranges


def names_of(ranges: Sequence[Sequence[Piece]]) -> list[str]:
    """What ranges are called among the answers about them."""
    return [name_of([asdict(piece) for piece in each]) for each in ranges]


def tasks_for(pieces: int) -> int:
    """How many tasks read so many pieces or ranges: a few for every core, or one for every few.

    Ray Data starts a task a tenth of a second after it saw another end, so longer ones are better.
    """
    return min(
        pieces, max(_TASKS_PER_CORE * _cores(), math.ceil(pieces / _PIECES_PER_TASK)), _MOST_TASKS
    )


def scan(shards: Shards, stage: Stage, rows: int = 64) -> ray.data.Dataset:
    """What ``stage`` makes of the kept records, as a Ray data set in no particular order.

    Args:
        shards: the records.
        stage: from a batch of at most ``rows`` records to what becomes of them.
    """
    pieces = [asdict(each) for each in pieces_of(shards)]
    tasks = ray.data.from_items(pieces, override_num_blocks=tasks_for(len(pieces)))
    work = _Work(_Staged(shards.store, stage, rows), TimeLimits.of(TIMEOUT_S))
    return tasks.map_batches(work, batch_format="pyarrow", batch_size=1, num_cpus=1)


@dataclass(frozen=True)
class Gathered:
    """What a stage left of a piece, or of a cut of it.

    Attributes:
        number: of the cut among all of them, which are in the order of the pieces.
        piece: the whole one.
        cut: what was worked on.
        table: what is left.
    """

    number: int
    piece: Piece
    cut: Piece
    table: pa.Table


def gather(
    shards: Shards,
    pieces: Sequence[Piece],
    stage: Stage,
    keep: Keep,
    rows: int = 64,
    *,
    num_gpus: float = 0,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Gathered]:
    """The same here, as it is done: for stages that leave a few hundred bytes of a record.

    Args:
        shards: the records.
        pieces: which of them.
        stage: as of :func:`scan`.
        keep: given a piece and how it is made, its result: to look whether it is there already.
        rows: a batch has at most.
        num_gpus: of a task.
        timeout_s: a piece may take.

    Raises:
        RayTaskError: the stage failed; its error is the cause.
    """
    # Tasks of Ray's own wait in its queue. Ray Data starts one when it has seen another end,
    # and for the first second only one; that costs the filters a twentieth of their time.
    run = ray.remote(_Work.kept).options(
        scheduling_strategy="SPREAD", num_cpus=1, num_gpus=num_gpus, max_retries=-1
    )
    work = ray.put(_Work(_Staged(shards.store, stage, rows), TimeLimits.of(timeout_s)))
    cut = list(_cut_at_end(pieces))
    shown = Console(stderr=True)
    ended = _ended(partial(run.remote, work), [(part, keep) for _, part in cut])
    for number, found in track(
        ended, "reading", total=len(cut), console=shown, disable=not shown.is_terminal
    ):
        yield Gathered(number, *cut[number], found)


def _ended(
    start: Callable[..., ray.ObjectRef], tasks: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, Any]]:
    """What tasks return, with their numbers, as they end; a few for every core are started."""
    # Each that waits costs the driver some kilobytes, and runs in vain when another one fails.
    waiting = enumerate(tasks)
    running: dict[ray.ObjectRef, int] = {}
    while True:
        for number, task in islice(waiting, max(0, _TASKS_PER_CORE * _cores() - len(running))):
            running[start(*task)] = number
        if not running:
            return
        ray.wait(list(running))
        ended, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
        while ended:
            done = ended.pop()
            yield running.pop(done), ray.get(done)


def read(shards: Shards, rows: int = 64) -> ray.data.Dataset:
    """The kept records as a Ray data set, for stages that hold something; images stay encoded.

    ``rows`` is what one worker gets at a time, so that a few hundred records keep more than one
    worker busy.
    """
    return scan(shards, _as_they_are, rows).repartition(target_num_rows_per_block=rows)


def _as_they_are(batch: pa.Table) -> pa.Table:
    return batch


@dataclass(frozen=True)
class _Staged:
    """A stage with the reading of its records before it: work that can be tried with care."""

    store: Store
    stage: Stage
    rows: int

    def count(self, each: Piece) -> int:
        return each.size(self.store)

    def parts(self, each: Piece) -> Iterator[pa.Table]:
        return each.batches(self.store, self.rows)

    def table(self, part: pa.Table) -> pa.Table:
        return self.stage(part)

    def lost(self, each: Piece, number: int, why: str) -> pa.Table:
        assert isinstance(self.stage, FallibleStage)
        return self.stage.lost(each.bare(self.store, number), why)


@dataclass(frozen=True)
class _Work:
    """What a task does with the pieces it is given."""

    staged: _Staged
    limits: TimeLimits

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        """Pieces in, what the stage makes of their records out."""
        for each in pieces.to_pylist():
            yield from self._tables(Piece(**each))

    def kept(self, each: Piece, keep: Keep) -> pa.Table:
        """The same for one piece, unless ``keep`` has it."""
        return keep(each, lambda: pa.concat_tables(self._tables(each)))

    def _tables(self, each: Piece) -> Iterator[pa.Table]:
        keep_freed_memory()
        if isinstance(self.staged.stage, FallibleStage):
            return Attempts(self.staged, self.limits).tables(each)
        stop_after()
        return limited(map(self.staged.table, self.staged.parts(each)), self.limits.range_s)


def _cut_at_end(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Piece]]:
    """Each piece whole, but for the last one of each core: with the small ones it is cut into.

    So the cores end together. What it costs is that the row groups of these pieces are read once
    for every cut.
    """
    whole = max(0, len(pieces) - _cores())
    yield from ((each, each) for each in pieces[:whole])
    for each in pieces[whole:]:
        yield from ((each, cut) for cut in each.split(_CUT_AT_END))


def _cores() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def _groups(file: FileEntry) -> int:
    """About how many row groups a file of a job has; its footer is read where it is needed."""
    return max(1, math.ceil(file.bytes / GROUP_BYTES), math.ceil(file.rows / GROUP_ROWS))
