"""What a file is, is told by what is in it: JSON of every form, compressed, in other encodings."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dim.errors import InputError
from infra import storage
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.readers import compression, json_values, sources
from pipelines.readers.entries import JsonTexts
from pipelines.readers.json_values import Walk
from pipelines.readers.layout import load_layout
from tests.pipelines.containers import (
    pair_samples,
    source,
    struct,
    target,
    write_parquet,
    write_tar,
)
from tests.pipelines.readers.test_containers import IMAGES, PAIRS, opened, read
from tests.pipelines.samples import write_pairs

COUNT = 5
IDS = [f"pair-{n}" for n in range(COUNT)]


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, "zstd", asbytes=True))


def lz4(data: bytes) -> bytes:
    return bytes(pa.compress(data, "lz4", asbytes=True))


CODECS = [gzip.compress, bz2.compress, lzma.compress, zstd, lz4]


@pytest.fixture
def lines(tmp_path: Path) -> str:
    return write_pairs(tmp_path, COUNT).read_text()


@pytest.fixture
def items(lines: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


def check_read(path: Path, data: bytes, in_lines: bool = True) -> list[dict[str, Any]]:
    """The records of a file with these bytes: all of them, however they are cut into ranges."""
    path.write_bytes(data)
    made = opened(path, rows_per_range=2)
    entries = made.reader.entries
    assert isinstance(entries, JsonTexts) and entries.in_lines is in_lines
    rows = read(made)
    assert [(row["id"], row["outcome"]) for row in rows] == [(id, "kept") for id in IDS]
    assert read(opened(path, rows_per_range=100)) == rows
    return rows


def check_refused(path: Path, data: bytes, complaint: str) -> None:
    path.write_bytes(data)
    with pytest.raises(InputError, match=complaint) as caught:
        opened(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert path.name in str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a"])
def test_lines_and_lists_whatever_the_file_is_called(
    name: str, lines: str, items: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = check_read(tmp_path / name, lines.encode())
    assert [json.loads(row["provenance"])["line"] for row in rows] == [1, 2, 3, 4, 5]
    rows = check_read(tmp_path / name, json.dumps(items).encode(), False)
    assert [json.loads(row["provenance"])["item"] for row in rows] == [0, 1, 2, 3, 4]
    check_read(tmp_path / name, json.dumps(items, indent=2).encode(), False)


def joined(text: str) -> Callable[[list[Any]], str]:
    return lambda items: text.join(json.dumps(item) for item in items)


@pytest.mark.parametrize(
    ("write", "in_lines"),
    [
        (joined("\r\n\r\n  \r\n"), True),
        (joined("\r"), False),
        (joined(",\n"), False),
        (joined(" "), False),
        (lambda items: "\n".join(json.dumps(item, indent=1) for item in items), False),
        (lambda items: json.dumps({"data": items}), False),
        (lambda items: json.dumps({"data": items}, indent=2), False),
        (
            lambda items: json.dumps({"of": {"a": [1]}, "tags": ["x"], "x": items, "n": 5}),
            False,
        ),
    ],
)
def test_records_in_every_arrangement(
    write: Callable[[list[Any]], str],
    in_lines: bool,
    items: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    check_read(tmp_path / "a.json", write(items).encode(), in_lines)
    accented = [{**item, "prompt": "Setze «é» \U0001f600 auf [den] {Tisch}"} for item in items]
    text = write(accented).replace("\\u00e9", "é").replace("\\ud83d\\ude00", "\U0001f600")
    rows = check_read(tmp_path / "a.json", text.encode(), in_lines)
    assert {row["instruction"] for row in rows} == {accented[0]["prompt"]}


def test_one_object_is_one_record(items: list[dict[str, Any]], tmp_path: Path) -> None:
    for text, place in ((json.dumps(items[0]), "line"), (json.dumps(items[0], indent=1), "item")):
        (tmp_path / "a.json").write_text(text)
        (row,) = read(opened(tmp_path / "a.json"))
        assert row["outcome"] == "kept" and place in json.loads(row["provenance"])
    labelled = {**items[0], "tags": [{"a": 1}]}  # a list of objects in a record is no list of them
    (tmp_path / "a.json").write_text(json.dumps(labelled))
    assert opened(tmp_path / "a.json").rows == 1


def test_what_may_be_meant_in_two_ways_is_refused(
    items: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    columns = {name: [item[name] for item in items] for name in items[0]}
    numbered = {name: dict(enumerate(values)) for name, values in columns.items()}
    for what, complaint in (
        ({"train": items, "test": items}, r"several lists of records, train, test.*jq -c '\.train"),
        (dict(zip(IDS, items, strict=True)), r"one object with 5 objects in it.*jq -c '\.\[\]'"),
        (columns, r"a table by columns.*orient='records', lines=True"),
        (numbered, "a table by columns"),
    ):
        check_refused(path, json.dumps(what).encode(), complaint)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "is empty"),
        (b" \n \n", "is empty"),
        (b"[]", "is empty"),
        (b"id,image_path\n1,a.png\n", "is no JSON: it begins with 'id,image_path'"),
        (b"null", "is no JSON: it begins with 'null'"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "neither JSON nor Parquet, Arrow or a tar"),
        (b'[{"a": 1}, {"b', r"is not JSON \(Unterminated string.*byte 12\)"),
        (b'[{"a": 1}, {"b": 2}', "not JSON: its list does not end"),
        (b'[{"a": 1} {"b": 2}]', "not JSON: no comma at byte 10"),
        (b'[{"a": 1}]x', "more than its list, from byte 10 on"),
        (b"[" * 100_000, "is not JSON"),
        (b'{\n"a": 1,\n"b" 2\n}', "is not JSON"),
    ],
)
def test_what_is_no_list_of_records_is_refused_at_once(
    data: bytes, complaint: str, tmp_path: Path
) -> None:
    check_refused(tmp_path / "a.jsonl", data, complaint)


@pytest.mark.parametrize(
    "first", ["{broken", '{"id": "x", "image_path": "a', "# a comment", "[1, 2]", '{"a": [']
)
def test_a_bad_first_line_fails_by_itself(first: str, lines: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{first}\n{lines}")
    bad, *good = read(opened(tmp_path / "a.jsonl"))
    assert bad["outcome"] == "failed" and bad["error"].startswith("line 1: ")
    assert [row["id"] for row in good] == IDS
    assert {row["outcome"] for row in good} == {"kept"}


ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_encodings(
    encoding: str, lines: str, items: list[dict[str, Any]], tmp_path: Path
) -> None:
    check_read(tmp_path / "a.jsonl", lines.encode(encoding))
    check_read(tmp_path / "a.json", json.dumps(items, indent=1).encode(encoding), False)
    check_read(tmp_path / "a.gz", gzip.compress(lines.encode(encoding)))


@pytest.mark.parametrize("compress", CODECS)
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl", "a"])
def test_compressed_json_whatever_it_is_called(
    name: str,
    compress: Callable[[bytes], bytes],
    lines: str,
    items: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    plain = check_read(tmp_path / "plain.jsonl", lines.encode())
    half = len(lines.splitlines(keepends=True)[0])
    parts = (lines[:half].encode(), lines[half:].encode())
    rows = check_read(tmp_path / name, compress(parts[0]) + compress(parts[1]))
    assert [row["content_hash"] for row in rows] == [row["content_hash"] for row in plain]
    assert [json.loads(row["provenance"])["line"] for row in rows] == [1, 2, 3, 4, 5]
    check_read(tmp_path / name, compress(json.dumps(items).encode()), False)


def test_numbered_records_go_by_the_name_without_what_it_is_compressed_with(tmp_path: Path) -> None:
    lines = write_pairs(tmp_path, 2).read_text().replace('"id"', '"no"')
    for name, data in (("a.jsonl", lines.encode()), ("a.jsonl.gz", gzip.compress(lines.encode()))):
        (tmp_path / name).write_bytes(data)
        rows = read(opened(tmp_path / name))
        assert [row["id"] for row in rows] == ["a-00000000", "a-00000001"]


@pytest.mark.parametrize("compress", CODECS)
def test_a_compressed_file_that_is_cut_is_refused(
    compress: Callable[[bytes], bytes], lines: str, tmp_path: Path
) -> None:
    check_refused(tmp_path / "a.jsonl.gz", compress(lines.encode())[:-20], "is damaged: ")


def test_a_compressed_file_on_an_object_store(
    lines: str, tmp_path: Path, s3: str, s3_endpoint: str
) -> None:
    import boto3

    storage.upload_folder(tmp_path / "image", f"{s3}/image")
    client, bucket = boto3.client("s3", endpoint_url=s3_endpoint), s3.removeprefix("s3://")
    client.put_object(Bucket=bucket, Key="a.jsonl.gz", Body=gzip.compress(lines.encode()))
    rows = read(opened(f"{s3}/a.jsonl.gz", rows_per_range=2))
    assert [(row["id"], row["outcome"]) for row in rows] == [(id, "kept") for id in IDS]


def test_a_file_too_large_to_be_decompressed_again_and_again_is_refused(
    lines: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compression, "MOST", 400)
    complaint = r"over 400 bytes decompressed.*unpack it first \({} a\.jsonl\.x\)"
    for data, command in (
        (gzip.compress(lines.encode()), "gzip -dk"),
        (zstd(lines.encode()), "zstd -d"),
        (lines.encode("utf-16"), "iconv -f utf-16 -t utf-8"),
    ):
        check_refused(tmp_path / "a.jsonl.x", data, complaint.format(command))


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "{}")
    return buffer.getvalue()


def test_what_cannot_be_read_compressed_is_refused_by_name(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "p.tar", pair_samples([1])).read_bytes()
    row = {"id": "1", "instruction": "x", "image": struct(source(1)), "image_target": struct(b"")}
    table = write_parquet(tmp_path / "p.parquet", [row]).read_bytes()
    for name, data, complaint in (
        ("a.tar.gz", gzip.compress(tar), r"a tar compressed with gzip.*\(gzip -dk a\.tar\.gz\)"),
        ("a.tgz", gzip.compress(tar), "a tar compressed with gzip"),
        ("a.tar", bz2.compress(tar), "a tar compressed with bz2"),
        ("a", zstd(tar), "a tar compressed with zstd"),
        ("a.parquet.xz", lzma.compress(table), "a table compressed with xz"),
        ("a.gz", gzip.compress(gzip.compress(b"{}")), "compressed twice"),
        ("a.json", zipped("x.json"), r"a zip archive: unpack it first \(unzip\)"),
        ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(50), "a 7z archive"),
    ):
        check_refused(tmp_path / name, data, complaint)
    for name in ("a.tar.gz", "b.TGZ", "c.tar", "d.parquet.gz"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(gzip.compress(tar))
        with pytest.raises(InputError, match="compressed with gzip"):
            opened(folder)
        with pytest.raises(InputError, match="compressed with gzip"):
            lines = tmp_path / "l.jsonl"
            lines.write_text('{"image_path": "k"}\n')
            media = sources.MediaConfig(uri=str(folder), key="k")
            sources.from_records(str(lines), IMAGES, None, 2, media=media)


def test_a_folder_of_other_things_says_what_to_do(tmp_path: Path) -> None:
    for name, advice in (("a.jsonl.gz", "read by its own address, such as"), ("a.zip", "unpacked")):
        folder = tmp_path / name[:3]
        folder.mkdir()
        (folder / name).write_bytes(b"x")
        with pytest.raises(InputError, match=f"there are no .parquet.*{advice}"):
            opened(folder)
        with pytest.raises(InputError, match=f"there are no images in .*{advice}"):
            sources.images_from_folder(str(folder), None, 2)


def test_an_archive_beside_what_came_out_of_it_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(source(1))
    (tmp_path / "all.tar.gz").write_bytes(gzip.compress(b"x"))
    (row,) = read(ingest.open_source(IngestConfig(out="o", images=str(tmp_path))))
    assert row["image"] == source(1)
    write_parquet(tmp_path / "t" / "a.parquet", [{"id": "1", "image": struct(source(2))}])
    (tmp_path / "t" / "all.tgz").write_bytes(gzip.compress(b"x"))
    assert [row["image"] for row in read(opened(tmp_path / "t", IMAGES))] == [source(2)]
    (tmp_path / "t" / "b.parquet.gz").write_bytes(gzip.compress(b"x"))
    with pytest.raises(InputError, match=r"b\.parquet\.gz is a container compressed with gzip"):
        opened(tmp_path / "t", IMAGES)


def test_tables_and_tars_whatever_they_are_called(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"p{n}",
            "instruction": "Add a box.",
            "image": struct(source(n)),
            "image_target": struct(target(n)),
        }
        for n in range(3)
    ]
    table = write_parquet(tmp_path / "p.parquet", rows)
    stream = tmp_path / "p.arrow"
    held = pa.table({name: [row[name] for row in rows] for name in rows[0]})
    with pa.OSFile(str(stream), "wb") as file, pa.ipc.new_stream(file, held.schema) as out:
        out.write_table(held)
    feather = tmp_path / "p.feather"
    with pa.OSFile(str(feather), "wb") as file, pa.ipc.new_file(file, held.schema) as out:
        out.write_table(held)
    for path in (table, stream, feather):
        for name in ("x.pq", "x.json", "x.arrow", "x.parquet", "x"):
            (tmp_path / name).write_bytes(path.read_bytes())
            found = read(opened(tmp_path / name, rows_per_range=2))
            assert [row["id"] for row in found] == ["p0", "p1", "p2"]
            assert [row["image"] for row in found] == [source(n) for n in range(3)]
    tar = write_tar(tmp_path / "p.tar", pair_samples(range(3)))
    for name in ("x.tar", "x.TAR", "x.json", "x"):
        (tmp_path / name).write_bytes(tar.read_bytes())
        found = read(opened(tmp_path / name, rows_per_range=2))
        assert [row["id"] for row in found] == [f"x/0000{n}" for n in range(3)]
        assert {row["outcome"] for row in found} == {"kept"}


def test_a_table_of_media_whatever_it_is_called(tmp_path: Path) -> None:
    table = write_parquet(tmp_path / "m.parquet", [{"uid": "k", "image": struct(source(1))}])
    table.rename(tmp_path / "m.pq")
    (tmp_path / "l.jsonl").write_text('{"image_path": "k"}\n')
    media = sources.MediaConfig(uri=str(tmp_path / "m.pq"), key="uid")
    made = sources.from_records(str(tmp_path / "l.jsonl"), IMAGES, None, 2, media=media)
    assert [row["image"] for row in read(made)] == [source(1)]
    media = sources.MediaConfig(uri=str(tmp_path / "l.jsonl"))
    with pytest.raises(InputError, match=r"l\.jsonl is neither a tar nor Parquet or Arrow"):
        sources.from_records(str(tmp_path / "l.jsonl"), IMAGES, None, 2, media=media)


def test_a_walk_holds_one_value_and_not_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "_AT_ONCE", 16)
    values: list[Any] = [{"a": "x" * n, "b": [n, -n / 3, 1e300, None, 'é\\"']} for n in range(60)]
    values += [10**n for n in range(40)]  # a number that is cut short is a number as well
    text = json.dumps(values, ensure_ascii=False).encode()
    asked: list[int] = []
    file = io.BytesIO(text)

    def some(size: int) -> bytes:
        asked.append(size)
        return file.read(size)

    found = list(Walk(some).items())
    assert [json.loads(text[start : start + len(of)]) for start, of, _ in found] == values
    assert max(asked) < 400 < len(text) / 10


def test_a_value_without_end_is_not_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "_AT_ONCE", 16)
    monkeypatch.setattr(json_values, "_LONGEST", 1000)
    read_so_far = 0

    def endless(size: int) -> bytes:
        nonlocal read_so_far
        read_so_far += size
        return b'"' + b"x" * (size - 1) if read_so_far == size else b"x" * size

    with pytest.raises(InputError, match="a value of over 1,000 bytes"):
        Walk(endless).value()
    assert read_so_far < 4000


def test_a_layout_tells_a_record_from_what_is_around_records(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    own = {"input_image": "image/0_source.png", "output_image": "image/0_target.png"}
    item = {**own, "input_prompt": "Add it.", "turns": [{"a": 1}]}
    (tmp_path / "a.json").write_text(json.dumps(item))
    layout = load_layout("sharegpt-4o-image", pairs=True)
    (row,) = read(sources.from_records(str(tmp_path / "a.json"), layout, None, 2))
    assert row["outcome"] == "kept"
    assert PAIRS.required != layout.required
