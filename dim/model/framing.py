"""Pictures as a model is shown them: upright, cut or stretched to a size; and put together."""

from __future__ import annotations

from PIL import Image

from dim.errors import InputError
from dim.images import MAX_PIXELS, MIN_SIDE, convert_image
from dim.model.sizes import Size

Box = tuple[float, float, float, float]
"""A region of a picture in its own pixels: left, upper, right and lower edge."""


def upright_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """``image`` as :func:`dim.images.decode_image` returns that of a file: upright 8-bit sRGB.

    Raises:
        InputError: no PIL image, damaged, too small or too large, or of an undefined range.
    """
    if not isinstance(image, Image.Image):
        raise InputError(f"{name} must be a PIL image, not a {type(image).__name__}")
    width, height = image.size
    if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is {width}x{height}; each side must have {MIN_SIDE} px or more, and the "
            f"whole at most {MAX_PIXELS:,} pixels"
        )
    return convert_image(image, name)


def centre_box(size: Size, shape: Size) -> Box:
    """The middle region of a picture of ``size`` that is ``shape`` when resized, not stretched."""
    scale = max(shape[0] / size[0], shape[1] / size[1])
    width, height = (
        max(wanted, round(side * scale)) for side, wanted in zip(size, shape, strict=True)
    )
    left, top = (width - shape[0]) // 2, (height - shape[1]) // 2
    across, down = size[0] / width, size[1] / height
    return left * across, top * down, (left + shape[0]) * across, (top + shape[1]) * down


def centre_crop(image: Image.Image, shape: Size) -> Image.Image:
    """The middle of ``image``, as much as fits into ``shape`` without stretching, of that size."""
    return stretched(image, shape, centre_box(image.size, shape))


def stretched(image: Image.Image, size: Size, box: Box | None = None) -> Image.Image:
    """The region ``box`` of ``image``, or all of it, brought to ``size``.

    All of an image that has that size is returned itself. Only the region is resized: a thin
    strip's other pixels would be a thousandfold.
    """
    if box is None:
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    if (box[2] - box[0], box[3] - box[1]) == size and all(edge == int(edge) for edge in box):
        return image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
    return image.resize(size, Image.Resampling.BICUBIC, box=box)


def composite(image: Image.Image, source: Image.Image, mask: Image.Image) -> Image.Image:
    """``image`` where ``mask`` is 128 or more, and elsewhere the very pixels of ``source``.

    Args:
        image, source: RGB, of one size.
        mask: of mode L and that size.

    Raises:
        InputError: the sizes differ.
    """
    if not image.size == source.size == mask.size:
        sizes = ", ".join(f"{w}x{h}" for w, h in (image.size, source.size, mask.size))
        raise InputError(f"image, source and mask must have one size, not {sizes}")
    return Image.composite(image, source, mask.point([0] * 128 + [255] * 128))
