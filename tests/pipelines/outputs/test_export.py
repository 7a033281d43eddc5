from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim import records
from dim.errors import DimError, InputError
from infra.storage import Store, open_store
from pipelines.outputs import export, manifest
from pipelines.outputs.export import ExportConfig
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
from pipelines.outputs.verify import verify
from pipelines.readers import sources
from pipelines.readers.layout import load_layout
from tests.image_files import packed_text, with_chunks
from tests.pipelines.finished import edit_rows, finish
from tests.pipelines.samples import encoded, photo, read_here


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


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
        return {m.name: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]


def test_webdataset_tars_hold_every_record_and_are_cut_by_size(tmp_path: Path, s3: str) -> None:
    rows = edit_rows(20)
    finish(open_store(f"{s3}/edit"), rows)
    config = ExportConfig(
        data=f"{s3}/edit", out=str(tmp_path / "tars"), format="webdataset", target_file_mb=0.05
    )
    done = export.run(config)
    limit = 0.05 * 2**20
    assert len(done.files) >= 3 and all(file.bytes <= limit for file in done.files)
    assert all(file.bytes > limit / 2 for file in done.files[:-1])
    samples: dict[str, bytes] = {}
    for number, file in enumerate(done.files):
        assert file.path == f"data/train-{number:05d}.tar"
        members = read_tar(tmp_path / "tars" / file.path)
        assert file.rows == sum(name.endswith(".json") for name in members)
        samples |= members
    kept = [row for row in rows if row.get("outcome") is None]
    assert len(samples) == 3 * len(kept)
    for row in kept:
        key = f"{row['index']:09d}"
        assert samples[f"{key}.image.jpg"] == row["image"]
        assert samples[f"{key}.image_target.png"] == row["image_target"]
        text = json.loads(samples[f"{key}.json"])
        assert (text["id"], text["answer"]) == (row["id"], row["answer"])
    assert verify(config.out).problems == []
    again = config.model_copy(update={"out": f"{s3}/tars"})
    assert export.run(again).files == done.files

    import datasets

    loaded = datasets.load_dataset(
        "webdataset",
        data_files=str(tmp_path / "tars" / "data" / "*.tar"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert [item["id"] for item in loaded["json"]] == [row["id"] for row in kept]


RELATIVES = {
    "several pictures": (encoded(photo(1), "MPO", save_all=True, append_images=[photo(2)]), "jpg"),
    "an animated PNG": (encoded(photo(1), save_all=True, append_images=[photo(2)]), "png"),
    "a BigTIFF": (encoded(photo(1), "TIFF", big_tiff=True), "tif"),
    "an animated WebP": (
        encoded(photo(1), "WEBP", save_all=True, append_images=[photo(2)]),
        "webp",
    ),
    "an animated GIF": (encoded(photo(1), "GIF", save_all=True, append_images=[photo(2)]), "gif"),
    "a long text": (with_chunks(encoded(photo(1)), packed_text(bytes(2 << 20))), "png"),
    "a bitmap": (encoded(photo(1), "BMP"), "bmp"),
}


def test_whatever_is_read_is_exported_and_taken_in_again(tmp_path: Path) -> None:
    rows = [
        {**record(place, name), "instruction": "Add a box.", "image": image}
        for place, (name, (image, _)) in enumerate(RELATIVES.items())
    ]
    data = finished(open_store(str(tmp_path / "edit")), rows)
    for format, layout in (("public", export.LINES), ("webdataset", "data")):
        out = tmp_path / format
        export.run(ExportConfig(data=data, out=str(out), format=format))
        again = sources.from_records(str(out / layout), load_layout("pairs", pairs=True), None, 100)
        table = pa.concat_tables(read_here(again))
        assert table["outcome"].to_pylist() == ["kept"] * len(rows), table["error"].to_pylist()
        assert table["image"].to_pylist() == [row["image"] for row in rows]
    ends = [line["image_path"].rpartition(".")[2] for line in read(tmp_path / "public")]
    assert ends == [suffix for _, suffix in RELATIVES.values()]


def test_another_form_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    data = finished(open_store(str(tmp_path / "edit")), [record(0, "a")])
    config = ExportConfig(data=data, out=str(tmp_path / "out"))
    export.run(config)
    tars = config.model_copy(update={"format": "webdataset"})
    with pytest.raises(InputError, match="holds another output"):
        export.run(tars)
    assert [file.path for file in export.run(tars, overwrite=True).files] == [
        "data/train-00000.tar"
    ]
    assert not (tmp_path / "out" / export.LINES).exists()


def test_an_export_of_nothing_is_one_empty_tar(tmp_path: Path) -> None:
    data = finished(open_store(str(tmp_path / "t2i")), [], records.T2I)
    config = ExportConfig(data=data, out=str(tmp_path / "out"), format="webdataset")
    (file,) = export.run(config).files
    assert file.rows == 0
    with tarfile.open(tmp_path / "out" / file.path) as tar:
        assert tar.getmembers() == []


def test_a_data_set_that_lost_records_is_not_exported(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "edit"))
    data = finished(store, [record(0, "a"), record(1, "b")])
    done = manifest.read(store)
    assert done is not None
    counts = done.counts.model_copy(update={"input": 3, "kept": 3})
    manifest.write(store, done.model_copy(update={"counts": counts}))
    for form in ("public", "webdataset"):
        config = ExportConfig(data=data, out=str(tmp_path / form), format=form)
        with pytest.raises(DimError, match="2 records were exported of the 3"):
            export.run(config)
        assert not (tmp_path / form / "manifest.json").exists()


def test_only_edit_records_are_exported(tmp_path: Path) -> None:
    data = finished(open_store(str(tmp_path / "raw")), [], records.RAW_PAIR)
    with pytest.raises(InputError, match="holds raw_pair records, and edit records are needed"):
        export.run(ExportConfig(data=data, out=str(tmp_path / "out")))
