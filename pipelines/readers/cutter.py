"""Cutting a stream of records into ranges, and noticing ids that repeat.

The driver holds 9 bytes of a record, 8 of a hash of its id and whether it has one; and 12 more of
one whose id is like those that are given to records without.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dim.records import short_hash


@dataclass
class Ids:
    """What records are called, in order, as far as it matters for finding those that repeat.

    Attributes:
        source: what the ids of records begin with that have none of their own.
        hashes: 8 bytes for each record; 0 for one without an id.
        named: whether it has one.
        like: places of those whose id is as that of a record without one would be.
        numbers: the place of that one, of each.
    """

    source: str
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    named: bytearray = field(default_factory=bytearray)
    like: array[int] = field(default_factory=lambda: array("I"))
    numbers: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        """How many records."""
        return len(self.named)

    def add(self, identity: str | None) -> None:
        """One more record."""
        if identity is not None:
            found = re.fullmatch(rf"{re.escape(self.source)}-(\d{{8,18}})", identity)
            if found and f"{int(found[1]):08d}" == found[1]:
                self.like.append(len(self))
                self.numbers.append(int(found[1]))
        self.hashes.append(0 if identity is None else int.from_bytes(short_hash(identity)))
        self.named.append(identity is not None)

    def extend(self, others: Ids) -> None:
        """Those of more records, which come next."""
        like = np.frombuffer(others.like, np.uint32) + np.uint32(len(self))
        self.like.frombytes(like.tobytes())
        self.numbers += others.numbers
        self.hashes += others.hashes
        self.named += others.named

    def repeated(self) -> NDArray[np.int64]:
        """The places of records whose id an earlier one has, in order."""
        is_named = np.frombuffer(self.named, np.bool_)
        named = np.flatnonzero(is_named)
        hashes = np.frombuffer(self.hashes, np.uint64)[named]
        order = np.argsort(hashes, kind="stable")  # so equal ones are in the input's order
        twice = named[order[1:][hashes[order[1:]] == hashes[order[:-1]]]]
        # One is called so, and another would be by its place: whichever comes later repeats.
        like, numbers = np.frombuffer(self.like, np.uint32), np.frombuffer(self.numbers, np.int64)
        there = numbers < len(self)
        like, numbers = like[there].astype(np.int64), numbers[there]
        alike = ~is_named[numbers]
        return np.unique(np.concatenate([twice, np.maximum(like, numbers)[alike]]))


class Cutter:
    """Cuts records into ranges of ``rows_per_range``; see :class:`Ids` for ``source``."""

    def __init__(self, rows_per_range: int, source: str) -> None:
        self.ranges: list[dict[str, Any]] = []
        self.rows = 0
        self.ids = Ids(source)
        self._per_range = rows_per_range

    @property
    def room(self) -> int:
        """How many more records the range takes that was begun last."""
        return -self.rows % self._per_range

    def begin(self, **more: Any) -> None:
        """Start a range."""
        self.ranges.append({"first": self.rows, "count": 0, **more})

    def count(self, rows: int) -> None:
        """So many records more in the range."""
        self.ranges[-1]["count"] += rows
        self.rows += rows

    def name_repeated(self, places: NDArray[np.int64] | None = None) -> None:
        """Give each range its repeated records, when all have been seen.

        Args:
            places: what to call each record there; its index if not given. The list is never
                empty, so that its type is known.
        """
        found = self.ids.repeated()
        called = found if places is None else places[found]
        for each in self.ranges:
            first, end = np.searchsorted(found, [each["first"], each["first"] + each["count"]])
            each["repeated"] = [-1, *called[first:end].tolist()]
