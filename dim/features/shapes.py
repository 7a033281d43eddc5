"""The shapes of samples, known before a picture is decoded.

With buckets a sample's pictures are cut to one of SANA's shapes, and a batch holds one of them. So
the order of the samples has to know each one's shape. Records of data jobs tell it by their
``width`` and ``height``, features by their ``latent_shape``; where a record does not, the header of
its encoded image does.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dim.errors import InputError, UnreadableFile
from dim.features.row_groups import RowGroups
from dim.features.shards import FeatureShards, ImageShards
from dim.images import read_header
from dim.model.sizes import Size, nearest_shape, shapes

_AT_ONCE = 16  # files: an object store answers in tens of milliseconds
_HEADERS = 64  # encoded images held at a time, in each of these
SIDES = ("width", "height")
"""The columns of image records that tell the shape: of edits, the source's sides in pixels."""


@lru_cache
def sizes(resolution: int, cell: int) -> tuple[Size, ...]:
    """Every size (width, height) that pictures are cut to; a shape's id is its place here.

    Args:
        resolution: The side of the square that has about their area, in pixels.
        cell: Sides are multiples of so many pixels.
    """
    return tuple(sorted(set(shapes(resolution, cell).values())))


def shape_ids(
    samples: ImageShards | FeatureShards | pa.Table | pa.RecordBatch, resolution: int, cell: int
) -> NDArray[np.int16]:
    """The shape (rows,) of each sample, in order, as ids of ``sizes``.

    Of image shards the columns ``width`` and ``height`` are read (of edits the source's, which
    decides), 8 bytes a sample; where they say nothing, the encoded images, to look at their
    headers. Of feature shards ``latent_shape`` is read. What cannot be read, or is no picture, has
    the shape of a square: it is found out when it is drawn, as every bad sample is.

    Args:
        samples: Shards, or some of their records.
        resolution, cell: As for ``sizes``.

    Raises:
        InputError: a latent is none of ``sizes``; a file is not what its manifest says.
        StorageError: the store does not answer, or refuses.
    """
    if isinstance(samples, ImageShards | FeatureShards):
        groups = samples.groups
        work = partial(_of_file, groups, resolution=resolution, cell=cell)
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="shapes") as pool:
            return np.concatenate(list(pool.map(work, range(len(groups.files)))))
    if "latent_shape" in samples.schema.names:
        return _by_latents(samples.column("latent_shape"), resolution, cell)
    ids = _by_sides(samples, resolution, cell)
    for row in np.flatnonzero(ids < 0).tolist():
        ids[row] = _by_header(samples.column("image")[row].as_py(), resolution, cell)
    return ids


def _of_file(groups: RowGroups, number: int, *, resolution: int, cell: int) -> NDArray[np.int16]:
    def by_columns(parquet: pq.ParquetFile) -> NDArray[np.int16] | None:
        there = parquet.schema_arrow.names
        names = ["latent_shape"] if "latent_shape" in there else list(SIDES)
        if not set(names) <= set(there):
            return None
        table = parquet.read(columns=names, use_threads=False)
        if names == list(SIDES) and (_by_sides(table, resolution, cell) < 0).any():
            return None
        return shape_ids(table, resolution, cell)

    def by_headers(parquet: pq.ParquetFile) -> NDArray[np.int16]:
        names = [name for name in (*SIDES, "image") if name in parquet.schema_arrow.names]
        parts = parquet.iter_batches(_HEADERS, columns=names, use_threads=False)
        return np.concatenate([shape_ids(part, resolution, cell) for part in parts])

    try:
        ids = groups.read(number, by_columns, pre_buffer=True)
        return groups.read(number, by_headers) if ids is None else ids
    except UnreadableFile:
        return np.full(groups.files[number].rows, _square(resolution, cell), np.int16)
    except InputError as error:
        raise InputError(f"{groups.files[number].address}: {error}") from None


def _by_sides(rows: pa.Table, resolution: int, cell: int) -> NDArray[np.int16]:
    """Ids by the columns of sides; -1 where they say nothing."""
    ids = np.full(rows.num_rows, -1, np.int16)
    types = [field.type for field in rows.schema if field.name in SIDES]
    if len(types) != 2 or not all(map(pa.types.is_integer, types)):
        return ids
    width, height = (
        pc.fill_null(rows.column(name), 0).to_numpy(zero_copy_only=False) for name in SIDES
    )
    (known,) = np.nonzero((width > 0) & (height > 0))
    table = shapes(resolution, cell)
    of_ratio = np.array([sizes(resolution, cell).index(size) for size in table.values()], np.int16)
    # As ``nearest_shape`` chooses: of equally near ones the first.
    apart = np.abs(np.array(list(table)) - (height[known] / width[known])[:, None])
    ids[known] = of_ratio[apart.argmin(axis=1)]
    return ids


def _by_header(image: bytes | None, resolution: int, cell: int) -> int:
    try:
        header = read_header(image or b"")
    except InputError:
        return _square(resolution, cell)
    size = header.width, header.height
    return sizes(resolution, cell).index(nearest_shape(size, resolution, cell))


def _by_latents(found: pa.ChunkedArray | pa.Array, resolution: int, cell: int) -> NDArray[np.int16]:
    # No two sizes have one ratio, so nothing has to be known of the autoencoder's cells.
    of_ratio = {Fraction(*size): number for number, size in enumerate(sizes(resolution, cell))}
    known: dict[tuple[int, ...] | None, int] = {None: _square(resolution, cell)}

    def id_of(shape: tuple[int, ...] | None) -> int:
        if shape not in known:
            if shape is None or len(shape) != 3 or not all(side and side > 0 for side in shape):
                raise InputError(f"a latent's shape cannot be {shape}")
            ratio = Fraction(shape[2], shape[1])
            if ratio not in of_ratio:
                raise InputError(
                    f"a latent of {shape[2]}x{shape[1]} cells is none of the shapes of "
                    f"{resolution} px in cells of {cell} px"
                )
            known[shape] = of_ratio[ratio]
        return known[shape]

    def every() -> Iterator[int]:
        for shape in found.to_pylist():
            yield id_of(None if shape is None else tuple(shape))

    return np.fromiter(every(), np.int16, len(found))


def _square(resolution: int, cell: int) -> int:
    return sizes(resolution, cell).index(nearest_shape((1, 1), resolution, cell))
