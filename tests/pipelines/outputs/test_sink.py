"""Sink and commit: what is committed depends on the records and not on how they arrived."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.datasource import WriteResult

from dim import records
from dim.errors import DimError
from infra.storage import Store, open_store
from pipelines.outcome import Rejection, fail, reject, to_table
from pipelines.outputs import commit as committing
from pipelines.outputs import sink
from pipelines.outputs.commit import Limits, commit, fit, row_bytes
from pipelines.outputs.manifest import FileEntry
from pipelines.outputs.sink import OutcomeSink


def rows(count: int) -> list[dict[str, Any]]:
    """Every third record rejected, every seventh failed."""
    made = []
    for index in range(count):
        row: dict[str, Any] = {"id": f"r{index}", "index": index, "source": "t", "outcome": "kept"}
        row["image"] = bytes([index % 256]) * 50
        if index % 3 == 2:
            reject(row, Rejection("image.too_small", "tiny", 1, 2))
        elif index % 7 == 6:
            fail(row, "caption", "no answer")
        made.append(row)
    return made


def written(store: Store, parts: list[list[dict[str, Any]]]) -> OutcomeSink:
    """A sink after one write task per part, as the driver sees it."""
    target = OutcomeSink(store, records.T2I)
    results = [
        target.write([to_table(part, records.T2I)] if part else [pa.table({})], None)
        for part in parts
    ]
    target.on_write_complete(WriteResult(0, 0, results))
    return target


def committed(
    folder: Path, parts: list[list[dict[str, Any]]], rows_per_file: int = 10, **limits: int
) -> list[FileEntry]:
    store = open_store(str(folder))
    pieces = written(store, parts).pieces
    return commit(store, records.T2I, pieces, Limits(rows_per_file, **limits))


@pytest.mark.parametrize("size", [1, 4, 10, 25, 100])
def test_the_same_files_however_ray_cuts_its_blocks(tmp_path: Path, size: int) -> None:
    made = rows(35)
    whole = committed(tmp_path / "whole", [made])
    parts = [made[first : first + size] for first in range(0, 35, size)]
    assert committed(tmp_path / "parts", [*parts[::-1], []]) == whole
    for file in whole:
        one, other = (tmp_path / name / file.path for name in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()


def test_every_record_is_in_one_place_and_in_order(tmp_path: Path) -> None:
    made = rows(35)
    files = committed(tmp_path, [made[20:], made[:20]])
    assert [file.path for file in files] == [
        *(f"data/part-{n:05d}.parquet" for n in range(4)),
        "failed/part-00000.parquet",
        "rejected/part-00000.parquet",
    ]
    for folder, outcome, schema in (
        ("data", "kept", records.T2I),
        ("rejected", "rejected", records.REJECT),
        ("failed", "failed", records.FAILED),
    ):
        tables = [pq.read_table(path) for path in sorted((tmp_path / folder).glob("*.parquet"))]
        assert all(records.is_same(table.schema, schema) for table in tables)
        found = [index for table in tables for index in table["index"].to_pylist()]
        assert found == [row["index"] for row in made if row["outcome"] == outcome]
    first = pq.read_table(tmp_path / "data" / "part-00001.parquet")
    assert all(10 <= index < 20 for index in first["index"].to_pylist())
    failed = pq.read_table(tmp_path / "failed" / "part-00000.parquet").to_pylist()
    assert failed[0]["error"] == "no answer" and failed[0]["instruction"] is None


def test_a_task_that_ran_twice_counts_once(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    target = written(store, [rows(10)])
    target.write([to_table(rows(10), records.T2I)], None)  # its result never reached the driver
    assert sum(file.rows for file in commit(store, records.T2I, target.pieces, Limits(10))) == 10


def test_no_records_still_leave_columns(tmp_path: Path) -> None:
    files = committed(tmp_path, [])
    assert [file.rows for file in files] == [0, 0, 0]
    assert pq.read_schema(tmp_path / "data" / "part-00000.parquet").equals(records.T2I)


def test_reasons_are_counted(tmp_path: Path) -> None:
    pieces = written(open_store(str(tmp_path)), [rows(20), rows(5)]).pieces
    assert sum(sum(piece.reasons.values()) for piece in pieces) == 6 + 1


@pytest.mark.usefixtures("ray_cluster")
def test_large_outputs_are_put_together_by_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = rows(35)
    here = committed(tmp_path / "here", [made[:17], made[17:]])
    monkeypatch.setattr(committing, "_COMMIT_IN_DRIVER", 0)
    assert committed(tmp_path / "there", [made[:17], made[17:]]) == here


def sized(count: int, size: int) -> list[dict[str, Any]]:
    """Records that are all kept, with images of ``size`` bytes that do not compress."""
    rng = np.random.default_rng(0)
    return [
        {"id": f"r{index}", "index": index, "source": "t", "image": rng.bytes(size)}
        for index in range(count)
    ]


def test_files_grow_to_the_target_size_and_not_beyond(tmp_path: Path) -> None:
    made = sized(60, 10_000)
    target = 256_000  # bytes: 25 records
    folders = []
    for name, parts in (
        ("one", [made]),
        ("many", [made[n : n + 7] for n in range(0, 60, 7)][::-1]),
    ):
        folders.append(committed(tmp_path / name, parts, 1000, target_bytes=target))
    assert folders[0] == folders[1]
    data = [file for file in folders[0] if file.path.startswith("data/")]
    assert [file.rows for file in data] == [25, 25, 10]
    assert all(file.bytes < target * 1.02 for file in data)


def test_a_record_larger_than_the_target_has_a_file_of_its_own(tmp_path: Path) -> None:
    made = sized(3, 5_000)
    files = committed(tmp_path, [made], target_bytes=100)
    assert [file.rows for file in files if file.path.startswith("data/")] == [1, 1, 1]


def test_row_groups_are_small_and_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(committing, "GROUP_BYTES", 45_000)
    made = sized(30, 10_000)
    for name, parts in (("one", [made]), ("many", [made[::2], made[1::2]])):
        committed(tmp_path / name, parts, 1000)
    one, many = (tmp_path / name / "data" / "part-00000.parquet" for name in ("one", "many"))
    assert one.read_bytes() == many.read_bytes()
    file = pq.ParquetFile(one)
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [4] * 7 + [
        2
    ]
    assert file.read_row_group(3)["index"].to_pylist() == [12, 13, 14, 15]
    assert file.read()["image"].to_pylist() == [row["image"] for row in made]


def test_a_write_task_holds_no_more_than_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "_STAGE_BYTES", 25_000)
    target = OutcomeSink(open_store(str(tmp_path)), records.T2I)
    blocks = [to_table([row], records.T2I) for row in sized(10, 10_000)]
    pieces = target.write(iter(blocks), None)
    assert [len(piece.places) for piece in pieces] == [3, 3, 3, 1]


def test_a_file_is_put_together_in_little_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "_STAGE_BYTES", 2 << 20)
    monkeypatch.setattr(committing, "GROUP_BYTES", 2 << 20)
    store = open_store(str(tmp_path))
    target = OutcomeSink(store, records.T2I)
    parts = (to_table([row], records.T2I) for row in sized(60, 1 << 20))
    target.on_write_complete(WriteResult(0, 0, [target.write(parts, None)]))
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        (data, *_) = commit(store, records.T2I, target.pieces, Limits(10_000))
        peak = pool.max_memory() + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert data.rows == 60 and data.bytes > 60 << 20
    assert peak < 20 << 20


def test_a_record_that_comes_twice_stops_the_job(tmp_path: Path) -> None:
    made = rows(10)
    with pytest.raises(DimError, match="two records have the place 3 of the input"):
        committed(tmp_path, [made, made[3:4]])


def test_a_piece_that_lost_records_stops_the_job(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    target = written(store, [sized(10, 10)])
    (short, _), *_ = [item for item in store.list("staging")]
    with store.open_output(short) as file:
        table = fit(to_table(sized(9, 10), records.T2I), records.T2I)
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DimError, match="has 9 of the 10 records it should have"):
        commit(store, records.T2I, target.pieces, Limits(10))


def test_sizes_follow_from_the_values() -> None:
    table = pa.table(
        {
            "text": pa.array(["ab", None, "ü"]),
            "bytes": pa.array([b"1", b"22", None], pa.large_binary()),
            "number": pa.array([1, 2, 3], pa.int32()),
            "lists": pa.array([[1.0, 2.0], None, []], pa.list_(pa.float64())),
        }
    )
    expected = [2 + 1 + 4 + 16, 2 + 4, 2 + 4]
    assert row_bytes(table).tolist() == expected
    assert row_bytes(table.slice(1)).tolist() == expected[1:]
    assert row_bytes(pa.concat_tables([table.slice(2), table])).tolist() == [6, *expected]
