"""Duplicates among all records of a data set: tasks look for them, and the driver passes on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from numpy.typing import NDArray

from dim.redaction import redact
from pipelines.attempts import stop_after
from pipelines.filters import cells
from pipelines.filters.duplicates import (
    EMBEDDING,
    LOSERS,
    DuplicateRules,
    explained,
    find_duplicates,
)
from pipelines.outcome import KEPT
from pipelines.ranges import Piece, tasks_for

_SMALL_BYTES = 100_000  # what travels with a worker's other settings
_BYTES_AT_ONCE = 1 << 20  # that the driver holds of what passes, in tables that each cost more
_READERS = 16  # an object store answers each in its own time


class Verdicts(Protocol):
    """Where verdicts lie."""

    def read(self, piece: Piece, /) -> pa.Table:
        """Those on the records of a piece: :data:`pipelines.filters.duplicates.SIGNATURE` with
        outcomes."""
        ...


@dataclass(frozen=True)
class Part:
    """Verdicts on a cut, as those who look for duplicates read them.

    Attributes:
        kept: where they are.
        cut: which ones.
        source: the earlier data set that they are about, if they are.
        first: then the place of the first of its records. They are counted here, below 0, for
            those that they have are of another input.
    """

    kept: Verdicts
    cut: Piece
    source: str | None = None
    first: int = 0

    def read(self) -> pa.Table:
        """All columns of them."""
        return self.placed(self.kept.read(self.cut))

    def placed(self, table: pa.Table) -> pa.Table:
        """Some columns of them, with the places that count here."""
        if self.source is None:
            return table
        places = pa.array(np.arange(self.first, self.first + table.num_rows), pa.int64())
        return table.set_column(table.schema.get_field_index("index"), "index", places)

    def names(self, places: NDArray[np.int64]) -> dict[int, str]:
        """What some of the records are called in a sentence."""
        found = self.read().select(["index", "id"])
        found = found.filter(pc.is_in(found["index"], value_set=pa.array(places)))
        of = "" if self.source is None else f" of {redact(self.source)}"
        return {row["index"]: f"{row['id']!r}{of}" for row in found.to_pylist()}


class Everything:
    """What is known of all records together; the driver passes it on, and keeps none of it."""

    def __init__(self) -> None:
        self._parts: list[tuple[Part, int, int]] = []  # with the first and the last place
        self._kept = 0
        self._tables: list[ray.ObjectRef] = []
        self._waiting: list[pa.Table] = []
        self._bytes = 0

    def add(self, part: Part, known: pa.Table) -> None:
        """More of it: :data:`pipelines.filters.duplicates.KNOWN` of a part."""
        if not known.num_rows:
            return
        known = part.placed(known)
        places = known["index"].to_numpy()
        self._parts.append((part, int(places.min()), int(places.max())))
        self._kept += pc.sum(known["kept"]).as_py()
        self._waiting.append(known)
        self._bytes += known.nbytes
        if self._bytes >= _BYTES_AT_ONCE:
            self._pass_on()

    def losers(self, rules: DuplicateRules, images: int) -> pa.Table | ray.ObjectRef:
        """The duplicates, each with a sentence that names its twin; where they are, if many.

        Args:
            rules: what a duplicate is.
            images: of a record.
        """
        self._pass_on()
        if not self._tables:
            return explained(LOSERS.empty_table(), {})
        losers = ray.remote(_search).remote(self._tables, rules)
        if rules.embedding_model is not None and self._kept:
            alike = self._alike(losers, rules, images)
            losers = ray.put(pa.concat_tables([ray.get(losers), alike]).sort_by("index"))
        named = ray.remote(_named).remote(self._parts, losers)
        found = ray.get(named)
        return found if found.nbytes <= _SMALL_BYTES else named

    def _pass_on(self) -> None:
        if self._waiting:
            self._tables.append(ray.put(pa.concat_tables(self._waiting).combine_chunks()))
            self._waiting, self._bytes = [], 0

    def _alike(self, losers: ray.ObjectRef, rules: DuplicateRules, images: int) -> pa.Table:
        """Those by their embeddings, among what ``losers`` leave."""
        count = cells.cells_wanted(self._kept)
        parts = [part for part, _, _ in self._parts]
        sampled = math.ceil(cells.sample_size(count) * len(parts) / self._kept)
        centres = ray.remote(_centres).remote(
            parts[:: max(1, len(parts) // sampled)], count, images
        )
        numbers = ray.data.from_items(
            [{"part": number} for number in range(len(parts))],
            override_num_blocks=tasks_for(len(parts)),
        )
        found = (
            numbers.map_batches(
                InCells(ray.put(parts), losers, centres, images),
                batch_format="pyarrow",
                batch_size=1,
            )
            .groupby("cell", num_partitions=tasks_for(count))
            .map_groups(cells.CellStars(rules.max_cosine, images).alike, batch_format="pyarrow")
        )
        tables: Any = found.iter_batches(batch_size=None, batch_format="pyarrow")
        full = [table for table in tables if table.num_rows]  # others may have no columns
        alike = pa.concat_tables([cells.ALIKE.empty_table(), *full])
        more = {
            "reason": pa.array([EMBEDDING] * alike.num_rows, pa.string()),
            "threshold": pa.array([rules.max_cosine] * alike.num_rows, pa.float64()),
        }
        columns = [more[name] if name in more else alike[name] for name in LOSERS.names]
        return pa.table(columns, schema=LOSERS)


@dataclass(frozen=True)
class InCells:
    """What a task does that puts the records of some parts into cells.

    Attributes:
        parts: where all of them are.
        losers: where those are that are out already.
        centres: where those of the cells are.
        images: of a record.
    """

    parts: ray.ObjectRef
    losers: ray.ObjectRef
    centres: ray.ObjectRef
    images: int

    def __call__(self, numbers: pa.Table) -> Iterator[pa.Table]:
        """Numbers of parts in, :data:`pipelines.filters.cells.EMBEDDED` out."""
        stop_after()
        parts, losers, centres = ray.get([self.parts, self.losers, self.centres])
        for number in numbers["part"].to_pylist():
            table = _kept(parts[number])
            left = table.filter(pc.invert(pc.is_in(table["index"], value_set=losers["index"])))
            vectors = cells.unit_vectors(left["embeddings"], self.images)
            where = cells.in_cells(vectors, centres)
            left = left.append_column("cell", pa.array(where))
            yield left.select(cells.EMBEDDED.names).cast(cells.EMBEDDED)


def _kept(part: Part) -> pa.Table:
    table = part.read()
    return table.filter(pc.equal(table["outcome"], KEPT))


def _centres(parts: Sequence[Part], count: int, images: int) -> NDArray[np.float32]:
    """What a task does that divides the data set into cells."""
    stop_after()
    if count == 1:
        return np.zeros((1, 1), np.float32)
    with ThreadPoolExecutor(_READERS) as pool:
        sample = pa.concat_tables(pool.map(_kept, parts))
    return cells.centres(cells.unit_vectors(sample["embeddings"], images), count)


def _search(tables: Sequence[ray.ObjectRef], rules: DuplicateRules) -> pa.Table:
    """What a task does that looks for duplicates by content and hash."""
    stop_after()
    return find_duplicates(pa.concat_tables(ray.get(list(tables))), rules)


def _named(parts: Sequence[tuple[Part, int, int]], losers: pa.Table) -> pa.Table:
    """What a task does that finds out what the twins are called, where the verdicts lie."""
    stop_after()
    twins = np.unique(losers["twin"].to_numpy())
    asked = [
        (part, twins[low:high])
        for part, first, last in parts
        for low, high in [np.searchsorted(twins, [first, last + 1])]
        if low < high
    ]
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda each: each[0].names(each[1]), asked))
    return explained(losers, {place: name for some in found for place, name in some.items()})
