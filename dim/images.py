"""Images from outside into the one form that the method works on: upright 8-bit sRGB.

This is the one decoding: designer, painter, filters and records are shown what it returns. What
cannot be brought there faithfully is refused with a sentence, never guessed at.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from dim import image_metadata, provenance
from dim.colour import PROFILED_MODES, to_srgb, transform_of
from dim.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_SUFFIXES = dict(zip(FORMATS, ("png", "jpg", "webp", "bmp", "gif", "tif"), strict=True))
MAX_PIXELS = 50_000_000
MIN_SIDE = 8
SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
FLATTENED_ON = (255, 255, 255)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# PNG's samples of fewer than 8 bits are stretched to 8, and its transparent grey is not.
_STRETCHED = {"L;2": 85, "L;4": 17}
_SIXTEEN_BIT_RGB = "RGB;16B"
_WHITE_IS_ZERO = 0  # of TIFF; Pillow minds it up to 8 bits
_COMMON_FORMATS, _COMMON_MODES = ("PNG", "JPEG", "WEBP"), ("1", "L", "P", "RGB")
_DAMAGED, _UNREADABLE = "is damaged", "cannot be read"
_GREY_MODES = ("1", "L", "LA", "La", *SIXTEEN_BIT)


class TooManyPixels(InputError):
    """So many that the file is taken for an attack, by its header alone."""


@dataclass(frozen=True)
class Header:
    """What is known of an encoded image before its pixels are decoded.

    Attributes:
        format: one of :data:`FORMATS`.
        width, height: of the upright image, in pixels.
        common: the file in which any program sees the pixels that ``decode_image`` returns: the
            very bytes, or those without metadata that others would stumble over. ``None``: others
            may not read the format, or see the image turned, in other colours, at another depth
            or with what is transparent in it.
    """

    format: str
    width: int
    height: int
    common: bytes | None


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image file at ``path`` as upright sRGB.

    Raises:
        InputError: there is no such file, or see ``decode_image``.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"image not found: {path}") from None
    except OSError as error:
        raise InputError(f"cannot read image {path}: {error.strerror or error}") from None
    return decode_image(data, name=str(path), max_pixels=max_pixels)


def decode_image(
    data: bytes, *, name: str = "the image", max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Encoded bytes (PNG, JPEG, WebP, BMP, GIF, TIFF) as an upright image of mode RGB, in sRGB.

    The first picture of several is taken, turned as its EXIF (or, without, its XMP) says; colours
    are converted by the file's profile; of 16 bits a channel the upper 8 are kept; transparency
    is laid on white. Other metadata do not matter, however broken they are.

    Args:
        data: the encoded file.
        name: how the error calls the image.
        max_pixels: width x height allowed; checked in the header, before anything is decoded.

    Raises:
        InputError: not an image, a format not read here, damaged, too many pixels, a side under
            8 px, or samples without a defined range (floating point, 32-bit integers).
    """
    return _decode(data, name, max_pixels, _DAMAGED)


def convert_image(image: Image.Image, name: str = "the image") -> Image.Image:
    """A picture that Pillow holds or has opened, as ``decode_image`` returns those of files.

    One that is so already is returned itself.

    Raises:
        InputError: it cannot be read, or its samples have no defined range.
    """
    try:
        file = _file_of(image)
        if file is not None:
            return _decode(file, name, MAX_PIXELS, _UNREADABLE)
        _load(image)
        orientation = _orientation_of(image)
        profile = image_metadata.profile(image.info, grey=image.mode in _GREY_MODES)
        ready = image.mode == "RGB" and not image.has_transparency_data and orientation == 1
        if ready and transform_of(profile, image.mode) is None:
            return image
        return _to_rgb(image, profile, orientation, name)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name} {_UNREADABLE}: {_said(error)}") from None


def read_header(data: bytes, *, name: str = "the image") -> Header:
    """What an encoded image is, without decoding its pixels.

    Raises:
        InputError: as ``decode_image`` does, as far as the header tells; small sides are no error.
        TooManyPixels: several times ``MAX_PIXELS``.
    """
    if not data:
        raise InputError(f"{name} is not an image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = image_metadata.read(data)
        image = _open(found.pixels, name)
        width, height = image.size  # of a TIFF, as its tag turns it
        try:
            if found.orientation > 4:
                width, height = height, width
            common = None
            if found.orientation == 1 and _is_common(image, found.profile):
                whole = found.pixels is data or (found.harmless and _opens(data))
                common = data if whole else found.pixels
        except Exception as error:  # such as a palette that is not there
            raise InputError(f"{name} {_DAMAGED}: {_said(error)}") from None
        return Header(_format(image), width, height, common)


def suffix(data: bytes) -> str:
    """What the name of an encoded file ends in: ``jpg``, ``png``, …; ``bin`` if it is no image."""
    try:
        return _SUFFIXES[read_header(data).format]
    except InputError:
        return "bin"


def encode_png(
    image: Image.Image, *, compress_level: int = 6, said: Mapping[str, str] | None = None
) -> bytes:
    """``image`` as PNG bytes.

    Args:
        compress_level: zlib's, from 0 (large and fast) to 9; the pixels are the same.
        said: what the file says of itself, see :mod:`dim.provenance`.
    """
    buffer = io.BytesIO()
    options = provenance.save_options("png", said or {})
    image.save(buffer, format="PNG", compress_level=compress_level, **options)
    return buffer.getvalue()


def encode_jpeg(image: Image.Image) -> bytes:
    """``image`` as JPEG bytes of such a quality that nothing shows: 95, all colours kept."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, subsampling="4:4:4")
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path, said: Mapping[str, str] | None = None) -> None:
    """Write ``image`` to ``path`` as PNG that says ``said``; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(image, said=said))


