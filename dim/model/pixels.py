"""Pictures in and out of the model: PIL on one side, tensors in [-1, 1] on the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor


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
