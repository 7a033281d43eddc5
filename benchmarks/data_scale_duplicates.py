"""Finding duplicates: what a crowd costs, and what a data set in which nothing is alike costs.

    python -m benchmarks.data_scale_duplicates       # a minute
    python -m benchmarks.data_scale_duplicates --table   # seconds by number of records

A crowd is of pairs whose hashes are within 4 bits of one another, for one picture has only some
2,000 hashes that are; embeddings are random, and every tenth one is near one before it. One
process, no Ray.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer
from numpy.typing import NDArray

from benchmarks.row import Row
from pipelines.filters import cells
from pipelines.filters.near import HashStars

FEW, MANY = 10_000, 100_000
LIKE, FEATURES = 0.05, 64  # of embeddings: the noise between twins, and how wide they are
MAX_COSINE = 0.95
RECORDS = 40_000  # with embeddings


def crowd(count: int) -> list[NDArray[np.uint64]]:
    """Hashes of pairs within 4 bits of one another, both images."""
    rng = np.random.default_rng(0)
    flipped = np.uint64(1) << rng.integers(0, 64, (2, 2, count)).astype(np.uint64)
    return list(np.uint64(0x0F0FF0F012345678) ^ flipped[0] ^ flipped[1])


def apart(count: int) -> list[NDArray[np.uint64]]:
    """Hashes of pictures that have nothing in common."""
    return [np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)]


@cache
def seconds(count: int, *, alike: bool) -> float:
    """How long it takes to find the near duplicates among so many, the best of three."""
    hashes = crowd(count) if alike else apart(count)
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        stars = HashStars(hashes, np.zeros(count, np.uint64), 4)
        stays = stars.stay()
        stars.nearest(stays)
        best = min(best, time.perf_counter() - start)
        assert stays.sum() == (1 if alike else count)
    return float(best)


def embedded(count: int) -> pa.Table:
    """Records with embeddings: every tenth is like the one nine places before it."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(count, FEATURES)).astype(np.float32)
    noise = rng.normal(size=(count, FEATURES)) * LIKE
    vectors[9::10] = vectors[: len(vectors[9::10]) * 10 : 10] + noise[9::10]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    columns = [
        pa.nulls(count, pa.int32()),
        pa.array(np.arange(count)),
        pa.array(np.zeros(count, np.uint64)),
        pa.array([vector.astype(np.float16).tobytes() for vector in vectors], pa.binary()),
    ]
    return pa.table(columns, schema=cells.EMBEDDED)


@cache
def by_embedding(count: int, per_cell: int) -> tuple[float, float]:
    """Seconds to find duplicates in cells of that size, and which share of them is found."""
    table = embedded(count)
    start = time.perf_counter()
    vectors = cells.unit_vectors(table["embeddings"], 1)
    wanted = -(-count // per_cell)
    centres = cells.centres(vectors[:: max(1, count // cells.sample_size(wanted))], wanted)
    where = cells.in_cells(vectors, centres)
    find = cells.CellStars(MAX_COSINE, 1).alike
    found = sum(find(table.filter(pa.array(where == cell))).num_rows for cell in range(wanted))
    return time.perf_counter() - start, found / (count // 10)


ROWS = (
    Row(
        "near-crowd",
        "seconds of 100,000 pairs within 4 bits of each other, to those of 10,000",
        None,
        25,
        "less",
        lambda: seconds(MANY, alike=True) / seconds(FEW, alike=True),
    ),
    Row(
        "near-apart",
        "microseconds a picture, of 100,000 that have nothing in common",
        None,
        60,
        "less",
        lambda: 1e6 * seconds(MANY, alike=False) / MANY,
    ),
    Row(
        "embeddings-cells",
        f"seconds of {RECORDS:,} embeddings in cells of 2,000, to those in one cell",
        None,
        0.5,
        "less",
        lambda: by_embedding(RECORDS, 2000)[0] / by_embedding(RECORDS, RECORDS)[0],
    ),
    Row(
        "embeddings-found",
        "share of twins by embeddings that lie in one cell, of cells of 2,000",
        None,
        0.9,
        "more",
        lambda: by_embedding(RECORDS, 2000)[1],
    ),
)


def main(
    table: Annotated[bool, typer.Option(help="Seconds by number of records.")] = False,
) -> None:
    """Measure; with status 1 when a bar is missed."""
    if table:
        for count in (FEW, MANY):
            print(
                f"{count:,}: crowd {seconds(count, alike=True):.3f} s, "
                f"apart {seconds(count, alike=False):.3f} s"
            )
        return
    figures = [(row, row.measure()) for row in ROWS]
    for row, figure in figures:
        print(f"{row.name}: {figure:.3g} (bar {row.bar:g}): {row.what}")
    if not all(row.holds(figure) for row, figure in figures):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
