from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim import records
from dim.errors import InputError
from infra.storage import Store, open_store
from pipelines import export, manifest
from pipelines.export import ExportConfig
from pipelines.manifest import Counts, FileEntry, Manifest
from tests.pipelines.samples import encoded, photo


def finished(store: Store, rows: list[dict], schema: pa.Schema = records.EDIT) -> str:
    """A finished data set with these records, as a job leaves it."""
    table = pa.Table.from_pylist(rows, schema=schema)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    data = buffer.getvalue().to_pybytes()
    name = "data/part-00000.parquet"
    store.write(name, data)
    entry = FileEntry(path=name, rows=len(rows), bytes=len(data), sha256=records.sha256_hex(data))
    counts = Counts(input=len(rows), kept=len(rows), rejected=0, failed=0, by_reason={})
    manifest.write(store, Manifest(job="edit", config={}, input={}, counts=counts, files=(entry,)))
    return store.uri


def record(number: int, record_id: str) -> dict:
    images = {"image": encoded(photo(number), "JPEG"), "image_target": encoded(photo(number + 50))}
    return {"id": record_id, "index": number, "source": "t", "answer": f"é {number}", **images}


def read(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / export.LINES).read_text().splitlines()]


def test_names_are_safe_and_never_shared(tmp_path: Path, s3: str) -> None:
    ids = ["a", "A", "a/b", "a_b", "../../etc/passwd", ".hidden", "ü 1", "x" * 300]
    rows = [record(number, record_id) for number, record_id in enumerate(ids)]
    data = finished(open_store(f"{s3}/edit"), rows)
    result = export.run(ExportConfig(data=data, out=str(tmp_path / "out")))
    lines = read(tmp_path / "out")
    assert [line["id"] for line in lines] == ids
    assert [line["prompt"] for line in lines] == [f"é {n}" for n in range(len(ids))]
    assert lines[0]["image_path"] == "image/a_source.jpg"
    assert lines[0]["image_path_target"] == "image/a_target.png"
    paths = [line[key].casefold() for line in lines for key in ("image_path", "image_path_target")]
    assert len(set(paths)) == 2 * len(ids)
    for line, row in zip(lines, rows, strict=True):
        assert (tmp_path / "out" / line["image_path"]).read_bytes() == row["image"]
    files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*g")}
    assert len(files) == 2 * len(ids) and all(len(path.parts) == 2 for path in files)
    assert result.counts.kept == len(ids)


def test_reruns_and_foreign_folders(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "edit"))
    data = finished(store, [record(0, "a")])
    config = ExportConfig(data=data, out=str(tmp_path / "out"))
    first = export.run(config)
    stamp = (tmp_path / "out" / export.LINES).stat().st_mtime_ns
    assert export.run(config) == first
    assert (tmp_path / "out" / export.LINES).stat().st_mtime_ns == stamp
    finished(store, [record(0, "a"), record(1, "b")])
    with pytest.raises(InputError, match="holds another output"):
        export.run(config)
    assert export.run(config, overwrite=True).counts.kept == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(InputError, match="is not empty"):
        export.run(config.model_copy(update={"out": str(tmp_path / "mine")}), overwrite=True)


def test_only_edit_records_are_exported(tmp_path: Path) -> None:
    data = finished(open_store(str(tmp_path / "raw")), [], records.RAW_PAIR)
    with pytest.raises(InputError, match="holds raw_pair records, and edit records are needed"):
        export.run(ExportConfig(data=data, out=str(tmp_path / "out")))
