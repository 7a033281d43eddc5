from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dim.errors import InputError
from dim.images import decode_image, encode_png, parse_size, read_image, save_png


def gradient(mode: str = "RGB") -> Image.Image:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))
    return Image.fromarray(np.stack([ramp, ramp[:, ::-1], ramp // 2], axis=-1)).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats_come_back_as_they_were(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    image = decode_image(encoded(gradient(), format, **options))
    assert image.mode == "RGB"
    assert np.array_equal(pixels(image), pixels(gradient()))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_colour_model_becomes_rgb(mode: str) -> None:
    format = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    image = decode_image(encoded(gradient(mode), format))
    assert (image.mode, image.size) == ("RGB", (64, 48))
    reference = pixels(gradient(mode).convert("RGB"))
    assert np.abs(pixels(image) - reference).mean() < 3


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((255, 0, 0, 128), (0, 0, 8, 16))
    left, right = pixels(decode_image(encoded(image)))[8, [4, 12]]
    assert right.tolist() == [255, 255, 255]
    assert abs(left - [255, 127, 127]).max() <= 1


def test_transparent_palettes_are_laid_on_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([10, 20, 30])
    shown = decode_image(encoded(image, transparency=0))
    assert pixels(shown)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format: str) -> None:
    values = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)
    image = decode_image(encoded(Image.fromarray(values), format))
    assert np.array_equal(pixels(image)[..., 0], values >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int) -> None:
    turn_back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = gradient()
    if orientation in turn_back:
        stored = stored.transpose(turn_back[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encoded(stored, exif=exif))
    assert np.array_equal(pixels(image), pixels(gradient()))
    assert image.getexif().get(0x0112, 1) == 1


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(decode_image(data))[8, 8].tolist() == [255, 0, 0]


def bomb() -> bytes:
    return encoded(Image.new("1", (12_000, 12_000)))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"GIF89a", "not an image|damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read"),
        (encoded(gradient())[:-60], "damaged"),
        (encoded(gradient(), "JPEG")[:-300], "damaged"),
        (bomb(), "144,000,000 pixels"),
        (encoded(Image.new("RGB", (7, 900))), "8 px"),
        (encoded(gradient("L").convert("F"), "TIFF"), "32-bit"),
        (encoded(gradient("L").convert("I"), "TIFF"), "32-bit"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        decode_image(data, name="photo.png")
    assert str(caught.value).startswith("photo.png")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="image not found: .*gone.png"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="cannot read image"):
        read_image(tmp_path)


def test_save_and_read(tmp_path: Path) -> None:
    save_png(gradient(), tmp_path / "new" / "a.png")
    assert np.array_equal(pixels(read_image(tmp_path / "new" / "a.png")), pixels(gradient()))
    assert decode_image(encode_png(gradient())).size == (64, 48)


def test_sizes() -> None:
    assert parse_size("640x480") == parse_size(" 640×480 ") == (640, 480)
    for text in ("640", "0x480", "-1x5", "640x", "axb", "640x480x3", "1e3x5"):
        with pytest.raises(InputError, match="WIDTHxHEIGHT"):
            parse_size(text)
