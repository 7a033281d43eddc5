"""Rows of Parquet files by number, from files that break and stores that go away."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tenacity.nap

from dim.errors import (
    InputError,
    SampleError,
    StorageError,
    StorageUnavailable,
)
from dim.features import row_groups
from dim.features.row_groups import HeldGroups, RowGroups, ShardFile, whole
from infra.storage import Store, open_store

GROUP = 4  # rows of a row group
ROWS = 12  # of a file


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited between tries."""
    waited: list[float] = []
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., RowGroups]:
    """``shards(files=2, …)``: files of 12 rows in row groups of 4, behind a store."""

    def make(files: int = 2, check: Any = lambda file, schema: None, rows: int = ROWS) -> RowGroups:
        store = open_store(str(tmp_path))
        found = []
        for number in range(files):
            name = f"part-{number}.parquet"
            ids = [f"{number}-{row}" for row in range(ROWS)]
            images = [f"{one} ".encode() * 1000 for one in ids]
            table = pa.table({"id": ids, "image": images})
            pq.write_table(table, tmp_path / name, row_group_size=GROUP, compression="zstd")
            opened = partial(store.open_parquet, name)
            found.append(ShardFile(store.uri, store.address(name), rows, opened))
        return RowGroups(found, check)

    return make


class Faults:
    """Reads of files that fail: ``after`` good ones, ``times`` bad ones with ``error``."""

    def __init__(self) -> None:
        self.after = self.times = self.reads = 0
        self.error: Exception = OSError(errno.EIO, "Input/output error")

    def next(self) -> None:
        self.reads += 1
        if self.after < self.reads <= self.after + self.times:
            raise self.error


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    """Faults of every file that a store opens."""
    found = Faults()

    class Faulty:
        closed = False

        def __init__(self, path: str) -> None:
            self._file = open(path, "rb")  # noqa: SIM115

        def read(self, size: int = -1) -> bytes:
            found.next()
            return self._file.read(size)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    monkeypatch.setattr(
        Store, "_open", lambda self, name: pa.PythonFile(Faulty(self.path(name)), mode="r")
    )
    yield found


def ids(found: list[Any]) -> list[str]:
    return [row["id"] for row in whole(found)]


def test_a_store_that_fails_twice_is_asked_again_in_place(
    shards: Callable[..., RowGroups], faults: Faults, pauses: list[float]
) -> None:
    groups = shards()
    assert ids(groups.fetch(np.array([0]), ["image"])) == ["0-0"]
    good = faults.reads
    faults.after, faults.times = good, 2
    assert ids(groups.fetch(np.array([5]), ["image"])) == ["0-5"]  # another row group
    assert faults.reads > good + 2
    assert len(pauses) == 2 and 0 <= pauses[0] <= 0.5 and 0 <= pauses[1] <= 1


def test_a_footer_is_asked_for_again_too(
    shards: Callable[..., RowGroups], faults: Faults, pauses: list[float]
) -> None:
    groups = shards()
    faults.times = 2
    assert ids(groups.fetch(np.array([3]), [])) == ["0-3"]
    assert len(pauses) == 2


def test_a_store_that_stays_away_is_one_clear_error_and_no_bad_sample(
    shards: Callable[..., RowGroups], faults: Faults, pauses: list[float]
) -> None:
    groups = shards()
    groups.check_files()
    faults.after, faults.times = faults.reads, 1_000
    with pytest.raises(StorageUnavailable, match=r"^cannot read .*part-1.parquet: Input/output er"):
        groups.fetch(np.array([20]), ["image"])
    assert len(pauses) == 5 and sum(pauses) <= 30
    faults.times = 0
    assert ids(groups.fetch(np.array([20]), ["image"])) == ["1-8"]


def test_a_refusal_is_not_asked_again(
    shards: Callable[..., RowGroups], faults: Faults, pauses: list[float]
) -> None:
    groups = shards()
    faults.times, faults.error = 1_000, PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(StorageError, match="Permission denied") as caught:
        groups.fetch(np.array([0]), [])
    assert type(caught.value) is StorageError and pauses == []


def test_pauses_are_random(
    shards: Callable[..., RowGroups], faults: Faults, pauses: list[float]
) -> None:
    for _ in range(2):
        groups = shards()
        faults.after, faults.times = faults.reads, 2
        groups.fetch(np.array([0]), [])
    assert pauses[:2] != pauses[2:]


