"""Ranges of one job's output as the next one's input, read by tasks on a real local Ray."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from dim.errors import InputError
from dim.records import RAW_IMAGE
from infra.storage import open_store
from pipelines import ingest
from pipelines.attempts import Work
from pipelines.ingest import IngestConfig
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
from pipelines.outputs.shards import Shards
from pipelines.ranges import (
    Piece,
    gather,
    pieces_of,
    ranges_of,
    rows_per_range,
    scan,
)
from tests.pipelines.finished import finish

pytestmark = pytest.mark.usefixtures("ray_cluster")


def by_whom(batch: pa.Table) -> pa.Table:
    """Which task had which records, and how many at a time."""
    task = ray.get_runtime_context().get_task_id()
    rows = batch.num_rows
    columns = [
        batch["id"],
        pa.array([task] * rows, pa.string()),
        pa.array([rows] * rows, pa.int64()),
    ]
    return pa.table(columns, names=["id", "task", "at_once"])


def broken(batch: pa.Table) -> pa.Table:
    raise InputError("no such stage")


@dataclass(frozen=True)
class Seen:
    """A reader that notes which task read what, one file a task."""

    reader: Work[dict[str, Any]]
    folder: Path

    def parts(self, each: dict[str, Any]) -> Iterator[Any]:
        task = ray.get_runtime_context().get_task_id()
        with (self.folder / task).open("a") as file:
            file.write(f"{each['first']}\n")
        return self.reader.parts(each)

    def table(self, part: Any) -> pa.Table:
        return self.reader.table(part)

    def count(self, each: dict[str, Any]) -> int:
        return self.reader.count(each)

    def lost(self, each: dict[str, Any], number: int, why: str) -> pa.Table:
        return self.reader.lost(each, number, why)


def collected(shards: Shards, rows: int) -> pa.Table:
    """In the order in which the tasks ended."""
    return pa.concat_tables(ray.get(scan(shards, by_whom, rows).to_arrow_refs()))


def make(piece: Piece, work: Callable[[], pa.Table]) -> pa.Table:
    """Nothing is there already."""
    return work()


def gathered(shards: Shards, rows: int) -> pa.Table:
    """In the order of the records."""
    pieces = pieces_of(shards)
    found = sorted(gather(shards, pieces, by_whom, make, rows), key=lambda each: each.number)
    assert list(dict.fromkeys(each.piece for each in found)) == pieces
    return pa.concat_tables([each.table for each in found])


def test_a_scan_reads_every_record_once_and_by_several_tasks(tmp_path: Path) -> None:
    ingest.run(IngestConfig(tabletop_images=600, size=32, out=str(tmp_path), rows_per_file=512))
    shards = Shards.open(str(tmp_path), RAW_IMAGE)
    assert len(shards.names) == 2
    seen = collected(shards, 50)
    wanted = [
        value for batch in shards.batches(columns=["id"]) for value in batch["id"].to_pylist()
    ]
    assert sorted(seen["id"].to_pylist()) == sorted(wanted) and len(wanted) == 600
    assert max(seen["at_once"].to_pylist()) == 50
    assert gathered(shards, 50)["id"].to_pylist() == wanted
    # 256 places of the input to a row group: two in the first file, one in the second.
    assert len(set(seen["task"].to_pylist())) == 3
    table = pq.read_table(tmp_path / shards.names[0], columns=["id"])
    assert table.num_rows == 512


def test_a_file_may_have_fewer_or_more_row_groups_than_expected(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    (tmp_path / "data").mkdir()
    for name, group in (("one", 1000), ("many", 7)):
        ids = pa.table({"id": [f"{name}-{number}" for number in range(1000)]})
        pq.write_table(ids, tmp_path / f"data/{name}.parquet", row_group_size=group)
    files = tuple(
        FileEntry(path=f"data/{name}.parquet", rows=1000, bytes=1, sha256="0" * 64)
        for name in ("one", "many")
    )
    shards = Shards(store, finish(open_store(str(tmp_path / "x")), [], RAW_IMAGE))
    shards = Shards(store, shards.manifest.model_copy(update={"files": files}))
    wanted = [f"{name}-{number}" for name in ("one", "many") for number in range(1000)]
    assert sorted(collected(shards, 64)["id"].to_pylist()) == sorted(wanted)
    assert gathered(shards, 64)["id"].to_pylist() == wanted


def test_a_scan_of_nothing_has_columns(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    finish(store, [], RAW_IMAGE)
    seen = collected(Shards.open(str(tmp_path), RAW_IMAGE), 8)
    assert seen.num_rows == 0 and seen.column_names == ["id", "task", "at_once"]
    seen = gathered(Shards.open(str(tmp_path), RAW_IMAGE), 8)
    assert seen.num_rows == 0 and seen.column_names == ["id", "task", "at_once"]


@pytest.mark.parametrize("cuts", [1, 3, 11])
def test_the_cuts_of_a_range_are_the_range(tmp_path: Path, cuts: int) -> None:
    """Also of row groups that a batch does not fill, and where there are more cuts than rows."""
    table = pa.table({"id": list(range(10))})
    pq.write_table(table, tmp_path / "file.parquet", row_group_size=4)
    store = open_store(str(tmp_path))
    for of, wanted in ((2, [0, 1, 2, 3]), (1, list(range(10)))):
        whole = Piece("file.parquet", 0, of)
        found = [list(each.batches(store, 3)) for each in whole.split(cuts)]
        assert all(found)
        tables = [table for batches in found for table in batches]
        assert all(each.num_rows <= 3 and each.schema == table.schema for each in tables)
        assert pa.concat_tables(tables)["id"].to_pylist() == wanted


def test_the_last_ranges_are_cut_into_small_ones(tmp_path: Path) -> None:
    ingest.run(IngestConfig(tabletop_images=80, size=32, rows_per_file=8, out=str(tmp_path)))
    shards = Shards.open(str(tmp_path), RAW_IMAGE)
    cores = int(ray.cluster_resources()["CPU"])
    pieces = pieces_of(shards)
    tasks = Counter(each.piece for each in gather(shards, pieces, by_whom, make))
    assert len(pieces) == 10 > cores
    assert [tasks[each] for each in pieces] == [1] * (10 - cores) + [4] * cores


def test_a_stage_that_fails_stops_what_gathers_it(tmp_path: Path) -> None:
    ingest.run(IngestConfig(tabletop_images=4, size=32, out=str(tmp_path)))
    with pytest.raises(InputError, match="no such stage"):
        shards = Shards.open(str(tmp_path), RAW_IMAGE)
        list(gather(shards, pieces_of(shards), broken, make))


@dataclass(frozen=True)
class KilledOnce:
    """A stage whose process is gone at the first record 7."""

    sign: Path

    def __call__(self, batch: pa.Table) -> pa.Table:
        if 7 in batch["index"].to_pylist() and not self.sign.exists():
            self.sign.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return batch.select(["index"])


def test_a_worker_that_is_killed_loses_nothing_that_is_gathered(tmp_path: Path) -> None:
    raw, sign = str(tmp_path / "raw"), tmp_path / "sign"
    ingest.run(IngestConfig(tabletop_images=12, size=32, rows_per_file=2, out=raw))
    shards = Shards.open(raw, RAW_IMAGE)
    found = list(gather(shards, pieces_of(shards), KilledOnce(sign), make, 1))
    assert sign.exists() and int(sign.read_text()) != os.getpid()
    seen = pa.concat_tables([each.table for each in found])["index"].to_pylist()
    assert sorted(seen) == list(range(12))


def test_every_range_is_read_by_a_task_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    config = IngestConfig(tabletop_images=12, size=32, rows_per_file=2, out=str(tmp_path / "out"))
    source = ingest.open_source(config)
    watched = dataclasses.replace(source, reader=Seen(source.reader, tasks))
    monkeypatch.setattr(ingest, "open_source", lambda config: watched)
    assert ingest.run(config).counts.kept == 12
    read_by = [task.read_text().split() for task in tasks.iterdir()]
    assert sorted(read_by) == sorted([str(first)] for first in range(0, 12, 2))


def shards_of(rows: Sequence[int]) -> Shards:
    """An input with so many records in each file, as its manifest describes it."""
    files = tuple(
        FileEntry(path=f"data/{number}.parquet", rows=count, bytes=1, sha256="0" * 64)
        for number, count in enumerate(rows)
    )
    counts = Counts(input=sum(rows), kept=sum(rows), rejected=0, failed=0, by_reason={})
    done = Manifest(job="x", config={}, input={}, counts=counts, files=files)
    return Shards(open_store("nowhere"), done)


def test_small_files_share_a_range_and_large_ones_are_cut() -> None:
    ranges = ranges_of(shards_of([3, 3, 3, 0, 10, 600]), 8)
    found = [[(piece.file[5], piece.cut, piece.cuts) for piece in each] for each in ranges]
    assert found[:3] == [
        [("0", 0, 1), ("1", 0, 1)],
        [("2", 0, 1), ("3", 0, 1), ("4", 0, 2)],
        [("4", 1, 2)],
    ]
    # Three row groups of 200, in 25 each.
    assert found[3:] == [[("5", cut, 25)] for _ in range(3) for cut in range(25)]


@pytest.mark.parametrize(
    ("rows", "most", "size"),
    [(10, 16_384, 256), (10, 6, 6), (600_000, 16_384, 300), (14_000_000, 16_384, 4096)],
)
def test_the_size_of_a_range_follows_from_the_input(rows: int, most: int, size: int) -> None:
    assert rows_per_range(rows, most) == size
