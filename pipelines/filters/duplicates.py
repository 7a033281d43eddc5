"""Duplicates across a whole data set: the first of several stays, by its place in the input.

They are found among the records that passed the filters, from what is known of each in some fifty
bytes: the same content, nearly the same perceptual hash, nearly the same embedding (which takes
more). A record goes only if one that stays is its twin; being like another that goes is not enough,
so a chain of small differences does not empty a data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from dim.config import StrictModel
from pipelines.filters.measures import HASH_BITS
from pipelines.outcome import KEPT, Rejection, Row, reject
from pipelines.outputs.files import by_place

EXACT, NEAR, EMBEDDING = "duplicate.exact", "duplicate.near", "duplicate.embedding"

SIGNATURE = pa.schema(
    [
        pa.field("index", pa.int64()),
        pa.field("id", pa.string()),
        pa.field("content_hash", pa.string()),
        pa.field("text_key", pa.uint64()),
        pa.field("hashes", pa.list_(pa.uint64())),
        pa.field("embeddings", pa.binary()),
    ]
)
"""What a record is known by without its pictures. ``hashes`` holds the pHash of each of its images,
``embeddings`` one unit-length float16 vector per image, end to end; ``text_key`` is the same
where the words are."""

KNOWN = pa.schema(
    [
        pa.field("index", pa.int64()),
        pa.field("content", pa.binary(16)),
        pa.field("text_key", pa.uint64()),
        pa.field("hashes", pa.list_(pa.uint64())),
        pa.field("kept", pa.bool_()),
        pa.field("embeddings", pa.binary()),
    ]
)
"""What is looked at of all records at once: at most 64 bytes of each but for ``embeddings``, which
are null where they are not wanted. ``content`` stands for ``content_hash``."""

TWINS = pa.schema([("first", pa.int64()), ("second", pa.int64()), ("value", pa.float64())])
"""Two places in the table of signatures, the earlier one first, and how far they are apart."""

LOSERS = pa.schema(
    [
        pa.field("index", pa.int64()),
        pa.field("twin", pa.int64()),
        pa.field("reason", pa.string()),
        pa.field("value", pa.float64()),
        pa.field("threshold", pa.float64()),
    ]
)
"""Records that are one too many: their place in the input, that of the one that stays, and why."""

_DETAILS = {
    EXACT: "the same as {id!r}",
    NEAR: "{value:.0f} of {bits} bits of the hash differ from {id!r}",
    EMBEDDING: "the embedding's cosine with {id!r} is {value:.4f}",
}
_SLICES = 8  # tasks per band
_COMPARED = 1024  # signatures against each other at once
_EMBEDDED = 2048  # embeddings against each other at once
_MIX = np.uint64(0x9E3779B97F4A7C15)

Find = Callable[[Callable[..., pa.Table], list[Row], pa.Table], pa.Table]


class DuplicateRules(StrictModel):
    """Which records are one too many."""

    exact: bool = True
    """Drop records of the same content: image files, and the instruction of a pair."""
    max_distance: int | None = Field(4, ge=0, le=15)
    """Bits of the 64 of a perceptual hash that differ between near duplicates, at most. Both
    images of a pair and its instruction must match. ``null`` switches this off."""
    embedding_model: str | None = None
    """Folder of a CLIP or DINO model to find duplicates with too. Every record is compared with
    every other: for some 100,000 records, not for many millions."""
    max_cosine: float = Field(0.95, gt=0, le=1)
    """Cosine of the embeddings of two records, at most."""

    @property
    def wanted(self) -> bool:
        """Whether anything is looked for."""
        return self.exact or self.max_distance is not None or self.embedding_model is not None


@dataclass(frozen=True)
class MatchBands:
    """Finds near duplicates by bands of their hashes (Manku et al. 2007).

    Of ``max_distance`` + 1 bands, two hashes that differ in ``max_distance`` bits have at least
    one in common, so comparing within equal bands finds every pair.
    """

    max_distance: int

    @property
    def tasks(self) -> list[Row]:
        """What there is to do, cut up."""
        bands = range(self.max_distance + 1)
        return [{"band": band, "slice": part} for band in bands for part in range(_SLICES)]

    def __call__(self, batch: pa.Table, signatures: pa.Table) -> pa.Table:
        """Bands in, :data:`TWINS` out."""
        hashes, text = _hashes(signatures), signatures["text_key"].to_numpy()
        found = [
            twins
            for task in batch.to_pylist()
            for group in self._groups(hashes[0], text, task["band"], task["slice"])
            for twins in self._within(group, hashes, text, task["band"])
        ]
        return pa.concat_tables([TWINS.empty_table(), *found])

    def _bits(self, hashes: NDArray[np.uint64], band: int) -> NDArray[np.uint64]:
        ends = np.linspace(0, HASH_BITS, self.max_distance + 2).astype(int)
        low, high = int(ends[band]), int(ends[band + 1])
        mask = (1 << (high - low)) - 1
        return (hashes >> np.uint64(low)) & np.uint64(mask)

    def _groups(
        self, hashes: NDArray[np.uint64], text: NDArray[np.uint64], band: int, part: int
    ) -> Iterator[NDArray[np.int64]]:
        """Places, in order, of signatures that agree in a band."""
        with np.errstate(over="ignore"):
            keys = self._bits(hashes, band) * _MIX ^ text
        mine = np.flatnonzero((keys * _MIX >> np.uint64(32)) % np.uint64(_SLICES) == part)
        mine = mine[np.argsort(keys[mine], kind="stable")]
        starts = np.flatnonzero(np.diff(keys[mine])) + 1
        return (group for group in np.split(mine, starts) if len(group) > 1)

    def _within(
        self,
        group: NDArray[np.int64],
        hashes: list[NDArray[np.uint64]],
        text: NDArray[np.uint64],
        band: int,
    ) -> Iterator[pa.Table]:
        for start in range(0, len(group), _COMPARED):
            rows = group[start : start + _COMPARED]
            for begin in range(start, len(group), _COMPARED):
                columns = group[begin : begin + _COMPARED]
                distance = np.max(
                    [np.bitwise_count(image[rows][:, None] ^ image[columns]) for image in hashes],
                    axis=0,
                )
                twin = (distance <= self.max_distance) & (rows[:, None] < columns)
                first, second = np.nonzero(twin)
                first, second, value = rows[first], columns[second], distance[twin]
                new = text[first] == text[second]
                for earlier in range(band):  # found there already
                    bits = self._bits(hashes[0], earlier)
                    new &= bits[first] != bits[second]
                if new.any():
                    yield _twins(first[new], second[new], value[new])


@dataclass(frozen=True)
class MatchEmbeddings:
    """Finds duplicates by the cosine of embeddings, each against each."""

    max_cosine: float

    def tasks(self, signatures: pa.Table) -> list[Row]:
        """What there is to do, cut up."""
        return [{"start": start} for start in range(0, signatures.num_rows, _EMBEDDED)]

    def __call__(self, batch: pa.Table, signatures: pa.Table) -> pa.Table:
        """Starts of ranges in, :data:`TWINS` out; of a pair, the less similar image counts."""
        images = len(_hashes(signatures))
        raw = b"".join(signatures["embeddings"].to_pylist())
        vectors = np.frombuffer(raw, np.float16).reshape(signatures.num_rows, images, -1)
        text = signatures["text_key"].to_numpy()
        found = [TWINS.empty_table()]
        for task in batch.to_pylist():
            rows = slice(task["start"], task["start"] + _EMBEDDED)
            for begin in range(task["start"], len(vectors), _EMBEDDED):
                columns = slice(begin, begin + _EMBEDDED)
                cosine = np.min(
                    [_cosine(vectors[rows, n], vectors[columns, n]) for n in range(images)], axis=0
                )
                first, second = np.nonzero(cosine > self.max_cosine)
                value = cosine[first, second]
                first, second = first + task["start"], second + begin
                new = (first < second) & (text[first] == text[second])
                found.append(_twins(first[new], second[new], value[new]))
        return pa.concat_tables(found)


def known_of(verdicts: pa.Table) -> pa.Table:
    """:data:`KNOWN` of records with :data:`SIGNATURE` and ``outcome``."""
    contents = [
        None if text is None else hashlib.blake2b(text.encode(), digest_size=16).digest()
        for text in verdicts["content_hash"].to_pylist()
    ]
    columns = {
        "content": pa.array(contents, pa.binary(16)),
        "kept": pc.equal(verdicts["outcome"], KEPT),
    }
    return pa.table(
        [columns[name] if name in columns else verdicts[name] for name in KNOWN.names],
        schema=KNOWN,
    )


def find_duplicates(known: pa.Table, rules: DuplicateRules, find: Find) -> pa.Table:
    """The records that are one too many among those that are kept.

    Args:
        known: :data:`KNOWN` of every record.
        rules: what a duplicate is.
        find: runs a matcher over its tasks, ``(matcher, tasks, signatures) -> TWINS``.

    Returns:
        :data:`LOSERS`, by place.
    """
    left = by_place(known)
    left = left.filter(left["kept"])
    found = [LOSERS.empty_table()]
    for step in (_exact, _near, _embedded):
        losers = step(left, rules, find)
        if losers.num_rows:
            found.append(losers)
            left = left.filter(pc.invert(pc.is_in(left["index"], value_set=losers["index"])))
    return pa.concat_tables(found).sort_by("index").combine_chunks()


def explained(losers: pa.Table, ids: Mapping[int, str]) -> pa.Table:
    """Losers with a sentence, ``detail``, that names the record that stays.

    Args:
        losers: :data:`LOSERS`.
        ids: of the records that stay, by their place.
    """
    details = [
        _DETAILS[row["reason"]].format(id=ids[row["twin"]], value=row["value"], bits=HASH_BITS)
        for row in losers.to_pylist()
    ]
    return losers.append_column("detail", pa.array(details, pa.string()))


def reject_duplicates(verdicts: pa.Table, losers: pa.Table) -> pa.Table:
    """Verdicts with those of ``losers``, explained ones by place, rejected; in the same order."""
    places, lost = verdicts["index"].to_numpy(), losers["index"].to_numpy()
    if not len(lost):
        return verdicts
    at = np.minimum(np.searchsorted(lost, places), len(lost) - 1)
    mine = np.flatnonzero(lost[at] == places)
    if not len(mine):
        return verdicts.combine_chunks()
    rows = verdicts.take(pa.array(mine)).to_pylist()
    for row, why in zip(rows, losers.take(pa.array(at[mine])).to_pylist(), strict=True):
        reject(row, Rejection(why["reason"], why["detail"], why["value"], why["threshold"]))
    changed = pa.Table.from_pylist(rows, schema=verdicts.schema)
    order = np.arange(verdicts.num_rows)
    order[mine] = verdicts.num_rows + np.arange(len(mine))
    return pa.concat_tables([verdicts, changed]).take(pa.array(order)).combine_chunks()


def _exact(left: pa.Table, rules: DuplicateRules, find: Find) -> pa.Table:
    if not rules.exact or not left.num_rows:
        return LOSERS.empty_table()
    contents = pc.dictionary_encode(left["content"].combine_chunks()).indices
    places = np.flatnonzero(contents.is_valid().to_numpy(zero_copy_only=False))
    _, firsts, member_of = np.unique(
        contents.drop_null().to_numpy(), return_index=True, return_inverse=True
    )
    twins = firsts[member_of]
    gone = np.flatnonzero(twins != np.arange(len(places)))
    return _losers(left, EXACT, places[gone], places[twins[gone]], np.zeros(len(gone)), None)


def _near(left: pa.Table, rules: DuplicateRules, find: Find) -> pa.Table:
    if rules.max_distance is None or not left.num_rows:
        return LOSERS.empty_table()
    # Equal signatures are grouped first: a bucket of a million blank pictures is then one entry.
    firsts, member_of = _distinct(left)
    matcher = MatchBands(rules.max_distance)
    columns = left.select(["text_key", "hashes"]).take(firsts)
    twins = _greedy(find(matcher, matcher.tasks, columns))
    stays, distance = np.arange(len(firsts)), np.zeros(len(firsts))
    for group, (first, value) in twins.items():
        stays[group], distance[group] = first, value
    twin = firsts[stays[member_of]]
    gone = np.flatnonzero(twin != np.arange(left.num_rows))
    limit = float(rules.max_distance)
    return _losers(left, NEAR, gone, twin[gone], distance[member_of[gone]], limit)


def _embedded(left: pa.Table, rules: DuplicateRules, find: Find) -> pa.Table:
    if rules.embedding_model is None or not left.num_rows:
        return LOSERS.empty_table()
    matcher = MatchEmbeddings(rules.max_cosine)
    columns = left.select(["text_key", "hashes", "embeddings"])
    twins = _greedy(find(matcher, matcher.tasks(left), columns), nearest=max)
    gone = np.array(list(twins), np.int64)
    stays = np.array([first for first, _ in twins.values()], np.int64)
    cosines = np.array([cosine for _, cosine in twins.values()])
    return _losers(left, EMBEDDING, gone, stays, cosines, rules.max_cosine)


def _losers(
    left: pa.Table,
    reason: str,
    gone: NDArray[np.int64],
    stays: NDArray[np.int64],
    values: NDArray[np.float64],
    threshold: float | None,
) -> pa.Table:
    """:data:`LOSERS` by their rows in ``left``, and those of their twins."""
    index = left["index"].to_numpy()
    columns = [
        pa.array(index[gone]),
        pa.array(index[stays]),
        pa.array([reason] * len(gone), pa.string()),
        pa.array(values, pa.float64()),
        pa.array([threshold] * len(gone), pa.float64()),
    ]
    return pa.table(columns, schema=LOSERS)


def _distinct(left: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first place of each distinct signature, in order, and for every place which it is."""
    columns = [*_hashes(left), left["text_key"].to_numpy()]
    _, first, inverse = np.unique(
        np.stack(columns, axis=1), axis=0, return_index=True, return_inverse=True
    )
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse.reshape(-1)]


