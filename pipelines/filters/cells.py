"""Duplicates by embeddings, in cells: a record is compared with those that k-means puts with it.

So the work grows with the size of a cell and not with that of the data set, as in SemDeDup (Abbas
et al. 2023). Of two that are alike but lie in two cells, both stay; up to :data:`PER_CELL` records
there is one cell, and nothing is missed. Within a cell, what is like a record that stays goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq

Vectors = NDArray[np.float32]

PER_CELL = 8192
"""Records of a cell, about."""

EMBEDDED = pa.schema(
    [
        pa.field("cell", pa.int32()),
        pa.field("index", pa.int64()),
        pa.field("text_key", pa.uint64()),
        pa.field("embeddings", pa.binary()),
    ]
)
"""A record and the cell that it is in; ``index`` is below 0 for one that stays in any case."""

ALIKE = pa.schema([("index", pa.int64()), ("twin", pa.int64()), ("value", pa.float64())])
"""Records that are one too many, the one before that stays, and their cosine."""

_SAMPLED = 32  # records for each cell
_ROUNDS = 10
_COMPARED = 1024  # records with each other at once


def cells_wanted(records: int) -> int:
    """How many cells so many records are put in."""
    return math.ceil(records / PER_CELL)


def sample_size(cells: int) -> int:
    """Of how many records' embeddings the centres of cells are made."""
    return _SAMPLED * cells


def centres(sample: Vectors, cells: int) -> Vectors:
    """The centres of cells (C, images x D) by k-means over a sample (N, images, D).

    It begins evenly spread, and ends the same on machines that multiply in the same order.
    """
    sample = _flat(sample)
    first = sample[np.linspace(0, len(sample) - 1, min(cells, len(sample))).astype(int)]
    if len(first) < 2:
        return first
    found, _ = kmeans2(sample, first, iter=_ROUNDS, minit="matrix", missing="warn")
    return found.astype(np.float32)


def in_cells(vectors: Vectors, centres: Vectors) -> NDArray[np.int32]:
    """The cell (N,) of records by their vectors (N, images, D)."""
    if len(centres) < 2 or not len(vectors):
        return np.zeros(len(vectors), np.int32)
    return np.asarray(vq(_flat(vectors), centres)[0], np.int32)


def unit_vectors(stored: pa.ChunkedArray, images: int) -> Vectors:
    """(N, images, D) of the column ``embeddings``, of unit length again: float16 had rounded it."""
    if not len(stored):
        return np.zeros((0, images, 0), np.float32)
    raw = b"".join(stored.to_pylist())
    wide = np.frombuffer(raw, np.float16).astype(np.float32).reshape(len(stored), images, -1)
    return wide / np.maximum(np.linalg.norm(wide, axis=2, keepdims=True), 1e-12)


def _flat(vectors: Vectors) -> Vectors:
    return vectors.reshape(len(vectors), vectors.shape[1] * vectors.shape[2])


@dataclass(frozen=True)
class CellStars:
    """Finds the records of one cell that are like another one that stays.

    Attributes:
        max_cosine: of two records that both stay; of a pair, the less similar image counts.
        images: of a record.
    """

    max_cosine: float
    images: int

    def alike(self, cell: pa.Table) -> pa.Table:
        """:data:`EMBEDDED` of one cell in, :data:`ALIKE` out."""
        cell = cell.sort_by("index")
        index, text = (cell[name].to_numpy() for name in ("index", "text_key"))
        vectors = unit_vectors(cell["embeddings"], self.images)
        stars = np.zeros(0, np.int64)
        found: list[tuple[int, int, float]] = []
        for first in range(0, cell.num_rows, _COMPARED):
            rows = np.arange(first, min(first + _COMPARED, cell.num_rows))
            best, cosine = self._nearest(vectors, text, rows, stars)
            among = self._cosines(vectors, text, rows, rows)
            stay = np.zeros(len(rows), np.bool_)
            for place, row in enumerate(rows.tolist()):
                before = np.where(stay, among[place], -2)
                nearest = int(before.argmax())
                if before[nearest] > cosine[place]:
                    best[place], cosine[place] = rows[nearest], before[nearest]
                stay[place] = index[row] < 0 or cosine[place] <= self.max_cosine
                if not stay[place]:
                    found.append((index[row], index[best[place]], cosine[place]))
            stars = np.concatenate([stars, rows[stay]])
        columns = zip(*found, strict=True) if found else ((), (), ())
        return pa.table([list(column) for column in columns], schema=ALIKE)

    def _nearest(
        self,
        vectors: Vectors,
        text: NDArray[np.uint64],
        rows: NDArray[np.int64],
        stars: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], Vectors]:
        """The star that each record is most like, the earliest of several, and the cosine."""
        best, cosine = np.zeros(len(rows), np.int64), np.full(len(rows), -2, np.float32)
        for first in range(0, len(stars), _COMPARED):
            some = stars[first : first + _COMPARED]
            cosines = self._cosines(vectors, text, rows, some)
            place = cosines.argmax(1)
            value = cosines[np.arange(len(rows)), place]
            better = value > cosine
            best[better], cosine[better] = some[place[better]], value[better]
        return best, cosine

    def _cosines(
        self,
        vectors: Vectors,
        text: NDArray[np.uint64],
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
    ) -> Vectors:
        each = [vectors[rows, n] @ vectors[columns, n].T for n in range(self.images)]
        return np.where(text[rows][:, None] == text[columns], np.min(each, axis=0), -2)
