"""Ids: of their own, whatever they are, and never two of one id."""

from __future__ import annotations

import datetime
import json
import math
import random
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim.errors import InputError
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.readers import containers, ids, sources
from pipelines.readers.cutter import Ids
from pipelines.readers.layout import Layout
from tests.pipelines.containers import (
    pair_samples,
    source,
    struct,
    write_lines,
    write_parquet,
    write_tar,
)
from tests.pipelines.readers.test_containers import IMAGES, opened, read

Row = dict[str, Any]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        ("101.0", "101.0"),
        (101, "101"),
        (101.0, "101"),
        (-0.0, "0"),
        (101.5, "101.5"),
        (1e20, "100000000000000000000"),
        (2**70, str(2**70)),
        (math.inf, "inf"),
        (True, "True"),
        (Decimal("101.00"), "101"),
        (Decimal("101.50"), "101.5"),
        (b"abc", "abc"),
        (b"\xff\x00", "ff00"),
        (bytearray(b"abc"), "abc"),
        (np.int64(7), "7"),
        (np.float32(7), "7"),
        (np.array([7.0]), "7"),
        (np.str_("x"), "x"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        ([101.0], "101"),
        ({"$oid": "5f"}, "5f"),
        ({"id": {"value": 5.0}, "of": None}, "5"),
        (None, None),
        ("", None),
        (math.nan, None),
        (Decimal("nan"), None),
        (np.float64("nan"), None),
        (b"", None),
        ([], None),
        ({}, None),
        ([None], None),
    ],
)
def test_the_text_of_an_id(value: Any, text: str | None) -> None:
    assert ids.as_text(value) == text


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ([1, 2], "must be one value, not list of 2"),
        ({"a": 1, "b": 2}, "must be one value, not dict of 2"),
        (1j, "must be a text or a number, not complex"),
    ],
)
def test_what_cannot_be_an_id(value: Any, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        ids.as_text(value)
    with pytest.raises(InputError, match=f"'id': .*{complaint}"):
        ids.id_of({"id": value}, IMAGES)


def test_ids_of_several_columns() -> None:
    layout = Layout(image=("image",), id=("img", "turn"))
    assert ids.id_of({"img": 5.0, "turn": 1.0}, layout) == "5-1"
    assert ids.id_of({"img": "5", "turn": math.nan}, layout) is None
    assert ids.id_of({}, layout) is None


def test_ids_of_lines_are_kept_and_repeats_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(source(1))
    values = [101.0, 102.0, 101, "101", 1.5, math.nan, None, [7], {"a": 1, "b": 2}, {"$oid": "x"}]
    lines = [{"id": value, "image": "a.png"} for value in values]
    path = write_lines(tmp_path / "list.jsonl", lines)
    rows = read(sources.from_records(str(path), IMAGES, None, 3))
    assert [row["id"] for row in rows] == [
        *("101", "102", "101", "101", "1.5", "list-00000005", "list-00000006", "7"),
        *("list-00000008", "x"),
    ]
    assert [row["reason"] for row in rows[2:4]] == ["record.repeated_id"] * 2
    assert "line 9: 'id': an id must be one value" in rows[8]["error"]
    assert [row["outcome"] for row in rows].count("kept") == 7


@pytest.mark.parametrize(
    ("kind", "values", "texts"),
    [
        (pa.float64(), [101.0, 102.5, None], ["101", "102.5", "a-00000002"]),
        (pa.decimal128(10, 2), [Decimal("101.00"), Decimal("2.50"), None], ["101", "2.5", None]),
        (pa.binary(), [b"x", b"\xff", b""], ["x", "ff", "a-00000002"]),
        (pa.bool_(), [True, False, None], ["True", "False", "a-00000002"]),
        (pa.list_(pa.int64()), [[1], [2], []], ["1", "2", "a-00000002"]),
        (
            pa.struct([("$oid", pa.string())]),
            [{"$oid": "x"}, {"$oid": "y"}, None],
            ["x", "y", None],
        ),
    ],
)
def test_ids_of_tables(
    kind: pa.DataType, values: list[Any], texts: list[Any], tmp_path: Path
) -> None:
    images = pa.array([source(1)] * 3, pa.binary())
    table = pa.table({"id": pa.array(values, kind), "image": images})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(opened(tmp_path / "a.parquet", IMAGES))
    assert [row["id"] for row in rows] == [text or "a-00000002" for text in texts]
    pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), tmp_path / "a.parquet")
    assert read(opened(tmp_path / "a.parquet", IMAGES, 2))[3]["reason"] == "record.repeated_id"


