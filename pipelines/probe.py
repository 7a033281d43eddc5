"""What a picture is by its header, as who reads it and who filters it need to know."""

from __future__ import annotations

from dim.errors import InputError
from dim.images import TooManyPixels, read_header
from pipelines.outcome import Rejection


def probe(image: bytes, name: str) -> tuple[int, int]:
    """Width and height of an encoded image as it is to be seen, read off its header.

    It is the decoding's own reading of it; an image of a format that cannot be decoded is none.

    Raises:
        Rejection: ``image.undecodable`` or ``image.too_large``.
    """
    try:
        header = read_header(image, name=name)
    except TooManyPixels as error:
        raise Rejection("image.too_large", str(error)) from None
    except InputError as error:
        raise Rejection("image.undecodable", str(error)) from None
    return header.width, header.height
