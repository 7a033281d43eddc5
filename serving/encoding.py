"""From a painted image to the file that a client gets."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

OutputFormat = Literal["png", "jpeg", "webp"]

LOSSLESS = 100
LONGEST_SIDE = {"png": 2**31 - 1, "jpeg": 65_535, "webp": 16_383}
"""In pixels, of each format."""


@dataclass(frozen=True)
class Output:
    """The file that is made of an image.

    ``compression``: OpenAI's ``output_compression``, from 0 (smallest) to 100 (best): the quality
    of a JPEG or WebP, and at 100 a WebP is lossless. PNG always is, whatever it says.
    """

    format: OutputFormat = "png"
    compression: int = LOSSLESS

    @property
    def lossless(self) -> bool:
        """Whether the file has exactly the image's pixels."""
        return self.format == "png" or (self.format == "webp" and self.compression == LOSSLESS)


def encode(image: Image.Image, output: Output) -> bytes:
    """``image``, of mode RGB, as a file; it takes time and belongs off the event loop."""
    buffer = io.BytesIO()
    image.save(buffer, format=output.format, **_options(output))
    return buffer.getvalue()


def _options(output: Output) -> dict[str, Any]:
    if output.format == "png":
        return {}
    if output.format == "jpeg":
        return {"quality": output.compression, "subsampling": "4:4:4"}
    return {"lossless": output.lossless, "quality": output.compression}
