"""The shape of each sample, known before a picture is decoded, as the order needs it."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dim.errors import InputError, SampleError
from dim.features.row_groups import Row
from dim.features.shards import FeatureShards, ImageShards
from dim.model.sizes import Size, nearest_shape, shapes

_AT_ONCE = 4096  # rows


@lru_cache
def sizes(resolution: int, cell: int) -> tuple[Size, ...]:
    """Every size (width, height) that pictures are cut to; a shape's id is its place here.

    Args:
        resolution: The side of the square that has about their area, in pixels.
        cell: Sides are multiples of so many pixels.
    """
    return tuple(sorted(set(shapes(resolution, cell).values())))


def shape_ids(
    samples: ImageShards | FeatureShards, resolution: int, cell: int
) -> NDArray[np.int16]:
    """The shape (rows,) of each sample, in order, as ids of ``sizes``.

    A sample of which it cannot be known counts as a square.

    Raises:
        InputError: a latent is none of ``sizes``; a file is not what its manifest says.
        StorageError: the store does not answer, or refuses.
    """
    names = samples.groups.schema().names
    told = ["latent_shape"] if "latent_shape" in names else ["width", "height"]
    columns = told if set(told) <= set(names) else ["image"]
    table = sizes(resolution, cell)
    square = nearest_shape((1, 1), resolution, cell)
    ids = np.empty(samples.groups.rows, np.int16)
    for first in range(0, len(ids), _AT_ONCE):
        rows = np.arange(first, min(first + _AT_ONCE, len(ids)))
        for number, row in zip(rows, samples.groups.fetch(rows, columns), strict=True):
            size = square if isinstance(row, SampleError) else _size(row, resolution, cell)
            ids[number] = table.index(size or square)
    return ids


def _size(row: Row, resolution: int, cell: int) -> Size | None:
    if "latent_shape" in row:
        _, height, width = row["latent_shape"]
        for size in sizes(resolution, cell):
            if size[0] * height == size[1] * width:
                return size
        raise InputError(
            f"a latent of {width}x{height} cells (sample {row['id']!r}) is none of the shapes of "
            f"{resolution} px in cells of {cell} px"
        )
    if "width" in row:
        return nearest_shape((row["width"], row["height"]), resolution, cell)
    try:
        with Image.open(io.BytesIO(row["image"])) as image:
            return nearest_shape(image.size, resolution, cell)
    except OSError:
        return None
