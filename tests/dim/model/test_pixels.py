"""Pictures that are not plain RGB, through the whole model: the right result or a clear error."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dim.errors import InputError
from dim.images import decode_image, encode_png
from dim.model.framing import centre_crop, composite, stretched, upright_rgb
from tests.image_files import DISPLAY_P3, screen

WIDTH, HEIGHT = 72, 56


def picture(mode: str = "RGB") -> Image.Image:
    across = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    down = np.tile(np.linspace(0, 255, HEIGHT).astype(np.uint8)[:, None], (1, WIDTH))
    return Image.fromarray(np.stack([across, down, 255 - across], axis=-1)).convert(mode)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """A PNG file of any depth and colour type (Pillow writes no 16-bit colour)."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", header),
            png_chunk(b"IDAT", zlib.compress(rows)),
            png_chunk(b"IEND", b""),
        )
    )


def sixteen_bit_png(image: Image.Image, colour: int) -> bytes:
    """``image`` with every sample's byte followed by a low byte that must not matter."""
    samples = np.asarray(image).reshape(image.height, -1).astype(np.uint16) << 8 | 0x42
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    return png(*image.size, 16, colour, rows)


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def faded() -> Image.Image:
    """Half transparent red, which on white is pink."""
    return Image.new("RGBA", (WIDTH, HEIGHT), (255, 0, 0, 128))


PINK = Image.new("RGB", (WIDTH, HEIGHT), (255, 127, 127))


def turned() -> bytes:
    """A camera held upright: stored on its side, with the EXIF tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


KINDS = {
    "alpha": (encode_png(faded()), PINK),
    "16-bit alpha": (sixteen_bit_png(faded(), 6), PINK),
    "16-bit colour": (sixteen_bit_png(picture(), 2), picture()),
    "16-bit grey": (sixteen_bit_png(picture("L"), 0), picture("L").convert("RGB")),
    "CMYK": (saved(picture("CMYK"), "TIFF"), picture("CMYK").convert("RGB")),
    "CMYK JPEG": (saved(picture("CMYK"), "JPEG", quality=100), picture()),
    "EXIF": (turned(), picture()),
    "palette": (encode_png(picture().quantize(16)), picture().quantize(16).convert("RGB")),
    "one bit": (encode_png(picture("1")), picture("1").convert("RGB")),
}


def apart(one: Image.Image, other: Image.Image) -> int:
    assert one.size == other.size and one.mode == other.mode == "RGB"
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_becomes_what_it_shows(kind: str) -> None:
    data, expected = KINDS[kind]
    allowed = 12 if "JPEG" in kind else 1
    assert apart(upright_rgb(opened(data)), expected) <= allowed
    assert apart(decode_image(data), expected) <= allowed


def test_a_picture_is_converted_once(tiny) -> None:
    profile = screen(DISPLAY_P3)
    data = saved(picture(), "PNG", icc_profile=profile)
    right = decode_image(data)
    assert apart(right, picture()) > 20
    loaded = opened(data)
    loaded.load()
    for given in (opened(data), loaded, loaded.convert("RGB"), loaded.copy()):
        once = upright_rgb(given)
        assert apart(once, right) == 0
        assert apart(upright_rgb(once), right) == 0
        assert apart(decode_image(encode_png(once)), right) == 0


def test_a_picture_that_is_as_it_should_be_is_not_copied() -> None:
    assert upright_rgb(image := picture()) is image


def test_a_later_frame_is_what_was_asked_for() -> None:
    frames = opened(saved(picture(), "TIFF", save_all=True, append_images=[picture().rotate(180)]))
    frames.seek(1)
    assert apart(upright_rgb(frames), picture().rotate(180)) == 0


def test_a_smaller_draft_is_what_was_asked_for() -> None:
    drafted = opened(saved(picture().resize((720, 560)), "JPEG"))
    drafted.draft("RGB", (WIDTH, HEIGHT))
    assert upright_rgb(drafted).size == drafted.size == (90, 70)


def test_a_file_that_was_closed_is_an_error_in_one_line() -> None:
    file = io.BytesIO(encode_png(picture()))
    closed = Image.open(file)
    file.close()
    with pytest.raises(InputError, match="image 3 cannot be read") as caught:
        upright_rgb(closed, "image 3")
    assert "\n" not in str(caught.value)


def test_every_kind_of_picture_is_edited_at_its_own_size(tiny) -> None:
    kinds = [kind for kind in KINDS if "JPEG" not in kind]
    told = ["remove it"] * len(kinds)
    given = tiny.edit([opened(KINDS[kind][0]) for kind in kinds], told, steps=2)
    plain = tiny.edit([KINDS[kind][1] for kind in kinds], told, steps=2)
    for kind, one, other in zip(kinds, given, plain, strict=True):
        assert one.image.size == (WIDTH, HEIGHT), kind
        assert apart(one.image, other.image) <= 2, kind


def test_one_pixel_is_refused_and_eight_are_edited(tiny) -> None:
    for make in (lambda i: i, lambda i: opened(encode_png(i))):
        with pytest.raises(InputError, match="image 1 is 1x1; each side must have 8 px"):
            tiny.edit([make(Image.new("RGB", (1, 1)))], ["remove it"])
    assert tiny.edit([Image.new("RGB", (8, 8))], ["remove it"], steps=1)[0].image.size == (8, 8)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test in which any picture's pixels are read or made room for."""

    def load(*_: object) -> None:
        raise AssertionError("the pixels of a bomb were read")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load_prepare", load)


