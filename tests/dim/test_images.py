from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dim import image_metadata
from dim.colour import SRGB_PRIMARIES
from dim.errors import InputError
from dim.images import (
    convert_image,
    decode_image,
    encode_png,
    parse_size,
    read_header,
    read_image,
    save_png,
    suffix,
)
from tests.image_files import (
    DISPLAY_P3,
    TURNED_BACK,
    chunk,
    exif,
    opened,
    packed_text,
    printer,
    raw_png,
    raw_tiff,
    screen,
    with_chunks,
    with_segment,
    xmp,
)


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


# Every picture that is shown here is asked for in each way: from its file, from a file that Pillow
# opened, from its header, and once more.


def looked_at(data: bytes) -> np.ndarray:
    image = decode_image(data, name="it")
    header = read_header(data)
    assert (header.width, header.height) == image.size
    assert (image.mode, image.info) == ("RGB", {})
    assert np.array_equal(pixels(decode_image(encode_png(image))), pixels(image))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            held = opened(data)
        except Exception:  # Pillow stumbles over its metadata
            return pixels(image)
        assert np.array_equal(pixels(convert_image(held)), pixels(image))
    return pixels(image)


LOSSLESS = {"quality": 100, "subsampling": 0}


def stored(orientation: int) -> Image.Image:
    turn = TURNED_BACK.get(orientation)
    return gradient() if turn is None else gradient().transpose(turn)


def turned_files(orientation: int) -> dict[str, bytes]:
    image, tags = stored(orientation), exif(orientation)
    png, raw = encoded(image), tags.tobytes()
    hexed = b"\nexif\n%8d\n%s\n" % (len(raw), raw.hex().encode())
    text = b"XML:com.adobe.xmp"
    return {
        "PNG": encoded(image, exif=tags),
        "PNG, behind its pixels": with_chunks(png, chunk(b"eXIf", raw[6:]), behind=True),
        "PNG, as text": with_chunks(png, packed_text(hexed, b"Raw profile type exif")),
        "PNG, XMP": with_chunks(png, chunk(b"iTXt", text + bytes(5) + xmp(orientation))),
        "PNG, packed XMP behind": with_chunks(
            png, packed_text(xmp(orientation), text, b"iTXt"), behind=True
        ),
        "JPEG": encoded(image, "JPEG", exif=tags, **LOSSLESS),
        "JPEG, XMP": encoded(image, "JPEG", xmp=xmp(orientation), **LOSSLESS),
        "MPO": encoded(
            image, "MPO", exif=tags, save_all=True, append_images=[image.rotate(90)], **LOSSLESS
        ),
        "WebP": encoded(image, "WEBP", exif=tags, lossless=True),
        "WebP, XMP": encoded(image, "WEBP", xmp=xmp(orientation), lossless=True),
        "TIFF": encoded(image, "TIFF", tiffinfo={0x0112: orientation}),
        "TIFF, packed": encoded(
            image, "TIFF", tiffinfo={0x0112: orientation}, compression="tiff_lzw"
        ),
        "TIFF, XMP": encoded(image, "TIFF", tiffinfo={700: xmp(orientation)}),
    }


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", list(turned_files(1)))
def test_every_format_is_turned_upright_and_its_header_with_it(kind: str, orientation: int) -> None:
    shown = looked_at(turned_files(orientation)[kind])
    assert shown.shape == pixels(gradient()).shape
    off = np.abs(shown - pixels(gradient())).max()
    assert off <= (6 if kind.startswith(("JPEG", "MPO")) else 0)


