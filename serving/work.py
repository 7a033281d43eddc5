"""What a request costs: images, megapixels that are held in memory, megapixel-steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from dim.errors import InputError
from dim.images import read_header
from dim.model.config import Fit
from dim.model.sizes import Size, nearest_shape
from serving.errors import BadRequestError
from serving.jobs import Defaults

PIXELS = 1_000_000


@dataclass(frozen=True)
class Work:
    """What the images of one request cost together.

    Attributes:
        images: how many are painted.
        megapixels: of the source and of every image that is given back: what memory it takes.
        megapixel_steps: of what the painter paints, times the steps: how long it takes.
    """

    images: float = 0.0
    megapixels: float = 0.0
    megapixel_steps: float = 0.0

    def amounts(self) -> Mapping[str, float]:
        """By their names."""
        return asdict(self)


def work_of(images: int, source: Size | None, painted: Size, given_back: Size, steps: int) -> Work:
    """The work of ``images`` of one request; all sizes are (width, height) in pixels.

    Args:
        source: of the picture that is edited, if there is one.
        painted: what the painter works on.
        given_back: what the client gets.
    """
    held = (area(source) if source else 0) + images * area(given_back)
    return Work(
        images=images,
        megapixels=held / PIXELS,
        megapixel_steps=images * area(painted) * steps / PIXELS,
    )


def painted_size(source: Size, fit: Fit, defaults: Defaults) -> Size:
    """What the painter works on to edit a picture: a shape near its own, or a square."""
    side = defaults.resolution
    if fit == "square":
        return side, side
    return nearest_shape(source, side, defaults.size_multiple)


def check_output(images: int, given_back: Size, most: int, param: str) -> None:
    """Refuse more pixels than an answer may have, before any of them is decoded or painted.

    Raises:
        BadRequestError: ``images`` of such a size together have more than ``most``.
    """
    if images * area(given_back) > most:
        width, height = given_back
        raise BadRequestError(
            f"{images} of {width}x{height} are {images * area(given_back):,} pixels, more than the "
            f"{most:,} that one request may have painted; ask for fewer or smaller images",
            param=param,
        )


def source_size(data: bytes, max_pixels: int) -> Size:
    """(width, height) of a client's upright picture, by its header; nothing is decoded.

    Raises:
        BadRequestError: it is no picture that can be read, or has more than ``max_pixels``.
    """
    if not data:
        raise BadRequestError("the image is empty", param="image")
    try:
        header = read_header(data)
    except InputError as error:
        raise BadRequestError(str(error), param="image") from None
    size = header.width, header.height
    if area(size) > max_pixels:
        raise BadRequestError(
            f"the image has {size[0]}x{size[1]} = {area(size):,} pixels, more than the "
            f"{max_pixels:,} allowed",
            param="image",
        )
    return size


def area(size: Size) -> int:
    """In pixels."""
    return size[0] * size[1]