@pytest.mark.parametrize("named", [101, 101.0, "101"])
@pytest.mark.parametrize(
    "keys",
    [
        pa.array([101, 7], pa.int64()),
        pa.array([101.0, None], pa.float64()),
        pa.array([b"101", b"7"], pa.binary()),
        pa.array(["101", "7"]),
        pa.array([Decimal("101.0"), None], pa.decimal128(9, 1)),
    ],
)
def test_keys_of_media_are_found_however_they_were_stored(
    keys: pa.Array, named: Any, tmp_path: Path
) -> None:
    images = pa.array([source(1), source(2)], pa.binary())
    (tmp_path / "media").mkdir()
    pq.write_table(pa.table({"uid": keys, "image": images}), tmp_path / "media" / "m.parquet")
    path = write_lines(tmp_path / "list.jsonl", [{"image_path": named}])
    media = {"uri": str(tmp_path / "media"), "key": "uid"}
    (row,) = read(ingest.open_source(IngestConfig(out="o", images=str(path), media=media)))
    assert row["image"] == source(1)


def test_keys_in_the_json_of_a_tar(tmp_path: Path) -> None:
    members = [("1.png", source(1)), ("1.json", b'{"id": 101.0}')]
    write_tar(tmp_path / "media" / "m.tar", members)
    path = write_lines(tmp_path / "list.jsonl", [{"image_path": 101}])
    media = {"uri": str(tmp_path / "media"), "key": "id"}
    (row,) = read(ingest.open_source(IngestConfig(out="o", images=str(path), media=media)))
    assert row["image"] == source(1)


def test_nan_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(source(1))
    lines = [
        {"image_path": math.nan, "image": "a.png", "caption": math.nan, "prompt": "a field"},
        {"image_path": math.nan},
    ]
    path = write_lines(tmp_path / "list.jsonl", lines)
    first, second = read(sources.from_records(str(path), IMAGES, None, 3))
    assert (first["image"], first["caption_hint"]) == (source(1), "a field")
    assert "no 'image_path' or 'image'" in second["error"]


def images(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source(number))
    return folder


def ids_of_folder(folder: Path, rows_per_file: int = 100) -> dict[str, str]:
    """Id of each file, by its name."""
    rows = read(sources.images_from_folder(str(folder), None, rows_per_file))
    assert {row["outcome"] for row in rows} == {"kept"}
    assert len({row["id"] for row in rows}) == len(rows)
    files = [json.loads(row["provenance"])["file"] for row in rows]
    return {
        file.removeprefix(f"{folder}/"): row["id"] for file, row in zip(files, rows, strict=True)
    }


def test_images_of_one_name_have_ids_of_their_own_and_others_keep_theirs(tmp_path: Path) -> None:
    names = ["cat.jpg", "cat.png", "IMG_1.JPG", "IMG_1.jpg", "dog.webp", "a/cat.png", "a/x.y.png"]
    folder = images(tmp_path / "in", *names)
    found = ids_of_folder(folder)
    assert found == {
        **{name: name for name in names[:4]},
        "dog.webp": "dog",
        "a/cat.png": "a/cat",
        "a/x.y.png": "a/x.y",
    }
    assert ids_of_folder(folder, 1) == ids_of_folder(folder, 2) == found


def test_a_whole_name_that_is_the_short_one_of_another_image(tmp_path: Path) -> None:
    names = ("cat.jpg", "cat.png", "cat.jpg.png", "cat.jpg#.png")
    assert ids_of_folder(images(tmp_path / "in", *names)) == {
        "cat.jpg": "cat.jpg##",
        "cat.png": "cat.png",
        "cat.jpg.png": "cat.jpg",
        "cat.jpg#.png": "cat.jpg#",
    }


def test_equal_hashes_of_different_names_change_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "hash", lambda text: 7, raising=False)
    names = ["a.png", "b.png", "c.jpg", "c.png"]
    assert ids.apart(names, lambda name: name[:1]) == {"c.jpg": "c.jpg", "c.png": "c.png"}


