from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dim import records, tabletop
from dim.blueprint import Blueprint
from dim.errors import InputError, StorageError
from pipelines.readers import sources
from pipelines.readers.layout import load_layout
from pipelines.readers.sources import Source
from pipelines.readers.tabletop import TabletopConfig
from tests.pipelines.samples import edited, encoded, photo, read_here, write_pairs


def read(source: Source) -> list[dict]:
    """All records of a source, range by range."""
    return pa.concat_tables(read_here(source)).to_pylist()


def from_pairs(uri: str, rows_per_range: int = 3, layout: str = "pairs", **more: Any) -> Source:
    return sources.from_records(uri, load_layout(layout, pairs=True), None, rows_per_range, **more)


def pairs(path: Path, rows_per_file: int = 3) -> Source:
    return from_pairs(str(path), rows_per_file)


def test_pairs_from_the_public_form(tmp_path: Path) -> None:
    rows = read(pairs(write_pairs(tmp_path, 7)))
    assert [row["id"] for row in rows] == [f"pair-{n}" for n in range(7)]
    assert [row["index"] for row in rows] == list(range(7))
    row = rows[4]
    source = (tmp_path / "image" / "4_source.png").read_bytes()
    assert row["image"] == source
    assert row["image_hash"] == records.sha256_hex(source)
    assert (row["width"], row["height"], row["source"]) == (64, 48, "pairs")
    assert row["instruction"] == "Add red box number 4."
    assert json.loads(row["provenance"]) == {
        "file": str(tmp_path / "pairs.jsonl"),
        "line": 5,
        "image_path": "image/4_source.png",
        "image_path_target": "image/4_target.png",
    }
    assert all(row["outcome"] == "kept" for row in rows)


def test_ranges_are_cut_by_lines_whatever_is_between_them(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 5)
    plain = read(pairs(path))
    path.write_text("\n\n" + path.read_text().replace("\n", "\r\n\n  \n").rstrip())
    source = pairs(path, rows_per_file=2)
    assert [each["first"] for each in source.ranges] == [0, 2, 4]
    spaced = read(source)
    assert [row["content_hash"] for row in spaced] == [row["content_hash"] for row in plain]
    assert [json.loads(row["provenance"])["line"] for row in spaced] == [3, 6, 9, 12, 15]


def test_a_bad_line_fails_by_itself_and_says_its_number(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 2)
    good = json.loads(path.read_text().splitlines()[0])
    bad = [
        "{not json",
        "[1, 2]",
        json.dumps({**good, "id": "no-target", "image_path_target": "image/gone.png"}),
        json.dumps({key: good[key] for key in good if key != "image_path"} | {"id": "no-source"}),
        json.dumps({**good, "id": "number", "prompt": 3}),
        json.dumps({**good, "id": "folder", "image_path": "image"}),
        json.dumps({**good, "id": "nul", "image_path": "a\0b"}),
        "[" * 100_000,
    ]
    path.write_text(
        path.read_text()
        + "\n".join(bad)
        + "\n\udcff".encode("utf-8", "surrogateescape").decode("latin-1")
    )
    rows = read(pairs(path, rows_per_file=100))
    failed = [row for row in rows if row["outcome"] == "failed"]
    assert len(rows) == 11 and len(failed) == 9
    assert [row["error"].partition(":")[0] for row in failed] == [f"line {n}" for n in range(3, 12)]
    errors = [row["error"] for row in failed]
    assert "not JSON" in errors[0]
    assert "a JSON list where an object was expected" in errors[1]
    assert "not found" in errors[2] and "gone.png" in errors[2]
    assert "no 'image_path' or 'image'" in errors[3]
    assert "'prompt' must be a text, not 3" in errors[4]
    assert all(row["stage"] == "ingest" and row["image"] is None for row in failed)
    assert failed[0]["id"] == "pairs-00000002" and failed[2]["id"] == "no-target"


def test_an_image_that_is_none_is_rejected(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 2)
    (tmp_path / "image" / "1_target.png").write_bytes(b"<html>404</html>")
    first, second = read(pairs(path))
    assert first["outcome"] == "kept"
    assert (second["outcome"], second["reason"]) == ("rejected", "image.undecodable")


def test_repeated_ids_are_rejected_but_for_the_first(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 5)
    path.write_text(
        path.read_text().replace('"pair-3"', '"pair-1"').replace('"pair-4"', '"pair-1"')
    )
    rows = read(pairs(path, rows_per_file=2))
    assert [row["reason"] for row in rows] == [None, None, None, *["record.repeated_id"] * 2]


