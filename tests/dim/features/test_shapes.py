"""Which shape a sample has, told by columns, headers or latents, and never by decoded pixels."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFile

from dim import images, records
from dim.errors import InputError
from dim.features.row_groups import RowGroups
from dim.features.shapes import shape_ids, sizes
from dim.features.shards import ImageShards
from dim.images import encode_jpeg
from dim.model.sizes import nearest_shape, shapes
from infra.samples import open_features, open_images
from tests.datasets import png, write_dataset
from tests.image_files import exif

SIZES = [(640, 480), (480, 640), (512, 512), (1000, 100), (100, 1000), (333, 500), (1, 1)]


def folder_of(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> str:
    return write_dataset(folder, rows, schema)


def edits(sides: list[tuple[int | None, int | None]], image: bytes = b"") -> list[dict[str, Any]]:
    return [
        {"id": f"e{n}", "index": n, "source": "s", "image": image, "width": w, "height": h}
        for n, (w, h) in enumerate(sides)
    ]


@pytest.fixture(autouse=True)
def no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(images, "_decode", refuse)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)


@pytest.mark.parametrize(("resolution", "cell"), [(1024, 32), (512, 32), (64, 16), (64, 8)])
def test_ids_are_those_of_the_shapes_that_an_edit_is_painted_in(resolution: int, cell: int) -> None:
    # every ratio of a grid, so that each tie and each end of the table is met
    sides = [(width, height) for width in range(8, 200, 7) for height in range(8, 200, 5)]
    table = pa.table(
        {
            "width": pa.array([w for w, _ in sides], pa.int32()),
            "height": pa.array([h for _, h in sides], pa.int32()),
        }
    )
    ids = shape_ids(table, resolution, cell)
    assert ids.dtype == np.int16
    found = [sizes(resolution, cell)[number] for number in ids]
    assert found == [nearest_shape(size, resolution, cell) for size in sides]
    assert set(sizes(resolution, cell)) == set(shapes(resolution, cell).values())


def test_no_two_sizes_have_one_ratio() -> None:
    for resolution in (32, 64, 96, 128, 256, 384, 512, 640, 768, 1024, 1536, 2048):
        for cell in (4, 8, 16, 32, 64):
            ratios = {width / height for width, height in sizes(resolution, cell)}
            assert len(ratios) == len(sizes(resolution, cell))


def test_columns_tell_all_and_no_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = folder_of(tmp_path / "edits", edits(list(SIZES)), records.EDIT)
    read = pq.ParquetFile.read
    asked: list[Any] = []

    def watched(self: pq.ParquetFile, columns: Any = None, **options: Any) -> pa.Table:
        asked.append(columns)
        return read(self, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read", watched)
    monkeypatch.delattr(pq.ParquetFile, "iter_batches")
    ids = shape_ids(open_images([uri], ["id", "image"]), 1024, 32)
    assert [sizes(1024, 32)[n] for n in ids] == [nearest_shape(s, 1024, 32) for s in SIZES]
    assert asked == [["width", "height"]] * 2  # one a file


def test_headers_tell_where_columns_do_not(tmp_path: Path) -> None:
    wide = encode_jpeg(Image.new("RGB", (96, 32)))
    turned = Image.new("RGB", (96, 32))
    turned.save(tmp_path / "turned.jpg", exif=exif(6))
    rows = edits([(None, None), (64, 64), (0, 64), (None, 64), (None, None), (None, None)])
    pictures = [wide, wide, png(Image.new("RGB", (32, 96))), wide, b"no picture", None]
    for row, picture in zip(rows, pictures, strict=True):
        row["image"] = picture
    rows[3]["image"] = (tmp_path / "turned.jpg").read_bytes()
    uri = folder_of(tmp_path / "edits", rows, records.EDIT)
    ids = shape_ids(open_images([uri], ["id", "image"]), 64, 8)
    wide_one, tall_one = nearest_shape((3, 1), 64, 8), nearest_shape((1, 3), 64, 8)
    square = (64, 64)
    wanted = [wide_one, square, tall_one, tall_one, square, square]
    assert [sizes(64, 8)[number] for number in ids] == wanted


def test_data_without_columns_of_sides(tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string()), ("image", pa.binary()), ("width", pa.string())])
    schema = schema.append(pa.field("height", pa.string()))
    wide = encode_jpeg(Image.new("RGB", (96, 32)))
    rows = [{"id": "a", "image": wide, "width": "7", "height": "7"}] * 3
    shards = open_images([folder_of(tmp_path / "odd", rows, schema)], ["id", "image"])
    assert {sizes(64, 8)[n] for n in shape_ids(shards, 64, 8)} == {nearest_shape((3, 1), 64, 8)}


def features(latents: list[list[int] | None], folder: Path) -> str:
    schema = records.features_schema("t2i", ["caption"], encoding="bf16", preparation="{}")
    rows = [
        {"id": f"f{n}", "index": n, "source": "s", "latent_shape": shape}
        for n, shape in enumerate(latents)
    ]
    return folder_of(folder, rows, schema)


def test_latents_tell_their_shape_whatever_the_autoencoder(tmp_path: Path) -> None:
    wanted = list(sizes(64, 16))
    for factor in (16, 8, 4):  # cells of one, two and four latent cells
        latents: list[list[int] | None] = [[8, h // factor, w // factor] for w, h in wanted]
        uri = features([*latents, None], tmp_path / str(factor))
        ids = shape_ids(open_features([uri], ["caption"], edits=False), 64, 16)
        assert [sizes(64, 16)[number] for number in ids] == [*wanted, (64, 64)]


@pytest.mark.parametrize(
    ("shape", "said"),
    [([8, 3, 7], "a latent of 7x3 cells is none of the shapes"), ([8, 0, 4], "cannot be")],
)
def test_a_latent_of_no_shape_is_named(tmp_path: Path, shape: list[int], said: str) -> None:
    shards = open_features([features([[8, 8, 8], shape], tmp_path / "f")], ["caption"], edits=False)
    with pytest.raises(InputError, match=rf"part-00001\.parquet: .*{said}"):
        shape_ids(shards, 64, 8)


def test_the_rows_of_a_damaged_file_are_squares_until_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "edits"
    uri = folder_of(folder, edits([(300, 100)] * 4), records.EDIT)
    manifest = json.loads((folder / "manifest.json").read_text())
    broken = folder / manifest["files"][1]["path"]
    data = bytearray(broken.read_bytes())
    data[4:-200] = bytes(len(data) - 204)
    broken.write_bytes(data[:-8] + bytes(8))
    manifest["files"][1]["sha256"] = hashlib.sha256(broken.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("dim.features.row_groups._TRIES_OF_DAMAGE", 1)
    shards = open_images([uri], ["id", "image"], every_file=False)
    assert isinstance(shards, ImageShards) and isinstance(shards.groups, RowGroups)
    found = [sizes(64, 8)[number] for number in shape_ids(shards, 64, 8)]
    wide = nearest_shape((3, 1), 64, 8)
    assert found == [wide, wide, (64, 64), (64, 64)]