def test_samples_of_tars_of_one_name(tmp_path: Path) -> None:
    for name, number in (("x.tar", 1), ("x.TAR", 2), ("a/x.tar", 3), ("b/x.tar", 4)):
        write_tar(tmp_path / name, [("1.png", source(number))])
    rows = read(opened(tmp_path, IMAGES))
    assert {row["id"]: row["image"] for row in rows} == {
        "x.TAR/1": source(2),
        "a/x/1": source(3),
        "b/x/1": source(4),
        "x.tar/1": source(1),
    }


def test_samples_that_repeat_and_samples_with_two_images(tmp_path: Path) -> None:
    members = [
        ("1.png", source(1)),
        ("2.png", source(2)),
        ("1.txt", b"a caption that came late"),
        ("cat.jpg", source(3)),
        ("cat.png", source(4)),
        ("cat.PNG", source(5)),
        ("3.json", b'{"__key__": "x", "__damage__": "y", "__images__": 5, "caption": "c"}'),
        ("3.png", source(6)),
    ]
    write_tar(tmp_path / "a.tar", members)
    rows = read(opened(tmp_path / "a.tar", IMAGES))
    assert [(row["id"], row["reason"]) for row in rows] == [
        ("a/1", None),
        ("a/2", None),
        ("a/1", "record.repeated_id"),
        ("a/cat", "record.several_images"),
        ("a/3", None),
    ]
    assert rows[3]["value"] == 3 and rows[4]["caption_hint"] == "c"


def test_tables_of_one_name_in_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        row = {"image": struct(source(1)), "x": 1}
        write_parquet(tmp_path / folder / "train.parquet", [row, row])
    rows = read(opened(tmp_path, IMAGES))
    assert len({row["id"] for row in rows}) == 4


def test_an_id_that_a_record_without_one_is_given_comes_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(source(1))
    own = ["list-00000002", None, None, "list-00000001", "list-000000009", "list-00000005", None]
    lines = [{"id": name, "image": "a.png"} for name in own]
    path = write_lines(tmp_path / "list.jsonl", lines)
    for rows_per_range in (2, 100):
        rows = read(sources.from_records(str(path), IMAGES, None, rows_per_range))
        kept = [row["id"] for row in rows if row["outcome"] == "kept"]
        assert kept == [
            *("list-00000002", "list-00000001", "list-000000009", "list-00000005", "list-00000006")
        ]
        rejected = [row for row in rows if row["outcome"] == "rejected"]
        assert [row["index"] for row in rejected] == [2, 3]
        assert {row["reason"] for row in rejected} == {"record.repeated_id"}


def test_ids_that_repeat_are_found_as_they_come_one_after_another() -> None:
    """Beside the rule in words: an id that an earlier record has, or is given for want of one."""
    draw = random.Random(5)
    for _ in range(40):
        given = [
            draw.choice([None, f"list-{draw.randrange(12):08d}", f"x{draw.randrange(6)}", f"u{n}"])
            for n in range(12)
        ]
        seen, expected = set[str](), []
        for place, name in enumerate(given):
            called = name or f"list-{place:08d}"
            if called in seen:
                expected.append(place)
            seen.add(called)
        files = [Ids("list"), Ids("list"), Ids("list")]
        for place, name in enumerate(given):
            files[place // 5].add(name)
        whole = Ids("list")
        for each in files:
            whole.extend(each)
        assert whole.repeated().tolist() == expected, given


def test_an_entry_of_the_index_is_small_whatever_it_is_called() -> None:
    ids = Ids("list")
    for number in range(1000):
        ids.add(f"list-{number + 3:08d}")
    parts = (ids.hashes, ids.named, ids.like, ids.numbers)
    assert sum(memoryview(part).nbytes for part in parts) <= 24 * 1000
    assert ids.repeated().tolist() == []


def test_tars_keep_the_ids_they_had(tmp_path: Path) -> None:
    write_tar(tmp_path / "data" / "00.0.tar", pair_samples([7]))
    made = containers.find_files(str(tmp_path))
    assert made.files[0][0] == "data/00.0.tar"
    (row,) = read(opened(tmp_path))
    assert row["id"] == "data/00.0/00007"
