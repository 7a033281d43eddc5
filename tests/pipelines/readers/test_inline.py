"""Images that stand in a record as text, and messages that never quote them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim.errors import InputError
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.outcome import Rejection, fail, reject
from pipelines.readers import inline
from tests.pipelines.containers import source, target, write_lines, write_tar
from tests.pipelines.readers.test_containers import read
from tests.pipelines.samples import encoded, photo

Row = dict[str, Any]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


WAYS: list[Callable[[bytes], Any]] = [
    lambda data: f"data:image/png;base64,{b64(data)}",
    lambda data: f" DATA:image/PNG; charset=utf-8;BASE64,{b64(data)}\n",
    lambda data: f"data:;base64,{urlsafe(data)}",
    lambda data: "data:image/png;base64," + b64(data).replace("+", "%2B").replace("=", "%3D"),
    lambda data: "data:image/png," + "".join(f"%{byte:02X}" for byte in data),
    b64,
    urlsafe,
    lambda data: base64.encodebytes(data).decode(),
    lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n"),
    lambda data: str(base64.b64encode(data)),
    lambda data: {"bytes": b64(data), "path": None},
    lambda data: {"bytes": None, "base64": urlsafe(data)},
    lambda data: {"b64_json": b64(data)},
    lambda data: {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(data)}"}},
    lambda data: {"type": "Buffer", "data": list(data)},
    lambda data: [f"data:image/png;base64,{b64(data)}"],
    lambda data: [{"bytes": b64(data), "path": "a.png"}],
]


def ingested(folder: Path, *rows: Row, **more: Any) -> list[Row]:
    path = write_lines(folder / "pairs.jsonl", rows)
    return read(ingest.open_source(IngestConfig(out="o", pairs=str(path), **more)))


@pytest.mark.parametrize("number", range(len(WAYS)))
def test_an_image_given_as_text(number: int, tmp_path: Path) -> None:
    write = WAYS[number]
    row = {"id": "1", "prompt": "Add it.", "image": write(source(1))}
    (found,) = ingested(tmp_path, {**row, "image_target": write(target(1))})
    assert (found["outcome"], found["error"]) == ("kept", None)
    assert (found["image"], found["image_target"]) == (source(1), target(1))
    assert len(found["provenance"]) < 300


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF"])
def test_bare_base64_is_told_by_how_its_image_begins(format: str) -> None:
    data = encoded(photo(1), format)
    for write in (b64, urlsafe):
        assert inline.is_image_text(write(data))
        assert inline.decoded(write(data)) == data
        assert inline.decoded(write(data).encode()) == data


@pytest.mark.parametrize(
    "name",
    [
        "image/a.png",
        "9j/4AAQSkZJRg/a-name-that-begins-as-a-photograph-does-in-base64",
        "Qk1abcdefghijklmnopqrstuvwxyz",
        "iVBORw0KGgo.png",
        "0123456789abcdef" * 4,
        "data/image/a.png",
        "",
    ],
)
def test_names_are_no_images(name: str) -> None:
    assert not inline.is_image_text(name)
    assert inline.decoded(name) == name
    assert inline.held({"bytes": None, "path": name}) == (name or None)


def test_in_parquet_and_in_a_tar(tmp_path: Path) -> None:
    text = b64(source(1)).encode()
    more = {"prompt": "Add it.", "image_target": b64(target(1))}
    rows = [
        {**more, "id": "text", "image": text},
        {**more, "id": "uri", "image": b"data:image/png;base64," + text},
        {**more, "id": "bytes", "image": source(1)},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read(ingest.open_source(IngestConfig(out="o", pairs=str(tmp_path / "a.parquet"))))
    assert [(row["id"], row["image"]) for row in found] == [
        (name, source(1)) for name in ("text", "uri", "bytes")
    ]
    sample = {**more, "image": b64(source(1))}
    write_tar(tmp_path / "a.tar", [("1.json", json.dumps(sample).encode())])
    (row,) = read(ingest.open_source(IngestConfig(out="o", pairs=str(tmp_path / "a.tar"))))
    assert (row["image"], row["image_target"]) == (source(1), target(1))


def test_with_media_an_image_given_as_text_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "k.png").write_bytes(source(2))
    row = {"image": b64(source(1)), "image_target": "k", "prompt": "Add it."}
    path = write_lines(tmp_path / "pairs.jsonl", [row])
    config = IngestConfig(out="o", pairs=str(path), media={"uri": str(tmp_path / "media")})
    made = ingest.open_source(config)
    (found,) = read(made)
    assert (found["image"], found["image_target"]) == (source(1), source(2))
    assert made.identity["keys_unmatched"] == 0
    assert all(len(each["places"]) < 100 for each in made.ranges)


LONG = 600_000


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("x" * LONG, "cannot be the name of a file"),
        (b64(b"<html>" * 100_000), "cannot be the name of a file"),
        ("a/" * LONG, "cannot be the name of a file"),
        ("http://example.org/" + "x" * LONG, "too long for a URL"),
        ("s3://b/" + "x" * LONG, "cannot be the name of a file"),
        ("/9j/" + "A" * LONG + "!", "'image' holds base64 that is damaged"),
        ("data:image/png;base64," + "A" * LONG + "=A", "'image' holds base64 that is damaged"),
        ("data:image/png;base64", "'image' holds a data: URI without data"),
        ({"bytes": "x" * LONG}, "the source is not an image"),
        ({"bytes": "é" * LONG}, "'image' holds base64 that is damaged"),
        (f"data:text/html,{'x' * LONG}", "the source is not an image"),
        ({"path": "x" * LONG}, "cannot be the name of a file"),
        (["x"] * LONG, "holds 600000 images"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"fetch": {}}])
def test_what_is_no_image_is_one_short_sentence(
    image: Any, said: str, more: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "t.png").write_bytes(target(1))
    row = {"id": "1", "image": image, "image_target": "t.png", "prompt": "Add it."}
    (found,) = ingested(tmp_path, row, **more)
    sentence = found["error"] or found["detail"]
    assert said in sentence and len(sentence) < 400
    assert len(found["provenance"]) < 400


def test_no_other_value_is_quoted_in_full_either(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(source(1))
    good = {"image": "a.png", "image_target": "a.png", "prompt": "Add it."}
    rows = [
        {**good, "id": "i" * LONG},
        {**good, "id": "i" * LONG},
        {**good, "prompt": ["p" * LONG]},
        {**good, "id": {"a": "i" * LONG, "b": 1}},
        {**good, "image": {"image": "p" * LONG}},
    ]
    for row in ingested(tmp_path, *rows)[1:]:
        sentence = row["error"] or row["detail"]
        assert sentence and len(sentence) < 400
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "k.png").write_bytes(source(2))
    media = {"uri": str(tmp_path / "media")}
    (row,) = ingested(tmp_path, {**good, "image": "k" * LONG}, media=media)
    assert row["reason"] == "record.unmatched_key" and len(row["detail"]) < 400


def test_no_sentence_of_any_stage_is_stored_in_full_if_it_is_very_long() -> None:
    row: Row = {"outcome": "kept"}
    fail(row, "stage", InputError("x" * LONG))
    assert len(row["error"]) < 3000 and row["error"].endswith("(600,000 characters)")
    reject(row, Rejection("a.b", "x" * LONG))
    assert len(row["detail"]) < 3000
