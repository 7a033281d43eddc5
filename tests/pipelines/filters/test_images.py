from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from dim import records
from dim.config import load_config
from dim.errors import ConfigError
from pipelines.filters import FilterImages, ImageRules
from pipelines.filters.measures import SSIM_WINDOW
from pipelines.outcome import Rejection, Row
from pipelines.readers.records import image_columns
from tests.image_files import chunk, exif, packed_text, with_chunks, xmp
from tests.pipelines.samples import encoded, photo

RULES = ImageRules(min_side=32)
SIDE = 96


def table(*images: bytes) -> pa.Table:
    """Raw images; the header columns are not looked at."""
    rows = [
        {"id": str(n), "index": n, "source": "t", "image": image} for n, image in enumerate(images)
    ]
    return pa.Table.from_pylist(rows, schema=records.RAW_IMAGE)


def filtered(*images: bytes, rules: ImageRules = RULES) -> list[Row]:
    return FilterImages(rules)(table(*images)).to_pylist()


def outcomes(rows: list[Row]) -> list[str]:
    return [row["reason"] or row["outcome"] for row in rows]


def detailed(size: tuple[int, int] = (SIDE, SIDE), seed: int = 0) -> Image.Image:
    """A picture with detail at every scale."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 80, (*size[::-1], 3), dtype=np.uint8))
    return Image.blend(photo(seed, size), noise, 0.3)


def written(image: Image.Image, step: int) -> Image.Image:
    """``image`` with lines of text from top to bottom, ``step`` pixels apart."""
    result = image.copy()
    draw = ImageDraw.Draw(result)
    font = ImageFont.load_default(16)
    for top in range(8, image.height - 20, step):
        draw.text((10, top), "The quick brown fox jumps over it again " * 2, "black", font)
    return result


def test_one_pass_gives_every_reason() -> None:
    page = Image.new("RGB", (512, 512), "white")
    rows = filtered(
        encoded(detailed()),
        encoded(detailed((20, 20))),
        encoded(detailed((400, 40))),
        encoded(Image.new("RGB", (SIDE, SIDE), (200, 10, 10))),
        encoded(photo(3, (512, 512)).filter(ImageFilter.GaussianBlur(8))),
        encoded(written(page, 24)),
        encoded(written(detailed((512, 512)), 400)),
        b"<html>not found</html>",
        b"",
    )
    assert outcomes(rows) == [
        "kept",
        "image.too_small",
        "image.aspect",
        "image.blank",
        "image.blurred",
        "image.text",
        "kept",
        "image.undecodable",
        "image.undecodable",
    ]
    assert all(row["image"] is None for row in rows[1:6])
    blank = rows[3]
    assert (blank["value"], blank["threshold"]) == (0.0, 1.5)


def test_noise_on_a_blank_picture_is_no_content() -> None:
    noise = np.random.default_rng(0).normal(200, 1.5, (600, 600, 3)).astype(np.uint8)
    assert outcomes(filtered(encoded(Image.fromarray(noise)))) == ["image.blank"]


def test_null_switches_a_filter_off_and_saves_its_time() -> None:
    rules = load_config(
        ImageRules, None, ["min_side=null", "min_entropy=null", "min_sharpness=null"]
    )
    (row,) = filtered(encoded(Image.new("RGB", (20, 20))), rules=rules)
    assert row["outcome"] == "kept"
    measured = {measure["name"] for measure in row["measures"]}
    assert measured == {"pixels", "aspect", "side", "text_area"}  # a header costs nothing
    with pytest.raises(ConfigError, match="belong together"):
        load_config(ImageRules, None, ["aesthetic_model=x"])


def test_every_colour_model_is_brought_to_rgb() -> None:
    picture = detailed()
    grey16 = Image.fromarray(np.asarray(picture.convert("L"), np.uint16) * 257)
    animated = io.BytesIO()
    frames = [detailed(seed=seed) for seed in range(3)]
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    transparent = picture.convert("RGBA")
    transparent.putalpha(200)
    rows = filtered(
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(grey16),
        encoded(picture.quantize(64)),
        encoded(picture.convert("L"), "JPEG"),
        encoded(picture.convert("1")),
        encoded(transparent),
        animated.getvalue(),
        encoded(picture, "WEBP"),
    )
    assert outcomes(rows) == ["kept"] * 8
    assert {m["value"] for row in rows for m in row["measures"] if m["name"] == "side"} == {SIDE}


def test_samples_without_a_range_are_refused() -> None:
    floats = Image.fromarray(np.random.default_rng(0).random((SIDE, SIDE)).astype(np.float32))
    (row,) = filtered(encoded(floats, "TIFF"))
    assert row["reason"] == "image.undecodable" and "32-bit samples" in row["detail"]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.98])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_files_are_rejected(share: float, kind: str) -> None:
    whole = encoded(detailed((256, 256)), kind)
    (row,) = filtered(whole[: int(len(whole) * share)])
    assert row["reason"] == "image.undecodable" and row["detail"]


def test_a_bomb_is_refused_by_its_header() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    def png(side: int) -> bytes:
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"")), chunk(b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    rows = filtered(png(17_500), png(8_000))  # beyond Pillow's limit, and only beyond ours
    assert outcomes(rows) == ["image.too_large"] * 2
    assert (rows[1]["value"], rows[1]["threshold"]) == (64e6, 50e6)


def test_rotation_counts_for_shape_and_content() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (row,) = filtered(encoded(detailed((90, 60)), "JPEG", exif=exif))
    assert row["outcome"] == "kept"
    columns = image_columns(encoded(detailed((90, 60)), "JPEG", exif=exif), None)
    assert (columns["width"], columns["height"]) == (60, 90)


@pytest.mark.parametrize(
    "image",
    [
        encoded(detailed((90, 60)), exif=exif(6)),
        with_chunks(
            encoded(detailed((90, 60))), chunk(b"eXIf", exif(8).tobytes()[6:]), behind=True
        ),
        encoded(detailed((90, 60)), "WEBP", exif=exif(5)),
        encoded(detailed((90, 60)), "WEBP", xmp=xmp(7)),
        encoded(detailed((90, 60)), "TIFF", tiffinfo={0x0112: 6}),
        encoded(detailed((90, 60)), "TIFF", tiffinfo={700: xmp(6)}),
        encoded(detailed((90, 60)), "MPO", exif=exif(6), save_all=True, append_images=[photo(1)]),
    ],
)
def test_records_have_the_size_of_the_upright_image(
    image: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = ImageRules(min_side=60, max_aspect=1.5)
    assert outcomes(filtered(image, rules=rules)) == ["kept"]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    columns = image_columns(image, None)
    assert (columns["width"], columns["height"]) == (60, 90)


def test_metadata_never_decide_whether_pixels_are_good() -> None:
    long = packed_text(b"history " * 200_000)
    good = encoded(detailed())
    rows = filtered(with_chunks(good, long), with_chunks(good, long, behind=True))
    assert outcomes(rows) == ["kept"] * 2
    assert image_columns(with_chunks(good, long), None)["width"] == SIDE


def test_a_format_that_is_not_read_is_refused_before_it_is_stored() -> None:
    with pytest.raises(Rejection, match="formats: PNG, JPEG") as caught:
        image_columns(encoded(detailed(), "PPM"), None)
    assert caught.value.reason == "image.undecodable"


def test_an_image_smaller_than_any_window_does_not_stop_a_batch() -> None:
    tiny = encoded(Image.new("RGB", (SSIM_WINDOW - 2, 9)))
    rules = ImageRules(min_side=None, max_aspect=None)
    assert outcomes(filtered(tiny, encoded(detailed()), rules=rules)) == [
        "image.undecodable",
        "kept",
    ]