@pytest.mark.parametrize("value", [0, 9, 77, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(value: int) -> None:
    assert np.array_equal(looked_at(encoded(gradient(), exif=exif(value))), pixels(gradient()))


def test_exif_counts_before_xmp() -> None:
    for tags in ({0x0112: 6, 700: xmp(6)}, {0x0112: 6, 700: xmp(1)}):
        assert np.array_equal(
            looked_at(encoded(stored(6), "TIFF", tiffinfo=tags)), pixels(gradient())
        )
    data = encoded(stored(6), "WEBP", exif=exif(6), xmp=xmp(3), lossless=True)
    assert np.array_equal(looked_at(data), pixels(gradient()))


def test_a_header_is_read_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    files = turned_files(6)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("decoded"))
    for kind, data in files.items():
        header = read_header(data)
        assert (header.width, header.height) == (64, 48), kind


def test_orientation_that_a_program_set_counts_too() -> None:
    image = stored(8)
    image.getexif()[0x0112] = 8
    assert np.array_equal(pixels(convert_image(image)), pixels(gradient()))


# Depth and transparency.

SIDE = 24
RAMP = (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) * 37 % 65536).astype(np.uint16) * 113


def grey(values: np.ndarray, transparent: np.ndarray | None = None) -> np.ndarray:
    shown = values if transparent is None else np.where(transparent, 255, values)
    return np.repeat(shown[..., None], 3, axis=-1)


def rows(samples: np.ndarray) -> list[bytes]:
    return [row.astype(">u2").tobytes() for row in samples.reshape(len(samples), -1)]


def packed(values: np.ndarray, bits: int) -> list[bytes]:
    digits = np.unpackbits(values.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
    return [np.packbits(row).tobytes() for row in digits]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_of_few_bits_has_its_own_transparent_level(bits: int) -> None:
    values = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % (1 << bits)
    data = raw_png(SIDE, bits, 0, packed(values, bits))
    scale = 255 // ((1 << bits) - 1)
    assert np.array_equal(looked_at(data), grey(values * scale))
    for level in {0, 1, (1 << bits) - 1}:
        clear = with_chunks(data, chunk(b"tRNS", struct.pack(">H", level)))
        assert np.array_equal(looked_at(clear), grey(values * scale, values == level))


def test_sixteen_bits_are_the_upper_eight_in_every_colour_model() -> None:
    colour = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)
    clear = np.full((SIDE, SIDE), 0x80FF, np.uint16)
    assert np.array_equal(looked_at(raw_png(SIDE, 16, 0, rows(RAMP))), grey(RAMP >> 8))
    assert np.array_equal(looked_at(raw_png(SIDE, 16, 2, rows(colour))), colour >> 8)
    for samples, kind, opaque in ((RAMP[..., None], 4, grey(RAMP >> 8)), (colour, 6, colour >> 8)):
        with_alpha = np.concatenate([samples, clear[..., None]], axis=-1)
        shown = looked_at(raw_png(SIDE, 16, kind, rows(with_alpha)))
        assert np.abs(shown - (opaque * 128 + 255 * 127) / 255).max() <= 1


def test_sixteen_bit_colours_can_be_transparent() -> None:
    colour = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)
    key = colour[3, 5]
    same = (colour == key).all(axis=-1)
    data = with_chunks(raw_png(SIDE, 16, 2, rows(colour)), chunk(b"tRNS", struct.pack(">3H", *key)))
    assert np.array_equal(looked_at(data), np.where(same[..., None], 255, colour >> 8))
    level = chunk(b"tRNS", struct.pack(">H", RAMP[3, 5]))
    data = with_chunks(raw_png(SIDE, 16, 0, rows(RAMP)), level)
    assert np.array_equal(looked_at(data), grey(RAMP >> 8, RAMP[3, 5] == RAMP))


def test_tiffs_of_unusual_depth() -> None:
    whole, size = RAMP.astype("<u2").tobytes(), (SIDE, SIDE)
    white_is_zero = (65535 - RAMP).astype("<u2").tobytes()
    twelve = (RAMP >> 4).reshape(-1, 2).astype(int)
    triples = [twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255]
    three = np.repeat(RAMP[..., None], 3, axis=-1).astype("<u2").tobytes()
    for data in (
        raw_tiff(size, [16], 1, whole),
        raw_tiff(size, [16], 0, white_is_zero),
        raw_tiff(size, [12], 1, np.stack(triples, axis=-1).astype(np.uint8).tobytes()),
        raw_tiff(size, [16, 16, 16], 2, three),
        encoded(Image.frombytes("I;16B", size, RAMP.astype(">u2").tobytes()), "TIFF"),
        encoded(Image.fromarray(RAMP), "TIFF", compression="tiff_lzw"),
        encoded(Image.fromarray(RAMP), "TIFF", big_tiff=True),
    ):
        assert np.array_equal(looked_at(data), grey(RAMP >> 8))