def test_a_blueprint_as_prompt_gives_its_first_section(tmp_path: Path) -> None:
    plan = Blueprint("Add a hat.", "b", "c", "d", "e").render()
    (row,) = read(pairs(write_pairs(tmp_path, 1, prompt=plan)))
    assert row["instruction"] == "Add a hat."


def test_ids_may_be_numbers_or_missing(tmp_path: Path) -> None:
    path = write_pairs(tmp_path, 2)
    path.write_text(path.read_text().replace('"pair-0"', "17").replace('"id": "pair-1", ', ""))
    assert [row["id"] for row in read(pairs(path))] == ["17", "pairs-00000001"]


def test_images_from_lines_and_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.jpg").write_bytes(encoded(photo(1), "JPEG"))
    (tmp_path / "in" / "deep" / "a.PNG").write_bytes(encoded(photo(2)))
    (tmp_path / "in" / "broken.png").write_bytes(b"?")
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    rows = read(sources.images_from_folder(str(tmp_path / "in"), None, 2))
    assert [row["id"] for row in rows] == ["b", "broken", "deep/a"]
    assert [row["outcome"] for row in rows] == ["kept", "rejected", "kept"]
    assert rows[0]["source"] == "in"

    lines = [{"image_path": "b.jpg", "caption": "a photo"}, {"id": 5, "image": "deep/a.PNG"}]
    path = tmp_path / "in" / "list.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read(sources.from_records(str(path), load_layout("images", pairs=False), "mine", 10))
    assert [(row["id"], row["caption_hint"]) for row in rows] == [
        ("mine-00000000", "a photo"),
        ("5", None),
    ]


def test_missing_and_empty_inputs_say_so(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="not found: .*nowhere.jsonl"):
        pairs(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(InputError, match="empty.jsonl is empty"):
        pairs(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="there are no images in"):
        sources.images_from_folder(str(tmp_path), None, 5)


def test_images_from_elsewhere(tmp_path: Path, s3: str) -> None:
    from infra import storage

    source = photo(1)
    storage.write_bytes(f"{s3}/a.png", encoded(source))
    (tmp_path / "b.png").write_bytes(encoded(edited(source)))
    line = {
        "image_path": f"{s3}/a.png",
        "image_path_target": str(tmp_path / "b.png"),
        "prompt": "x",
    }
    storage.write_bytes(f"{s3}/lists/pairs.jsonl", json.dumps(line).encode())
    (row,) = read(from_pairs(f"{s3}/lists/pairs.jsonl", 5, read_from=[s3, str(tmp_path)]))
    assert row["outcome"] == "kept" and row["width"] == 64
    (row,) = read(from_pairs(f"{s3}/lists/pairs.jsonl", 5, read_from=[s3]))
    assert row["outcome"] == "failed" and f"read_from=[{tmp_path}]" in row["error"]


def tabletop_source(count: int, rows_per_file: int) -> Source:
    world = TabletopConfig(
        seed=3, size=32, kinds=("remove", "move"), referential=0.5, objects=(3, 4), outlines=1.0
    )
    return sources.from_tabletop(world, count, rows_per_file, pairs=True)


def test_tabletop_records_depend_on_seed_and_place_only() -> None:
    rows = read(tabletop_source(9, 4))
    assert read(tabletop_source(9, 2)) == rows
    assert [row["id"] for row in rows][:2] == ["tabletop-3-000000", "tabletop-3-000001"]
    world = json.loads(rows[0]["provenance"])["tabletop"]
    assert world["kind"] in ("remove", "move")
    scene = tabletop.Scene.from_json(json.dumps(world["source_scene"]))
    assert rows[0]["image"] == encoded(tabletop.render(scene, 32))
    assert len(scene.objects) in (3, 4) and scene.style == "outline"
    understood = tabletop.understand(scene, rows[0]["instruction"])
    assert understood.target == tabletop.Scene.from_json(json.dumps(world["target_scene"]))


def test_tabletop_images_come_with_captions() -> None:
    world = TabletopConfig(seed=1, size=48, objects=(2, 3), outlines=0.5)
    rows = read(sources.from_tabletop(world, 5, 2, pairs=False))
    assert len(rows) == 5
    for row in rows:
        scene = json.loads(row["provenance"])["tabletop"]["scene"]
        assert row["caption_hint"] == tabletop.caption(tabletop.Scene.from_json(json.dumps(scene)))
        assert row["width"] == row["height"] == 48
