from __future__ import annotations

import io

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from dim import provenance
from dim.images import decode_image, encode_png

SAID = {"model": "edit2", "seed": "7", "note": 'é ☂ \\ "quoted"'}


def written(format: str, values: dict[str, str], **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", (16, 16), (10, 200, 30))
    image.save(buffer, format=format, **provenance.save_options(format, values), **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "options"), [("png", {}), ("jpeg", {}), ("webp", {"lossless": True}), ("webp", {})]
)
def test_what_is_written_is_read(format: str, options: dict) -> None:
    data = written(format, SAID, **options)
    assert provenance.read(data) == SAID
    assert decode_image(data).size == (16, 16)
    assert provenance.read(written(format, {}, **options)) is None


def test_the_pixels_stay_the_same() -> None:
    assert (
        decode_image(written("png", SAID)).tobytes() == decode_image(written("png", {})).tobytes()
    )


def with_text(text: str) -> bytes:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(provenance.KEY, text)
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def described(text: str) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = text
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, format="JPEG", exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"rubbish",
        encode_png(Image.new("RGB", (16, 16))),
        with_text("no JSON"),
        with_text("[1]"),
        with_text('{"model": 3}'),
        with_text('{"seed": "1"}'),
        with_text("[" * 100_000),
        described("a day at the sea"),
        written("png", SAID)[:60],
    ],
    ids=range(10),
)
def test_what_is_not_ours_says_nothing(data: bytes) -> None:
    assert provenance.read(data) is None
