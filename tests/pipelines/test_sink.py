"""The sink by itself: what is committed depends on the records and not on how they arrived."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray.data.datasource import WriteResult

from dim import records
from infra.storage import Store, open_store
from pipelines import sink
from pipelines.manifest import FileEntry
from pipelines.sink import OutcomeSink
from pipelines.stages.outcome import Rejection, fail, reject, to_table


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


def written(
    store: Store, parts: list[list[dict[str, Any]]], rows_per_file: int = 10
) -> OutcomeSink:
    """A sink after one write task per part, as the driver sees it."""
    target = OutcomeSink(store, records.T2I, rows_per_file)
    results = [
        target.write([to_table(part, records.T2I)] if part else [pa.table({})], None)
        for part in parts
    ]
    target.on_write_complete(WriteResult(0, 0, results))
    return target


def committed(folder: Path, parts: list[list[dict[str, Any]]]) -> list[FileEntry]:
    return written(open_store(str(folder)), parts).commit()


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
        assert all(table.schema.equals(schema, check_metadata=True) for table in tables)
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
    assert sum(file.rows for file in target.commit()) == 10


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
    monkeypatch.setattr(sink, "_COMMIT_IN_DRIVER", 0)
    assert committed(tmp_path / "there", [made[:17], made[17:]]) == here