def test_alpha_that_is_multiplied_in_already() -> None:
    half = np.full((SIDE, SIDE), 128, np.uint8)
    level = np.full((SIDE, SIDE), 50, np.uint8)
    for samples, kind in (((level, half), 1), ((level, level, level, half), 2)):
        data = np.stack(samples, axis=-1).tobytes()
        shown = looked_at(raw_tiff((SIDE, SIDE), [8] * len(samples), kind, data, t338=[1]))
        assert np.abs(shown - (50 + 127)).max() <= 1


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG"), ("LA", "TIFF")],
)
def test_what_nobody_sees_is_white(mode: str, format: str) -> None:
    image = gradient("RGBA")
    image.putalpha(Image.fromarray(np.repeat([[0] * 32 + [255] * 32], 48, axis=0).astype(np.uint8)))
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    shown = looked_at(encoded(image.convert(mode), format, **options))
    assert (shown[:, :32] == 255).all()
    assert np.array_equal(shown[:, 32:], pixels(gradient(mode).convert("RGB"))[:, 32:])


def test_palettes_with_transparency() -> None:
    image = gradient().quantize(16)
    places, colours = pixels(image), pixels(image.convert("RGB"))
    clear = bytes([0, 128] + [255] * 14)
    shown = looked_at(encoded(image, transparency=clear))
    assert (shown[places == 0] == 255).all()
    assert np.array_equal(shown[places > 1], colours[places > 1])
    assert np.abs(shown[places == 1] - (colours[places == 1] * 128 + 255 * 127) / 255).max() <= 1
    for format in ("PNG", "GIF"):
        shown = looked_at(encoded(image, format, transparency=3))
        assert np.array_equal(shown, np.where((places == 3)[..., None], 255, colours))


# Colours.

P3, LINEAR_GREY = screen(DISPLAY_P3), screen(SRGB_PRIMARIES, 1.0, grey=True)
TO_SRGB = ImageCms.createProfile("sRGB")


