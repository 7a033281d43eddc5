"""The pictures that a client sends: what is to be edited, and where."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dim.errors import InputError
from dim.images import decode_image, encode_png
from dim.model.framing import centre_crop
from dim.model.sizes import Size
from serving.errors import BadRequestError
from serving.shipping import Shipped, ship

MASK_FORMATS = ("PNG", "WEBP")
OPAQUE = 255
KEPT_FROM = 128  # alpha from which a pixel stays as it is


@dataclass(frozen=True)
class Source:
    """An upright sRGB picture as a shipped PNG, and its size (width, height) in pixels."""

    image: Shipped
    size: Size


def read_source(data: bytes, max_pixels: int, shape: Size | None = None) -> Source:
    """A client's picture, or as much of its middle as fits into ``shape``, brought to that size.

    Raises:
        BadRequestError: see ``dim.images.decode_image``.
    """
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except InputError as error:
        raise BadRequestError(str(error), param="image") from None
    if shape is not None:
        image = centre_crop(image, shape)
    # Once per request and read again at once: time counts, not the last bytes.
    return Source(ship(encode_png(image, compress_level=1)), image.size)


def read_mask(data: bytes, size: Size) -> bytes:
    """A client's mask as PNG bytes of mode L: 255 where its alpha is 0, which is "edit here".

    From 128 on nothing changes, see ``dim.model.framing.composite``.

    Args:
        data: a PNG or WebP with an alpha channel.
        size: of the upright picture that it is for.

    Raises:
        BadRequestError: it is no such picture, of another size, or nothing may change.
    """
    alpha = _alpha(data, size)
    if np.asarray(alpha).min() >= KEPT_FROM:
        raise _bad_mask("has no transparent pixel, so that nothing may change")
    return encode_png(alpha.point(lambda value: OPAQUE - value))


def _alpha(data: bytes, size: Size) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mask = Image.open(io.BytesIO(data), formats=MASK_FORMATS)
    except Exception:
        raise _bad_mask(
            f"is not a picture that can be read ({' or '.join(MASK_FORMATS)})"
        ) from None
    if mask.size != size:  # before anything is decoded
        is_, wanted = ("x".join(map(str, sides)) for sides in (mask.size, size))
        raise _bad_mask(f"is {is_} and the image, upright, {wanted}")
    if not mask.has_transparency_data:
        raise _bad_mask("has no alpha channel; where it is transparent (alpha 0) may change")
    try:
        return mask.convert("RGBA").getchannel("A")
    except Exception:
        raise _bad_mask("is damaged") from None


def _bad_mask(said: str) -> BadRequestError:
    return BadRequestError(f"the mask {said}", param="mask")
