"""Near duplicates by star clustering: in the order of the input a record is near a star, or is one.

A star is a record that stays, and whatever is near it goes. So a crowd of pictures that are all
alike costs a comparison each with the one that stays, and not one with each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, pairwise
from math import comb, log2

import numpy as np
from numpy.typing import NDArray

from pipelines.filters.measures import HASH_BITS

Rows = NDArray[np.int64]

_MIX = np.uint64(0x9E3779B97F4A7C15)
_MOST_KEYS = 40
_SPARSE = 3  # bits of a key fewer than tell all records apart
_JOINED = 128  # comparisons a record, up to which each of some records is compared with each
_FEW = 64  # records, which always are
_AT_ONCE = 1 << 22  # comparisons
_STAR_BITS = np.int64(40)


@dataclass(frozen=True)
class HashStars:
    """Which records stay, of several whose hashes differ in a few bits.

    They are found by bands of the hash (Manku et al. 2007): of d + c bands, two hashes that differ
    in d bits have c in common at least, so those that agree nowhere in c bands are never compared.
    The more records, the more bands make up a key, and the fewer records share it by chance.

    Attributes:
        hashes: of each image of a record, those of all records (N,); all images must be near.
        text: (N,) the same where the words are; others are never near.
        distance: bits that differ, at most.
    """

    hashes: Sequence[NDArray[np.uint64]]
    text: NDArray[np.uint64]
    distance: int

    def stay(self, fixed: int = 0) -> NDArray[np.bool_]:
        """Which ones stay (N,): the first ``fixed``, and what is near none that stays before it."""
        stays = np.arange(len(self.text)) < fixed
        rows = np.flatnonzero(~stays)
        self._decide(rows[~self._near(rows, np.flatnonzero(stays))], stays)
        return stays

    def nearest(self, stays: NDArray[np.bool_]) -> tuple[Rows, Rows]:
        """Of each record that goes, the nearest before it that stays, and its distance in bits.

        The earliest of several. Both are in the order of the records that go.
        """
        gone = np.flatnonzero(~stays)
        best = np.full(len(gone), np.iinfo(np.int64).max)
        for places, stars, distance in self._pairs(gone, np.flatnonzero(stays)):
            np.minimum.at(best, places, (distance << _STAR_BITS) | stars)
        return best & ((1 << _STAR_BITS) - 1), best >> _STAR_BITS

    def _decide(self, rows: Rows, stays: NDArray[np.bool_]) -> None:
        """Mark those that stay of records that are near no star before all of them."""
        if len(rows) <= _FEW or self._is_sparse(rows):
            stays[rows] = True
            found = [(stars, rows[places]) for places, stars, _ in self._pairs(rows, rows)]
            stars, others = np.concatenate([np.zeros((2, 0), np.int64), *found], axis=1)
            order = np.lexsort((stars, others))
            for star, other in zip(stars[order].tolist(), others[order].tolist(), strict=True):
                if stays[star]:  # whoever came before is decided
                    stays[other] = False
            return
        half = len(rows) // 2
        self._decide(rows[:half], stays)
        others = rows[half:]
        near = self._near(others, rows[:half][stays[rows[:half]]])
        self._decide(others[~near], stays)

    def _near(self, rows: Rows, stars: Rows) -> NDArray[np.bool_]:
        near = np.zeros(len(rows), np.bool_)
        for mask in self._masks:
            left = np.flatnonzero(~near)
            for places, _, _ in self._sharing(mask, rows[left], stars):
                near[left[places]] = True
        return near

    def _pairs(self, rows: Rows, stars: Rows) -> Iterator[tuple[Rows, Rows, Rows]]:
        """Places in ``rows``, the stars before them that are near, and how far, some at a time.

        A pair may come more than once.
        """
        for mask in self._masks:
            yield from self._sharing(mask, rows, stars)

    def _sharing(
        self, mask: np.uint64, rows: Rows, stars: Rows
    ) -> Iterator[tuple[Rows, Rows, Rows]]:
        """Those of them that share one key."""
        if not len(rows) or not len(stars):
            return
        keys = self._keys(stars, mask)
        order = np.argsort(keys, kind="stable")
        keys, wanted = keys[order], self._keys(rows, mask)
        low = np.searchsorted(keys, wanted, "left")
        count = np.searchsorted(keys, wanted, "right") - low
        for places, at in _expanded(low, count):
            yield from self._compared(places, rows[places], stars[order[at]])

    def _compared(self, places: Rows, rows: Rows, stars: Rows) -> Iterator[tuple[Rows, Rows, Rows]]:
        distance = np.zeros(len(rows), np.uint8)
        for image in self.hashes:
            np.maximum(distance, np.bitwise_count(image[rows] ^ image[stars]), out=distance)
        near = distance <= self.distance
        near &= (stars < rows) & (self.text[rows] == self.text[stars])
        if near.any():
            yield places[near], stars[near], distance[near].astype(np.int64)

    def _is_sparse(self, rows: Rows) -> bool:
        """Whether it takes few comparisons to compare each with each that shares a key."""
        comparisons = 0
        for mask in self._masks:
            keys = np.sort(self._keys(rows, mask))
            ends = np.flatnonzero(np.append(keys[1:] != keys[:-1], True)) + 1
            comparisons += int((np.diff(ends, prepend=0) ** 2).sum())
            if comparisons > _JOINED * len(rows):
                return False
        return True

    def _keys(self, rows: Rows, mask: np.uint64) -> NDArray[np.uint64]:
        return ((self.hashes[0][rows] & mask) * _MIX) ^ self.text[rows]

    @cached_property
    def _masks(self) -> list[np.uint64]:
        """Of each key, the bits of the hash that are in it."""
        common, enough = 1, log2(max(2, len(self.text))) - _SPARSE
        while (
            HASH_BITS * common / (self.distance + common) < enough
            and comb(self.distance + common + 1, common + 1) <= _MOST_KEYS
        ):
            common += 1
        ends = np.linspace(0, HASH_BITS, self.distance + common + 1).astype(int).tolist()
        bands = [(1 << high) - (1 << low) for low, high in pairwise(ends)]
        return [np.uint64(sum(chosen)) for chosen in combinations(bands, common)]


def first_of_equal(columns: Sequence[NDArray[np.uint64]]) -> Rows:
    """For every row of some columns, the first that has the same values (N,)."""
    order = np.lexsort(columns)
    new = np.zeros(len(order), np.bool_)
    new[:1] = True
    for column in columns:
        values = column[order]
        new[1:] |= values[1:] != values[:-1]
    first = np.empty_like(order)
    first[order] = order[new][np.cumsum(new) - 1]  # stable: the first of a run is the earliest
    return first


def _expanded(low: Rows, count: Rows) -> Iterator[tuple[Rows, Rows]]:
    """Every place with each of ``count`` numbers from ``low`` on, some at a time."""
    some = np.flatnonzero(count)
    ends = np.cumsum(count[some])
    first, before = 0, 0
    while first < len(some):
        last = max(first + 1, int(np.searchsorted(ends, before + _AT_ONCE, "right")))
        places, own = some[first:last], count[some[first:last]]
        within = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
        yield np.repeat(places, own), np.repeat(low[places], own) + within
        first, before = last, int(ends[last - 1])
