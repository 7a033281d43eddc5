"""Files and receipts: what is written depends on the records and not on how they arrived."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim import records
from dim.errors import DimError
from infra.storage import open_store
from pipelines.outcome import Rejection, fail, reject, to_table
from pipelines.outputs import files as writing
from pipelines.outputs import receipts
from pipelines.outputs.files import Limits, row_bytes
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
from pipelines.outputs.receipts import RangeOutput, Receipt, receipts_in

LARGE = Limits(10_000)


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


def output(folder: Path, limits: Limits = LARGE, *, key: str = "k", of: int = 3) -> RangeOutput:
    return RangeOutput(open_store(str(folder)), key, of, records.T2I, limits)


def write(
    target: RangeOutput,
    parts: Iterable[list[dict[str, Any]]],
    number: int = 0,
    rows: int | None = None,
) -> Receipt:
    """The receipt of a range whose records come in parts."""
    tables = [to_table(part, records.T2I) for part in parts]
    count = sum(table.num_rows for table in tables) if rows is None else rows
    (receipt,) = receipts_in([target.done(number, count, iter(tables))])
    return receipt


def data(receipt: Receipt) -> list[FileEntry]:
    return [file for file in receipt.files if file.path.startswith("data/")]


@pytest.mark.parametrize("size", [1, 4, 10, 25, 100])
def test_the_same_files_however_the_records_arrive(tmp_path: Path, size: int) -> None:
    made = rows(35)
    limits = Limits(10, target_bytes=600, group_bytes=250)
    whole = write(output(tmp_path / "whole", limits), [made])
    parts = [made[first : first + size] for first in range(0, 35, size)]
    assert write(output(tmp_path / "parts", limits), [[], *parts, []]) == whole
    assert len(data(whole)) == 3
    for file in whole.files:
        one, other = (tmp_path / name / file.path for name in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes()


def test_every_record_is_in_one_place_and_in_order(tmp_path: Path) -> None:
    made = rows(35)
    receipt = write(output(tmp_path, Limits(10)), [made[:20], made[20:]], number=2)
    assert [file.path.rpartition("-")[0] for file in receipt.files] == [
        *(f"data/part-00002-of-00003-{n}" for n in range(2)),
        *(f"rejected/part-00002-of-00003-{n}" for n in range(2)),
        "failed/part-00002-of-00003-0",
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
    assert [file.rows for file in data(receipt)] == [10, 10]
    assert receipt.reasons == {"image.too_small": 11} and receipt.has_failures


def test_a_range_without_records_of_an_outcome_has_no_file_of_it(tmp_path: Path) -> None:
    target = output(tmp_path)
    receipt = write(target, [rows(2)])
    assert [file.path.partition("/")[0] for file in receipt.files] == ["data"]
    missing = list(target.write_missing(receipt.files))
    assert sorted(file.path.partition("/")[0] for file in missing) == ["failed", "rejected"]
    assert [file.rows for file in missing] == [0, 0]
    (nothing,) = (tmp_path / "rejected").iterdir()
    assert pq.read_schema(nothing).equals(records.REJECT)


def test_a_range_that_lost_or_doubled_records_stops_the_job(tmp_path: Path) -> None:
    with pytest.raises(DimError, match="range 1 of .* has 10 records and gave 9"):
        write(output(tmp_path), [rows(9)], number=1, rows=10)
    assert not list(output(tmp_path).found())


def test_receipts_are_found_again_and_those_of_other_settings_are_not(tmp_path: Path) -> None:
    first = write(output(tmp_path), [rows(5)], number=0)
    second = write(output(tmp_path), [rows(9)], number=2)
    write(output(tmp_path, key="other"), [rows(7)], number=1)
    before = output(tmp_path).found()
    assert list(output(tmp_path).found()) == [first, second]
    (tmp_path / "ranges/k/00002.json").write_text('{"number": 2')  # no receipt yet
    (tmp_path / "ranges/k/00001.json").write_text((tmp_path / "ranges/k/00000.json").read_text())
    assert list(output(tmp_path).found()) == [first]
    # It was looked for when it was asked for: what is listed afterwards has the files of all.
    third = write(output(tmp_path), [rows(9)], number=2)
    write(output(tmp_path), [rows(7)], number=1)
    assert third == second and list(before) == [first, second]


def test_what_a_task_has_done_before_it_was_begun_again_it_does_not_do_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(output(tmp_path), [rows(5)])
    monkeypatch.setattr(receipts, "attempt", lambda: 1)

    def untouched() -> Iterable[pa.Table]:
        raise AssertionError("it was done again")
        yield

    (again,) = receipts_in([output(tmp_path).done(0, 5, untouched())])
    assert again == first


def test_a_range_whose_files_are_not_what_it_says_is_not_done(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    target = output(tmp_path, of=4)
    made = [write(target, [rows(12)[3 * number :]], number) for number in range(4)]
    assert list(receipts.whole(store, made)) == made
    short, gone = (tmp_path / data(made[number])[0].path for number in (0, 2))
    short.write_bytes(short.read_bytes()[:-1])
    gone.unlink()
    assert list(receipts.whole(store, made)) == [made[1], made[3]]
    lacking = receipts.lacking(store, [file for one in made for file in one.files])
    assert lacking == [data(made[number])[0].path for number in (0, 2)]


def finished(made: list[Receipt], changed: dict[str, str] | None = None) -> Manifest:
    files = tuple(
        file.model_copy(update={"path": (changed or {}).get(file.path, file.path)})
        for receipt in made
        for file in receipt.files
    )
    counts = Counts(input=0, kept=0, rejected=0, failed=0, by_reason={})
    return Manifest(job="t2i", config={}, input={}, counts=counts, files=files)


def test_the_ranges_of_a_finished_output_in_which_nothing_failed(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    made = [write(output(tmp_path), [rows(count)], n) for n, count in enumerate((5, 9, 6))]
    assert made[1].has_failures
    without = [made[number].model_copy(update={"measured": None}) for number in (0, 2)]
    assert receipts.without_failures(store, finished(made), 3) == without
    # Cut otherwise, or by a program that knew no ranges, it says nothing of a range.
    assert receipts.without_failures(store, finished(made), 4) == []
    older = {data(made[0])[0].path: "data/part-00000.parquet"}
    assert receipts.without_failures(store, finished(made, older), 3) == []


def sized(count: int, size: int) -> list[dict[str, Any]]:
    """Records that are all kept, with images of ``size`` bytes that do not compress."""
    rng = np.random.default_rng(0)
    return [
        {"id": f"r{index}", "index": index, "source": "t", "image": rng.bytes(size)}
        for index in range(count)
    ]


def test_files_grow_to_the_target_size_and_not_beyond(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "GROUP_BYTES", 50_400)  # five records
    made = sized(60, 10_000)
    limits = Limits(1000, target_bytes=256_000)
    one = write(output(tmp_path / "one", limits), [made])
    assert one == write(
        output(tmp_path / "many", limits), [made[n : n + 7] for n in range(0, 60, 7)]
    )
    assert [file.rows for file in data(one)] == [25, 25, 10]
    assert all(file.bytes < 256_000 * 1.06 for file in data(one))


def test_a_record_larger_than_the_target_has_a_file_of_its_own(tmp_path: Path) -> None:
    receipt = write(output(tmp_path, Limits(10, target_bytes=100)), [sized(3, 5_000)])
    assert [file.rows for file in data(receipt)] == [1, 1, 1]


def test_row_groups_are_small(tmp_path: Path) -> None:
    made = sized(30, 10_000)
    receipt = write(output(tmp_path, Limits(1000, group_bytes=45_000)), [made])
    file = pq.ParquetFile(tmp_path / data(receipt)[0].path)
    groups = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert groups == [4] * 7 + [2]
    assert file.read_row_group(3)["index"].to_pylist() == [12, 13, 14, 15]
    assert file.read()["image"].to_pylist() == [row["image"] for row in made]


def test_a_range_is_written_in_little_memory(tmp_path: Path) -> None:
    target = output(tmp_path, Limits(10_000, group_bytes=2 << 20))
    parts = (to_table([row], records.T2I) for row in sized_one_by_one(60, 1 << 20))
    pool = pa.proxy_memory_pool(pa.default_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        (receipt,) = receipts_in([target.done(0, 60, parts)])
        peak = pool.max_memory() + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert data(receipt)[0].rows == 60 and data(receipt)[0].bytes > 60 << 20
    assert peak < 24 << 20


def sized_one_by_one(count: int, size: int) -> Iterable[dict[str, Any]]:
    """The same while they are asked for."""
    rng = np.random.default_rng(0)
    for index in range(count):
        yield {"id": f"r{index}", "index": index, "source": "t", "image": rng.bytes(size)}


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
