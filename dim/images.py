"""Images from outside into the one form that the method works on: upright 8-bit RGB.

What cannot be brought there faithfully is refused with a sentence, never guessed at.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dim.errors import InputError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_SUFFIXES = dict(zip(FORMATS, ("png", "jpg", "webp", "bmp", "gif", "tif"), strict=True))
MAX_PIXELS = 50_000_000
MIN_SIDE = 8
SIXTEEN_BIT = {"I;16", "I;16B", "I;16L", "I;16N"}
FLATTENED_ON = (255, 255, 255)


def read_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image file at ``path`` as upright RGB.

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
    """Encoded bytes (PNG, JPEG, WebP, BMP, GIF, TIFF) as an upright RGB image.

    The first frame of several is taken, EXIF rotation applied, transparency laid on white,
    16-bit grey scaled to 8 and every other colour model converted.

    Args:
        data: the encoded file.
        name: how the error calls the image.
        max_pixels: width x height allowed; checked in the header, before anything is decoded.

    Raises:
        InputError: not an image, a format not read here, damaged, too many pixels, a side under
            8 px, or samples without a defined range (floating point, 32-bit integers).
    """
    if not data:
        raise InputError(f"{name} is empty")
    with warnings.catch_warnings():
        # The header check below is stricter than Pillow's warning about decompression bombs.
        warnings.simplefilter("ignore")
        image = _open(data, name)
        _check_size(image, name, max_pixels)
        try:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), name)
        except InputError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
            said = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{name} is damaged: {said}") from None


def suffix(data: bytes) -> str:
    """What the name of an encoded file ends in: ``jpg``, ``png``, …; ``bin`` if it is no image."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            return _SUFFIXES[opened.format or ""]
    except Exception:  # Pillow raises nearly anything on damaged data
        return "bin"


def encode_png(image: Image.Image) -> bytes:
    """``image`` as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def save_png(image: Image.Image, path: Path) -> None:
    """Write ``image`` to ``path`` as PNG; folders on the way are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(image))


def parse_size(text: str) -> tuple[int, int]:
    """``"640x480"`` as (width, height) in pixels.

    Raises:
        InputError: any other form.
    """
    found = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text.strip())
    if found is None:
        raise InputError(f"size {text!r} is not of the form WIDTHxHEIGHT, such as 1024x1024")
    return int(found[1]), int(found[2])


def _open(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise InputError(f"{name} has far too many pixels") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name} is not an image that can be read (formats: {', '.join(FORMATS)})"
        ) from None
    except Exception as error:  # a header that claims a known format and is broken
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{name} is damaged: {said}") from None


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"{name} has {width}x{height} = {width * height:,} pixels, more than the "
            f"{max_pixels:,} allowed"
        )
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} is {width}x{height}, each side must have {MIN_SIDE} px or more")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode in SIXTEEN_BIT:
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"{name} has 32-bit samples (mode {image.mode}), whose range is not defined; "
            "convert it to 8 or 16 bits a channel"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, FLATTENED_ON)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")
