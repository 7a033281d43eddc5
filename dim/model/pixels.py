"""Pictures in and out of the model: PIL on one side, tensors in [-1, 1] on the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dim.errors import InputError
from dim.images import MAX_PIXELS, MIN_SIDE, convert_image


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


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The middle square of ``image`` with its shortest side resized to ``resolution`` pixels."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    square = (left, top, left + resolution, top + resolution)
    if scale == 1:
        return image.crop(square)
    # Only the square is resized: a thin strip's other pixels would be a thousandfold.
    across, down = image.width / width, image.height / height
    box = (square[0] * across, square[1] * down, square[2] * across, square[3] * down)
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)


def stretched(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """All of ``image`` brought to ``size`` (width, height); of that size it is returned itself."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB images of one size as float32 (B, 3, H, W) in [-1, 1]."""
    return from_bytes(torch.stack([to_bytes(image) for image in images]))


def to_bytes(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (H, W, 3): a quarter of what its pixels take as floats."""
    return torch.from_numpy(np.array(image))


def from_bytes(images: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [-1, 1], on the same device."""
    return images.float().permute(0, 3, 1, 2).contiguous() / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], clipped, as RGB images."""
    bytes_ = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(array) for array in bytes_.permute(0, 2, 3, 1).cpu().numpy()]