def parse_size(text: str) -> tuple[int, int]:
    """``"640x480"`` as (width, height) in pixels.

    Raises:
        InputError: any other form.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text.strip())
    if found is None:
        raise InputError(f"size {text!r} is not of the form WIDTHxHEIGHT, such as 1024x1024")
    return int(found[1]), int(found[2])


def _decode(data: bytes, name: str, max_pixels: int, fault: str) -> Image.Image:
    if not data:
        raise InputError(f"{name} is empty")
    with warnings.catch_warnings():
        # The header check below is stricter than Pillow's warning about decompression bombs.
        warnings.simplefilter("ignore")
        found = image_metadata.read(data)
        image = _open(found.pixels, name)
        _check_size(image, name, max_pixels)
        try:
            _load(image)
            return _to_rgb(image, found.profile, found.orientation, name)
        except InputError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
            raise InputError(f"{name} {fault}: {_said(error)}") from None


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise TooManyPixels(f"{name} has far too many pixels") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name} is not an image that can be read (formats: {', '.join(FORMATS)})"
        ) from None
    except Exception as error:  # a header that claims a known format and is broken
        raise InputError(f"{name} {_DAMAGED}: {_said(error)}") from None


def _file_of(image: Image.Image) -> bytes | None:
    """The file of a picture that was opened and is not loaded, so that it can be decoded as files
    are; ``None`` for any other picture, and where Pillow was asked for less than the file."""
    if not isinstance(image, ImageFile.ImageFile) or _format(image) not in FORMATS:
        return None
    if not image.tile or image.decoderconfig or image.tell() or image.fp is None:
        return None
    place = image.fp.tell()
    try:
        image.fp.seek(0)
        return image.fp.read()
    finally:
        image.fp.seek(place)


def _orientation_of(image: Image.Image) -> int:
    """Of a loaded picture; its EXIF may have been set by the program that holds it."""
    try:
        return image_metadata.valid_orientation(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # broken EXIF can raise anything
        return image_metadata.orientation(image.info)


def _opens(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception:
        return False
    return True


def _format(image: Image.Image) -> str:
    """One of :data:`FORMATS`: a JPEG of several pictures (MPO) is a JPEG."""
    return "JPEG" if image.format == "MPO" else image.format or ""


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"{name} has {width}x{height} = {width * height:,} pixels, more than the "
            f"{max_pixels:,} allowed"
        )
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} is {width}x{height}, each side must have {MIN_SIDE} px or more")


def _is_common(image: Image.Image, profile: bytes | None) -> bool:
    """Whether any program makes of these samples what we do."""
    if _format(image) not in _COMMON_FORMATS or image.mode not in _COMMON_MODES:
        return False
    if image.has_transparency_data or _raw_mode(image) == _SIXTEEN_BIT_RGB:
        return False
    return transform_of(profile, "L" if image.mode in ("1", "L") else "RGB") is None


def _raw_mode(image: Image.Image) -> str | None:
    """How the samples of an opened PNG lie in the file; ``None`` once it is loaded."""
    tiles = getattr(image, "tile", None)
    return tiles[0][3] if image.format == "PNG" and tiles else None


def _load(image: Image.Image) -> None:
    """Decode the pixels, and put right the transparent colour of a PNG, which Pillow leaves at the
    depth of the file."""
    raw_mode, colour = _raw_mode(image), image.info.get("transparency")
    image.load()
    if isinstance(colour, int) and raw_mode in _STRETCHED:
        image.info["transparency"] = colour * _STRETCHED[raw_mode]
    elif isinstance(colour, tuple) and raw_mode == _SIXTEEN_BIT_RGB:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _to_rgb(image: Image.Image, profile: bytes | None, orientation: int, name: str) -> Image.Image:
    """A loaded image as upright sRGB that remembers nothing of its file."""
    if image.mode in SIXTEEN_BIT:
        image = _eight_bits(image)
    if image.mode in ("I", "F"):
        raise InputError(
            f"{name} has 32-bit samples (mode {image.mode}), whose range is not defined; "
            "convert it to 8 or 16 bits a channel"
        )
    colours, alpha = _split(image)
    shown = to_srgb(colours, profile)
    if alpha is not None:
        canvas = Image.new("RGB", image.size, FLATTENED_ON)
        canvas.paste(shown, mask=alpha)
        shown = canvas
    if orientation in _TURNS:
        shown = shown.transpose(_TURNS[orientation])
    elif shown is image:
        shown = image.copy()
    shown.info = {}  # a profile that stayed here would be applied again
    return shown


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with alpha where one of its values is transparent."""
    values, tags = np.asarray(image).astype(np.uint16), getattr(image, "tag_v2", {})
    (bits, *_) = tags.get(ExifTags.Base.BitsPerSample, (16,))
    if tags.get(ExifTags.Base.PhotometricInterpretation) == _WHITE_IS_ZERO:
        values = (1 << bits) - 1 - values
    grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is None:
        return grey
    opaque = np.where(values == transparent, 0, 255).astype(np.uint8)
    return Image.merge("LA", (grey, Image.fromarray(opaque)))


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours of an image in a mode that a profile can be for, and its alpha if it has one."""
    alpha = None
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "La")
        image = image.convert("LA" if grey else "RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("L") if grey else image.convert("RGB")
    if image.mode == "1":
        image = image.convert("L")
    return image if image.mode in PROFILED_MODES else image.convert("RGB"), alpha
