"""Parquet, Arrow and tars: every record once, whatever is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dim.errors import InputError
from dim.images import FORMATS
from infra import storage
from pipelines.readers import sources
from pipelines.readers.layout import Layout, load_layout
from pipelines.readers.names import is_image
from pipelines.readers.sources import Source
from tests.pipelines.containers import (
    pair_samples,
    source,
    struct,
    target,
    write_parquet,
    write_tar,
)
from tests.pipelines.samples import encoded, photo, read_here

PAIRS = load_layout("pairs", pairs=True)
IMAGES = load_layout("images", pairs=False)


def opened(uri: str | Path, layout: Layout = PAIRS, rows_per_range: int = 4) -> Source:
    return sources.from_records(str(uri), layout, None, rows_per_range)


def read(made: Source) -> list[dict[str, Any]]:
    rows = pa.concat_tables(read_here(made)).to_pylist()
    assert [row["index"] for row in rows] == list(range(made.rows))
    return rows


def outcomes(made: Source) -> list[str]:
    return [row["outcome"] for row in read(made)]


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "id": f"p{n}",
            "instruction": f"Add box {n}.",
            "image": struct(source(n), f"{n}.png"),
            "image_target": struct(target(n)),
        }
        for n in range(start, start + count)
    ]


def test_parquet_files_of_a_folder_are_one_input_in_order_of_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "b.parquet", rows(5, 5))
    write_parquet(tmp_path / "in" / "a.parquet", rows(5))
    made = opened(tmp_path / "in")
    assert [each["first"] for each in made.ranges] == [0, 4, 8]
    found = read(made)
    assert [row["id"] for row in found] == [f"p{n}" for n in range(10)]
    assert [row["image"] for row in found] == [source(n) for n in range(10)]
    assert [row["image_target"] for row in found] == [target(n) for n in range(10)]
    assert json.loads(found[6]["provenance"])["row"] == 1
    assert read(opened(tmp_path / "in", rows_per_range=3)) == found


def test_a_truncated_parquet_file_is_one_failed_record_that_names_it(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "in" / "a.parquet", rows(5))
    write_parquet(tmp_path / "in" / "b.parquet", rows(2, 5))
    whole.write_bytes(whole.read_bytes()[:-100])
    first, *others = read(opened(tmp_path / "in"))
    assert first["outcome"] == "failed" and "a.parquet is damaged" in first["error"]
    assert [row["outcome"] for row in others] == ["kept"] * 2


def test_a_damaged_row_group_fails_its_rows_and_no_others(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", rows(9), row_group=3)
    column = pq.ParquetFile(path).metadata.row_group(1).column(2)
    data = bytearray(path.read_bytes())
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin : begin + 64] = b"\xff" * 64
    path.write_bytes(data)
    found = read(opened(path, rows_per_range=3))
    assert [r["outcome"] for r in found] == ["kept"] * 3 + ["failed"] * 3 + ["kept"] * 3
    assert "a.parquet" in found[4]["error"]


def test_a_missing_column_is_one_error_that_names_what_there_is(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"id": "1", "picture": struct(source(1))}])
    with pytest.raises(InputError, match=r"a\.parquet has no column 'image_path' or 'image'.*pict"):
        opened(path)


def test_ids_that_repeat_across_files_are_rejected(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", rows(3))
    write_parquet(tmp_path / "b.parquet", rows(3, 2))
    found = read(opened(tmp_path))
    assert [row["reason"] for row in found] == [None, None, None, "record.repeated_id", None, None]


def test_nulls_and_paths_in_an_image_column(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(source(1))
    some = rows(3)
    some[0]["image"] = struct(None, "x.png")
    some[1]["image"] = struct(None, None)
    some[2]["instruction"] = None
    first, second, third = read(opened(write_parquet(tmp_path / "a.parquet", some)))
    assert first["image"] == source(1)
    assert second["outcome"] == third["outcome"] == "failed"
    assert "no 'instruction'" in third["error"]


def test_a_hugging_face_folder_as_saved(tmp_path: Path) -> None:
    features = datasets.Features(
        id=datasets.Value("string"),
        instruction=datasets.Value("string"),
        image=datasets.Image(),
        image_target=datasets.Image(),
    )
    made = datasets.Dataset.from_list(rows(7), features=features)
    datasets.DatasetDict(train=made).save_to_disk(str(tmp_path / "hf"), num_shards={"train": 2})
    (tmp_path / "hf" / "train" / "cache-1.arrow").write_bytes(b"not a part of the data set")
    (tmp_path / "hf" / "train" / "left-over.arrow").write_bytes(b"nor is this")
    found = read(opened(tmp_path / "hf", rows_per_range=3))
    assert [row["id"] for row in found] == [f"p{n}" for n in range(7)]
    assert [row["image"] for row in found] == [source(n) for n in range(7)]
    shard = tmp_path / "hf" / "train" / "data-00001-of-00002.arrow"
    shard.write_bytes(shard.read_bytes()[:300])
    assert outcomes(opened(tmp_path / "hf")) == ["kept"] * 4 + ["failed"]


def test_tars_of_pairs_and_of_images(tmp_path: Path, s3: str) -> None:
    write_tar(tmp_path / "p" / "00.tar", pair_samples(range(3)))
    write_tar(tmp_path / "p" / "01.tar", pair_samples(range(3, 8)))
    found = read(opened(tmp_path / "p", rows_per_range=2))
    assert [row["id"] for row in found][:4] == ["00/00000", "00/00001", "00/00002", "01/00003"]
    assert [row["image_target"] for row in found] == [target(n) for n in range(8)]
    assert {row["outcome"] for row in found} == {"kept"}

    members = [("a/1.png", source(1)), ("a/1.txt", b"a photo"), ("a/2.jpg", source(2))]
    path = write_tar(tmp_path / "i.tar", [("__MACOSX/._1.png", b"?"), *members])
    storage.write_bytes(f"{s3}/i.tar", path.read_bytes())
    for uri in (str(path), f"{s3}/i.tar"):
        first, second = read(opened(uri, IMAGES))
        assert (first["id"], first["caption_hint"]) == ("i/a/1", "a photo")
        assert second["image"] == source(2)


def test_a_tar_that_ends_within_a_sample_fails_that_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{n}.png", source(n)) for n in range(3)])
    import tarfile

    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 20])
    found = read(opened(path, IMAGES))
    assert [row["outcome"] for row in found] == ["kept", "kept", "failed"]
    assert "sample 2 of a.tar: 2.png is damaged" in found[2]["error"]


def test_what_lies_behind_a_broken_header_is_one_failed_record(tmp_path: Path) -> None:
    import tarfile

    path = write_tar(tmp_path / "in" / "a.tar", [(f"{n}.png", source(n)) for n in range(4)])
    write_tar(tmp_path / "in" / "b.tar", [("9.png", source(9))])
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    data = bytearray(path.read_bytes())
    data[third.offset : third.offset + 300] = b"x" * 300
    path.write_bytes(data)
    (tmp_path / "in" / "c.tar").write_bytes(b"<html>" * 200)
    found = read(opened(tmp_path / "in", IMAGES))
    assert [r["outcome"] for r in found] == ["kept", "kept", "failed", "kept", "failed"]
    assert f"a.tar is damaged from byte {third.offset} on" in found[2]["error"]
    assert "c.tar is damaged" in found[4]["error"]


def test_folders_of_mixed_or_no_kind_say_so(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no .parquet, .arrow or .tar files in"):
        opened(tmp_path / "empty")
    write_parquet(tmp_path / "m" / "a.parquet", rows(1))
    write_tar(tmp_path / "m" / "b.tar", pair_samples([1]))
    with pytest.raises(InputError, match=r"holds \.parquet and \.tar files"):
        opened(tmp_path / "m")


@pytest.mark.parametrize(
    "state", ["{", '{"_data_files": 5}', '{"_data_files": [{"name": "x"}]}', "{}\n{}"]
)
def test_a_state_that_names_no_files_is_refused_by_name(state: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"id": "a"}]).save_to_disk(folder)
    (folder / "state.json").write_text(state)
    with pytest.raises(InputError, match=r"saved/state.json (is not JSON|does not name)"):
        opened(folder, IMAGES)


def test_whatever_pillow_calls_a_file_of_our_formats_is_an_image_by_its_name() -> None:
    Image.init()
    known = {suffix for suffix, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO")}
    assert {".jpe", ".jfif", ".mpo", ".apng"} < known
    assert all(is_image(f"a/b{suffix.upper()}") for suffix in known)
    assert not is_image("a/b.json")


def test_images_of_rarer_names_are_found_in_folders_and_tars(tmp_path: Path) -> None:
    for suffix in ("jpe", "jfif", "mpo"):
        (tmp_path / f"{suffix}.{suffix}").write_bytes(encoded(photo(1), "JPEG"))
    folder = sources.images_from_folder(str(tmp_path), None, 10)
    assert [row["id"] for row in read(folder)] == ["jfif", "jpe", "mpo"]
    content = {"0.image.jpe": encoded(photo(1), "JPEG"), "0.image_target.apng": encoded(photo(2))}
    members = [*content.items(), ("0.json", b'{"instruction": "x"}')]
    write_tar(tmp_path / "a.tar", members)
    assert outcomes(opened(tmp_path / "a.tar")) == ["kept"]