@pytest.mark.parametrize("side", [7_100, 12_000, 20_000])
def test_a_bomb_is_refused_by_its_header_alone(tiny, unread, monkeypatch, side: int) -> None:
    bomb = png(side, side, 8, 2, b"\0")
    with pytest.raises(InputError, match="pixels"):
        decode_image(bomb)
    # whoever switched Pillow's own guard off gets here with a picture that is not read yet
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(InputError, match=f"image 1 is {side}x{side}.*at most 50,000,000 pixels"):
        tiny.edit([opened(bomb)], ["remove it"])


@pytest.mark.parametrize("size", [(72, 56), (333, 70), (41, 97), (64, 200), (1000, 37)])
def test_the_middle_square_is_that_of_the_whole_picture_resized(size: tuple[int, int]) -> None:
    # A smooth one: Pillow may resize the two directions in another order, which overshoots show.
    image = picture().resize(size)
    scale = 64 / min(size)
    whole = image.resize([round(side * scale) for side in size], Image.Resampling.BICUBIC)
    left, top = (whole.width - 64) // 2, (whole.height - 64) // 2
    assert apart(centre_crop(image, (64, 64)), whole.crop((left, top, left + 64, top + 64))) <= 1


def test_a_strip_does_not_become_a_bomb_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    strip = Image.new("RGB", (8, 500_000), "red")
    sizes = []
    resize = Image.Image.resize

    def watched(self: Image.Image, size: tuple[int, int], *rest: object, **options: object):
        sizes.append(size)
        return resize(self, size, *rest, **options)

    monkeypatch.setattr(Image.Image, "resize", watched)
    assert centre_crop(strip, (1024, 1024)).getpixel((5, 5)) == (255, 0, 0)
    assert sizes == [(1024, 1024)]


def test_a_picture_of_the_wanted_size_is_not_resampled() -> None:
    image = picture()
    assert stretched(image, image.size) is image
    assert stretched(image, (10, 20)).size == (10, 20)


def test_outside_of_a_mask_no_pixel_changes() -> None:
    """A thousand random masks over pictures that differ in every sample."""
    rng = np.random.default_rng(0)
    for number in range(1000):
        width, height = rng.integers(1, 60, 2)
        source = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = rng.integers(0, 2, (height, width), dtype=np.uint8) * 255
        if number % 2:  # also what is neither 0 nor 255
            mask = rng.integers(0, 256, (height, width), dtype=np.uint8)
        made = composite(*map(Image.fromarray, (255 - source, source, mask)))
        assert np.array_equal(np.asarray(made)[mask < 128], source[mask < 128])
        assert np.array_equal(np.asarray(made)[mask >= 128], 255 - source[mask >= 128])


def test_a_mask_of_another_size_is_refused() -> None:
    image = Image.new("RGB", (8, 9))
    with pytest.raises(InputError, match="8x9, 8x9, 9x8"):
        composite(image, image, Image.new("L", (9, 8)))