def converted(image: Image.Image, profile: bytes) -> np.ndarray:
    """As the library itself converts it."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    return pixels(ImageCms.profileToProfile(image, source, TO_SRGB, outputMode="RGB"))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "MPO"])
def test_colours_are_those_that_a_viewer_shows(format: str) -> None:
    options = LOSSLESS if format in ("JPEG", "MPO") else {"lossless": True}
    if format == "MPO":
        options = {**options, "save_all": True, "append_images": [gradient()]}
    options = options if format not in ("PNG", "TIFF") else {}
    data = encoded(gradient(), format, icc_profile=P3, **options)
    assert np.array_equal(looked_at(data), converted(opened(data), P3))
    flat = encoded(Image.new("RGB", (16, 16), (234, 51, 35)), format, icc_profile=P3, **options)
    assert np.abs(looked_at(flat)[8, 8] - [255, 0, 0]).max() <= 3


def test_profiles_meet_every_colour_model() -> None:
    palette = gradient().quantize(16)
    shown = looked_at(encoded(palette, icc_profile=P3))
    assert np.array_equal(shown, converted(palette.convert("RGB"), P3))
    clear = gradient("RGBA")
    clear.putalpha(128)
    half = (converted(gradient(), P3) * 128 + 255 * 127) / 255
    assert np.abs(looked_at(encoded(clear, icc_profile=P3)) - half).max() <= 1
    level, deep = gradient("L"), Image.fromarray(pixels(gradient("L")).astype(np.uint16) * 257)
    right = converted(level, LINEAR_GREY)
    for image in (level, deep, level.convert("LA")):
        assert np.array_equal(looked_at(encoded(image, icc_profile=LINEAR_GREY)), right)
    inks = encoded(gradient("CMYK"), "TIFF", icc_profile=printer())
    assert np.array_equal(looked_at(inks), converted(gradient("CMYK"), printer()))
    jpeg = encoded(gradient("CMYK"), "JPEG", icc_profile=printer(), quality=100)
    assert np.array_equal(looked_at(jpeg), converted(opened(jpeg), printer()))


def test_turned_and_in_other_colours() -> None:
    data = encoded(stored(6), exif=exif(6), icc_profile=P3)
    assert np.array_equal(looked_at(data), converted(gradient(), P3))


def test_a_profile_that_does_not_fit_is_left() -> None:
    for image, profile in (
        (gradient(), printer()),
        (gradient(), LINEAR_GREY),
        (gradient("L"), P3),
        (gradient(), b"no profile"),
        (gradient(), P3[:200]),
    ):
        expected = pixels(image.convert("RGB"))
        assert np.array_equal(looked_at(encoded(image, icc_profile=profile)), expected)


def test_srgb_by_any_profile_is_not_touched() -> None:
    for profile in (ImageCms.ImageCmsProfile(TO_SRGB).tobytes(), screen(SRGB_PRIMARIES)):
        data = encoded(gradient(), icc_profile=profile)
        assert np.array_equal(looked_at(data), pixels(gradient()))


def numbers(kind: bytes, *values: int) -> bytes:
    return chunk(kind, struct.pack(f">{len(values)}I", *values))


LINEAR, SRGB_GAMMA = numbers(b"gAMA", 100_000), numbers(b"gAMA", 45_455)
P3_PRIMARIES = numbers(b"cHRM", *(round(value * 100_000) for value in DISPLAY_P3))


@pytest.mark.parametrize(
    ("chunks", "right"),
    [
        ([SRGB_GAMMA], pixels(gradient())),
        ([LINEAR], converted(gradient(), screen(SRGB_PRIMARIES, 1.0))),
        ([P3_PRIMARIES], converted(gradient(), P3)),
        ([SRGB_GAMMA, P3_PRIMARIES], converted(gradient(), P3)),
        ([LINEAR, chunk(b"sRGB", b"\0")], pixels(gradient())),
        ([LINEAR, chunk(b"cICP", bytes([12, 13, 0, 1]))], converted(gradient(), P3)),
        ([chunk(b"cICP", bytes([9, 16, 0, 1]))], pixels(gradient())),  # PQ has no one rendering
        ([numbers(b"gAMA", 0)], pixels(gradient())),
        ([numbers(b"cHRM", *[0] * 8)], pixels(gradient())),
    ],
)
def test_pngs_may_describe_their_screen_in_numbers(chunks: list[bytes], right: np.ndarray) -> None:
    assert np.array_equal(looked_at(with_chunks(encoded(gradient()), *chunks)), right)


def test_bitmaps_may_hold_a_profile() -> None:
    data = encoded(gradient(), "BMP")
    (start,) = struct.unpack_from("<I", data, 10)
    content = data[start:]
    header = struct.pack("<IiiHHII4i", 124, 64, 48, 1, 24, 0, len(content), 0, 0, 0, 0)
    header += bytes(16) + b"DEBM" + bytes(48)
    header += struct.pack("<4I", 4, 124 + len(content), len(P3), 0)
    whole = struct.pack("<2sIHHI", b"BM", 14 + 124 + len(content) + len(P3), 0, 0, 138)
    shown = looked_at(whole + header + content + P3)
    assert np.array_equal(shown, converted(gradient(), P3))


# Metadata that are no reason to refuse a picture.

TEXT_TAG = 305  # of a TIFF, for the name of a program

LONG = b"a line of a history\n" * 200_000
NOISE = np.random.default_rng(0).integers(0, 256, 1_300_000, np.uint8).tobytes()
PNG_METADATA = {
    "long packed text": packed_text(LONG),
    "long packed XMP": packed_text(LONG, b"XML:com.adobe.xmp", b"iTXt"),
    "a large profile": chunk(b"iCCP", b"x\0\0" + zlib.compress(NOISE)),
    "a broken profile": chunk(b"iCCP", b"x\0\0junk"),
    "a profile packed otherwise": chunk(b"iCCP", b"x\0\7junk"),
    "no profile": chunk(b"iCCP", b""),
    "text packed otherwise": chunk(b"zTXt", b"x\0\5" + zlib.compress(b"text")),
    "a wrong checksum": chunk(b"tEXt", b"a\0b", checksum=7),
    "a wrong checksum of colours": chunk(b"gAMA", struct.pack(">I", 1), checksum=7),
    "a wrong checksum of transparency": chunk(b"tRNS", bytes(6), checksum=7),
    "half a transparency": chunk(b"tRNS", bytes(2)),
    "half a gamma": chunk(b"gAMA", b"\1"),
    "half a resolution": chunk(b"pHYs", b"\1"),
    "half the primaries": chunk(b"cHRM", b"\1"),
    "no intent": chunk(b"sRGB", b""),
    "a transparency too late": chunk(b"tRNS", struct.pack(">3H", 0, 252, 0)),
    "no EXIF": chunk(b"eXIf", b"junk"),
    "EXIF that breaks off": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x05\x01\x12"),
    "an animation without frames": chunk(b"acTL", b"\0"),
    "frames without an animation": chunk(b"fcTL", bytes(26)),
    "something unknown": chunk(b"prVt", b"123"),
}


BEHIND = [(kind, behind) for kind in PNG_METADATA for behind in (False, True)]
BEHIND.remove(("a transparency too late", False))


@pytest.mark.parametrize(("kind", "behind"), BEHIND)
def test_png_metadata_never_decide(kind: str, behind: bool) -> None:
    data = with_chunks(encoded(gradient()), PNG_METADATA[kind], behind=behind)
    assert np.array_equal(looked_at(data), pixels(gradient()))
    assert suffix(data) == "png"


def test_a_large_profile_is_applied_nevertheless() -> None:
    # bytes that no table of the profile points to, and no compression makes less of
    data = encoded(gradient(), icc_profile=P3 + NOISE)
    assert np.array_equal(looked_at(data), converted(gradient(), P3))


def test_packed_texts_are_not_unpacked_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    data = with_chunks(encoded(gradient()), *[packed_text(bytes(1 << 20))] * 3000)
    assert len(data) < 4 << 20
    unpacked = []
    inflate = image_metadata._inflate
    monkeypatch.setattr(
        image_metadata, "_inflate", lambda *how: unpacked.append(how) or inflate(*how)
    )
    assert read_header(data).common == encoded(gradient())
    assert len(unpacked) < 70
    assert np.array_equal(looked_at(data), pixels(gradient()))


def test_orientation_is_found_among_broken_metadata() -> None:
    broken = [body for kind, body in PNG_METADATA.items() if "too late" not in kind]
    data = with_chunks(encoded(stored(6), exif=exif(6)), *broken)
    assert np.array_equal(looked_at(data), pixels(gradient()))


JPEG_METADATA = {
    "a short JFIF": (0xE0, b"JFIF\0"),
    "a short Adobe": (0xEE, b"Adobe"),
    "IPTC that breaks off": (0xED, b"Photoshop 3.0\08BIM\x04"),
    "IPTC without a size": (0xED, b"Photoshop 3.0\08BIM\x04\x04"),
    "a profile without a number": (0xE2, b"ICC_PROFILE\0"),
    "a third of a profile": (0xE2, b"ICC_PROFILE\0\1\3abc"),
    "a broken profile": (0xE2, b"ICC_PROFILE\0\1\1abc"),
    "no EXIF": (0xE1, b"Exif\0\0junk"),
    "EXIF that breaks off": (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"),
    "no list of pictures": (0xE2, b"MPF\0junkjunkjunk"),
    "large XMP": (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(65_000)),
    "an empty comment": (0xFE, b""),
}


@pytest.mark.parametrize("kind", JPEG_METADATA)
def test_jpeg_metadata_never_decide(kind: str) -> None:
    plain = encoded(gradient(), "JPEG")
    data = with_segment(plain, *JPEG_METADATA[kind])
    assert np.array_equal(looked_at(data), pixels(decode_image(plain)))
    assert suffix(data) == "jpg"


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("kind", range(1, 17))
@pytest.mark.parametrize("tag", [270, 282, 306, 700, 33723, 34377, 34665, 34675, 34853, 65000])
def test_tiff_tags_of_any_type_and_length_never_decide(tag: int, kind: int, big: bool) -> None:
    data = encoded(gradient(), "TIFF", big_tiff=big, tiffinfo={TEXT_TAG: "x" * 30})
    order, size = ("<HHQ", 20) if big else ("<HHI", 12)
    place = next(
        place
        for place in range(8, len(data) - size)
        if struct.unpack_from(order, data, place) == (TEXT_TAG, 2, 31)
    )
    for count in (0, 1, 2, 40, 10**6, 2**32 - 1):
        broken = bytearray(data)
        struct.pack_into(order, broken, place, tag, kind, count)
        assert np.array_equal(looked_at(bytes(broken)), pixels(gradient())), count


def test_bigtiffs_say_how_they_are_turned_and_in_which_colours() -> None:
    tags = {700: xmp(6), 34675: P3}
    for more in ({}, {0x0112: 6}):
        data = encoded(stored(6), "TIFF", big_tiff=True, tiffinfo={**tags, **more})
        assert np.array_equal(looked_at(data), converted(gradient(), P3))


def test_a_directory_that_claims_to_be_longer_than_the_file_is_not_gone_through() -> None:
    big = encoded(gradient(), "TIFF", big_tiff=True)
    (start,) = struct.unpack_from("<Q", big, 8)
    for count in (2**40, 2**64 - 1):
        broken = bytearray(big)
        struct.pack_into("<Q", broken, start, count)
        assert np.array_equal(looked_at(bytes(broken)), pixels(gradient()))
    with pytest.raises(InputError):
        decode_image(b"II*\0" + struct.pack("<I", 2**32 - 1) + bytes(99))


@pytest.mark.parametrize(
    "tag", [{"t34665": [10**8]}, {"t34665": [3]}, {"t34853": [7]}, {"t33723": [1, 2]}]
)
def test_tiff_metadata_never_decide(tag: dict[str, list[int]]) -> None:
    content = pixels(gradient()).astype(np.uint8).tobytes()
    data = raw_tiff((64, 48), [8, 8, 8], 2, content, **tag)
    assert np.array_equal(looked_at(data), pixels(gradient()))


def test_files_may_break_off_or_go_on_behind_their_pixels() -> None:
    png, webp = encoded(gradient()), encoded(gradient(), "WEBP", lossless=True, xmp=bytes(500))
    texts = with_chunks(png, chunk(b"tEXt", b"a\0" + bytes(500)), behind=True)
    for data in (png[:-12], texts[:-200], png + bytes(99), webp[:-100], webp + bytes(99)):
        assert np.array_equal(looked_at(data), pixels(gradient()))
    before = webp[: webp.index(b"XMP ")]
    assert np.array_equal(looked_at(before), pixels(gradient()))
    for data in (webp[:-100], before):  # given away as a file that is whole again
        common = read_header(data).common
        assert common is not None and len(common) == 8 + int.from_bytes(common[4:8], "little")
        assert not common[20] & 0x2C
    jpeg = encoded(gradient(), "JPEG")
    assert np.array_equal(looked_at(jpeg + bytes(999)), pixels(decode_image(jpeg)))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_picture_that_breaks_off_is_damaged_whatever_it_says(format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    options = {"exif": exif(6), "icc_profile": P3} if format not in ("BMP", "GIF") else {}
    data = encoded(Image.fromarray(noise), format, **options)
    with pytest.raises(InputError, match="damaged|not an image"):
        decode_image(data[: int(len(data) * share)])


def test_a_palette_that_is_missing_is_said_by_the_header_too() -> None:
    data = raw_png(16, 8, 3, [bytes(16)] * 16)
    for look in (decode_image, read_header):
        with pytest.raises(InputError, match="damaged"):
            look(data)


# Formats within formats.


@pytest.mark.parametrize(
    ("format", "options", "ends"),
    [
        ("MPO", {"save_all": True}, "jpg"),
        ("JPEG", {}, "jpg"),
        ("PNG", {"save_all": True}, "png"),
        ("TIFF", {"big_tiff": True}, "tif"),
        ("TIFF", {"save_all": True}, "tif"),
        ("WEBP", {"save_all": True, "lossless": True}, "webp"),
        ("GIF", {"save_all": True}, "gif"),
        ("BMP", {}, "bmp"),
    ],
)
def test_relatives_are_files_of_their_family(format: str, options: dict, ends: str) -> None:
    if options.get("save_all"):
        options = {**options, "append_images": [gradient().rotate(180)]}
    data = encoded(gradient(), format, **options)
    assert suffix(data) == ends
    looked_at(data)
    if ends in ("png", "tif", "webp", "bmp"):
        assert np.array_equal(looked_at(data), pixels(gradient()))


def test_several_pictures_are_found_behind_a_stray_mark() -> None:
    data = encoded(gradient(), "MPO", save_all=True, append_images=[gradient().rotate(180)])
    stray = data[:2] + b"\xff\xd0" + data[2:]
    assert opened(stray).format == "MPO"
    assert suffix(stray) == "jpg" and read_header(stray).format == "JPEG"


def test_no_image_has_no_suffix() -> None:
    assert suffix(b"") == suffix(b"GIF89") == suffix(b"<html>") == "bin"


# What other programs can be given.


def test_plain_files_are_common_as_they_are() -> None:
    for data in (
        encoded(gradient()),
        encoded(gradient("L")),
        encoded(gradient("1")),
        encoded(gradient().quantize(16)),
        encoded(gradient(), icc_profile=screen(SRGB_PRIMARIES), exif=exif(1)),
        with_chunks(encoded(gradient()), chunk(b"tEXt", b"Software\0this"), behind=True),
        encoded(gradient(), "JPEG"),
        encoded(gradient(), "JPEG", exif=exif(1), comment=b"hello"),
        encoded(gradient("L"), "JPEG"),
        encoded(gradient(), "WEBP"),
        encoded(gradient(), "MPO", save_all=True, append_images=[gradient()]),
    ):
        assert read_header(data).common is data


@pytest.mark.parametrize(("kind", "behind"), BEHIND)
def test_common_files_have_nothing_to_stumble_over(kind: str, behind: bool) -> None:
    data = with_chunks(encoded(gradient()), PNG_METADATA[kind], behind=behind)
    common = read_header(data).common
    assert common is not None
    assert np.array_equal(pixels(opened(common).convert("RGB")), pixels(gradient()))
    assert opened(common).getexif() == {}


@pytest.mark.parametrize("kind", JPEG_METADATA)
def test_so_have_common_jpegs(kind: str) -> None:
    plain = encoded(gradient(), "JPEG")
    common = read_header(with_segment(plain, *JPEG_METADATA[kind])).common
    assert common is not None
    assert np.array_equal(pixels(opened(common)), pixels(opened(plain)))


def test_what_others_would_see_otherwise_is_not_common() -> None:
    for data in (
        *(turned_files(6).values()),
        encoded(gradient("RGBA")),
        encoded(gradient().quantize(16), transparency=1),
        encoded(gradient("CMYK"), "JPEG"),
        encoded(gradient(), "JPEG", icc_profile=P3),
        with_chunks(encoded(gradient()), LINEAR),
        raw_png(SIDE, 16, 0, rows(RAMP)),
        raw_png(SIDE, 16, 2, rows(np.repeat(RAMP[..., None], 3, axis=-1))),
        *(encoded(gradient(), format) for format in ("GIF", "BMP", "TIFF")),
    ):
        assert read_header(data).common is None