def _greedy(twins: pa.Table, nearest: Callable[..., Any] = min) -> dict[int, tuple[int, float]]:
    """For each place that goes, the nearest one that stays (the earliest of several)."""
    goes: dict[int, tuple[int, float]] = {}
    table = twins.sort_by([("second", "ascending"), ("first", "ascending")])
    near: dict[int, list[tuple[int, float]]] = {}
    for first, second, value in zip(*(column.to_pylist() for column in table), strict=True):
        near.setdefault(second, []).append((first, value))
    for second, candidates in near.items():  # in order: whoever came before is decided
        staying = [candidate for candidate in candidates if candidate[0] not in goes]
        if staying:
            goes[second] = nearest(staying, key=lambda candidate: candidate[1])
    return goes


def _hashes(signatures: pa.Table) -> list[NDArray[np.uint64]]:
    """Per image of a record, the hashes of all records."""
    flat = signatures["hashes"].combine_chunks().flatten().to_numpy()
    images = max(1, len(flat) // max(1, signatures.num_rows))
    return list(np.ascontiguousarray(flat.reshape(-1, images).T))


def _cosine(rows: NDArray[np.float16], columns: NDArray[np.float16]) -> NDArray[np.float32]:
    return _unit(rows) @ _unit(columns).T


def _unit(vectors: NDArray[np.float16]) -> NDArray[np.float32]:
    """Unit length again: half precision has rounded it by up to a thousandth."""
    wide = vectors.astype(np.float32)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _twins(first: NDArray[Any], second: NDArray[Any], value: NDArray[Any]) -> pa.Table:
    columns = [first.astype(np.int64), second.astype(np.int64), value.astype(np.float64)]
    return pa.table(columns, schema=TWINS)