def test_a_damaged_row_group_spoils_its_own_rows_only(
    shards: Callable[..., RowGroups], tmp_path: Path, pauses: list[float]
) -> None:
    groups = shards()
    path = tmp_path / "part-1.parquet"
    column = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    found = groups.fetch(np.arange(24), ["image"])
    bad = [row for row in found if isinstance(row, SampleError)]
    assert [isinstance(row, SampleError) for row in found] == [16 <= row < 20 for row in range(24)]
    assert {error.reason for error in bad} == {"unreadable"}
    assert str(bad[0]).startswith(f"row 4 of {tmp_path}/part-1.parquet cannot be read: cannot read")
    assert ids(groups.fetch(np.arange(24), [])) == [f"{n // 12}-{n % 12}" for n in range(24)]


@pytest.mark.parametrize("left", [None, 0, 300])
def test_a_file_that_is_gone_or_cut_short_spoils_its_own_rows_only(
    shards: Callable[..., RowGroups], tmp_path: Path, pauses: list[float], left: int | None
) -> None:
    groups = shards()
    path = tmp_path / "part-0.parquet"
    data = path.read_bytes()
    path.unlink() if left is None else path.write_bytes(data[:left])
    found = groups.fetch(np.array([12, 3, 23]), ["image"])
    assert ids([found[0], found[2]]) == ["1-0", "1-11"]
    assert isinstance(found[1], SampleError) and found[1].reason == "unreadable"
    assert "row 3 of" in str(found[1])


def test_a_file_that_is_not_what_its_manifest_says_is_an_error(
    shards: Callable[..., RowGroups],
) -> None:
    with pytest.raises(InputError, match=r"part-0.parquet has 12 rows, and its manifest says 13"):
        shards(rows=13).fetch(np.array([0]), [])

    def refuse(file: ShardFile, schema: pa.Schema) -> None:
        if file.address.endswith("part-1.parquet"):
            raise InputError(f"{file.address} will not do")

    groups = shards(check=refuse)
    assert ids(groups.fetch(np.array([0]), [])) == ["0-0"]
    for action in (lambda: groups.fetch(np.array([12]), []), groups.check_files):
        with pytest.raises(InputError, match=r"part-1.parquet will not do"):
            action()


def test_footers_are_kept_of_the_last_files_only(
    shards: Callable[..., RowGroups], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_groups, "_FOOTERS", 2)
    groups = shards(files=5)
    assert groups.rows == 60
    groups.check_files()
    assert len(groups._footers) == 2
    assert ids(groups.fetch(np.array([0, 59, 30]), [])) == ["0-0", "4-11", "2-6"]
    assert len(groups._footers) == 2


def test_opening_reads_nothing(shards: Callable[..., RowGroups], faults: Faults) -> None:
    groups = shards(files=4)
    assert groups.rows == 48 and faults.reads == 0
    groups.fetch(np.array([13]), [])
    assert list(groups._footers) == [1]


def test_row_groups_of_a_walk_are_read_once(
    shards: Callable[..., RowGroups], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = pq.ParquetFile.read_row_groups

    def counted(self: Any, groups: list[int], **options: Any) -> Any:
        read.extend(groups)
        return plain(self, groups, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    for hold, reads in ((False, 24), (True, 6)):
        groups = shards()
        if hold:
            groups.hold(walks=1, span=4, runs=1)
        for row in range(24):
            groups.fetch(np.array([row]), ["image"])
        assert len(read) == reads
        assert (groups.held.nbytes > 0) == hold
        assert groups.held.rows == (12 if hold else 0)
        read.clear()


def test_held_groups_are_no_more_than_allowed_and_failures_are_not_held() -> None:
    held = HeldGroups()
    held.rows = 8
    table = pa.table({"a": [1] * 4})
    reads: list[str] = []

    def reader(name: str) -> Callable[[], pa.Table]:
        return lambda: (reads.append(name), table)[1]

    for name in "abacbd":  # when c comes, a was used last
        held.get((name,), 4, reader(name))
    assert reads == ["a", "b", "c", "b", "d"]
    assert held.nbytes == 2 * table.nbytes
    held.get(("large",), 9, reader("large"))
    assert held.nbytes == 2 * table.nbytes

    def fail() -> pa.Table:
        raise StorageError("away")

    with pytest.raises(StorageError, match="away"):
        held.get(("x",), 4, fail)
    assert held.get(("x",), 4, reader("x")) is table


def test_who_comes_second_waits_for_the_first() -> None:
    held, begun, going = HeldGroups(), threading.Event(), threading.Event()
    held.rows = 8
    table, reads = pa.table({"a": [1] * 4}), []

    def slow() -> pa.Table:
        begun.set()
        assert going.wait(5)
        reads.append(1)
        return table

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(held.get, ("a",), 4, slow)
        assert begun.wait(5)
        second = pool.submit(held.get, ("a",), 4, slow)
        going.set()
        assert first.result(5) is second.result(5) is table
    assert reads == [1]
