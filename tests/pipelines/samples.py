"""Small inputs for the pipelines' tests."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.readers.sources import Source


def read_here(source: Source, *ranges: dict[str, Any]) -> Iterator[pa.Table]:
    """The records of some ranges of a source, or of all, in this process."""
    for each in ranges or source.ranges:
        yield from map(source.reader.table, source.reader.parts(each))


def photo(seed: int = 0, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """A smooth random picture, different for every seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def edited(image: Image.Image) -> Image.Image:
    """The picture with something put into it."""
    result = image.copy()
    width, height = image.size
    box = (width // 4, height // 4, width // 2, height // 2)
    result.paste((255, 0, 0), box)
    return result


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """A picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def bomb(side: int = 17_500) -> bytes:
    """A PNG of a few hundred bytes that says it has 306 megapixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(10_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def write_pairs(folder: Path, count: int, **columns: Any) -> Path:
    """A JSONL file of ``count`` good pairs with their images; returns its path."""
    (folder / "image").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        source = photo(number)
        (folder / "image" / f"{number}_source.png").write_bytes(encoded(source))
        (folder / "image" / f"{number}_target.png").write_bytes(encoded(edited(source)))
        lines.append(
            {
                "id": f"pair-{number}",
                "image_path": f"image/{number}_source.png",
                "image_path_target": f"image/{number}_target.png",
                "prompt": f"Add red box number {number}.",
                **columns,
            }
        )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
