"""Duplicates across a whole data set: the first of several stays, by its place in the input.

They are found among the records that passed the filters, from what is known of each in some fifty
bytes: the same content, nearly the same perceptual hash; and by their embeddings, see
:mod:`pipelines.filters.cells`. A record goes only if one that stays is its twin; being like
another that goes is not enough, so a chain of small differences does not empty a data set. The
records of an earlier data set have places below 0, and all stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dim.config import StrictModel
from pipelines.filters.measures import HASH_BITS
from pipelines.filters.near import HashStars, first_of_equal
from pipelines.outcome import KEPT, Rejection, reject
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
    ]
)
"""What is looked at of all records at once: at most 64 bytes of each. ``content`` stands for
``content_hash``."""

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
    EXACT: "the same as {twin}",
    NEAR: "{value:.0f} of {bits} bits of the hash differ from {twin}",
    EMBEDDING: "the embedding's cosine with {twin} is {value:.4f}",
}


class DuplicateRules(StrictModel):
    """Which records are one too many."""

    exact: bool = True
    """Drop records of the same content: image files, and the instruction of a pair."""
    max_distance: int | None = Field(4, ge=0, le=15)
    """Bits of the 64 of a perceptual hash that differ between near duplicates, at most. Both
    images of a pair and its instruction must match. ``null`` switches this off."""
    embedding_model: str | None = None
    """Folder of a CLIP or DINO model to find duplicates with too."""
    max_cosine: float = Field(0.95, gt=0, le=1)
    """Cosine of the embeddings of two records, at most."""
    against: str | None = None
    """Address of raw records, filtered or not, that are there already: what is a duplicate of one
    of them goes too."""

    @property
    def wanted(self) -> bool:
        """Whether anything is looked for."""
        return self.exact or self.max_distance is not None or self.embedding_model is not None

    @model_validator(mode="after")
    def _check_against(self) -> Self:
        if self.against is not None and not self.wanted:
            raise ValueError("against: no rule says what a duplicate is")
        return self


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


def find_duplicates(known: pa.Table, rules: DuplicateRules) -> pa.Table:
    """The records that are one too many among those that are kept, but for embeddings.

    Args:
        known: :data:`KNOWN` of every record.
        rules: what a duplicate is.

    Returns:
        :data:`LOSERS`, by place.
    """
    left = by_place(known)
    left = left.filter(left["kept"]).combine_chunks()
    found = [LOSERS.empty_table()]
    for step in (_exact, _near):
        losers = step(left, rules)
        if losers.num_rows:
            found.append(losers)
            left = left.filter(pc.invert(pc.is_in(left["index"], value_set=losers["index"])))
    return pa.concat_tables(found).sort_by("index").combine_chunks()


def explained(losers: pa.Table, names: Mapping[int, str]) -> pa.Table:
    """Losers with a sentence, ``detail``, that names the record that stays.

    Args:
        losers: :data:`LOSERS`.
        names: what the records that stay are called, by their place.
    """
    details = [
        _DETAILS[row["reason"]].format(twin=names[row["twin"]], value=row["value"], bits=HASH_BITS)
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


def _exact(left: pa.Table, rules: DuplicateRules) -> pa.Table:
    if not rules.exact:
        return LOSERS.empty_table()
    left = left.filter(pc.is_valid(left["content"])).combine_chunks()
    contents = np.frombuffer(b"".join(left["content"].to_pylist()), np.uint64).reshape(-1, 2)
    twins = first_of_equal(list(contents.T))
    return losers_of(left["index"].to_numpy(), twins, np.zeros(len(twins)), EXACT, None)


def _near(left: pa.Table, rules: DuplicateRules) -> pa.Table:
    if rules.max_distance is None or not left.num_rows:
        return LOSERS.empty_table()
    index, text = left["index"].to_numpy(), left["text_key"].to_numpy()
    hashes = _hashes(left)
    # Equal ones are grouped first: a million blank pictures are then one entry.
    first = first_of_equal([*hashes, text])
    one = np.flatnonzero(first == np.arange(len(first)))
    stars = HashStars([image[one] for image in hashes], text[one], rules.max_distance)
    stays = stars.stay(fixed=int((index[one] < 0).sum()))
    twins, distance = np.arange(len(first)), np.zeros(len(first))
    nearest, bits = stars.nearest(stays)
    twins[one[~stays]], distance[one[~stays]] = one[nearest], bits
    return losers_of(index, twins[first], distance[first], NEAR, float(rules.max_distance))


def losers_of(
    index: NDArray[np.int64],
    twins: NDArray[np.int64],
    values: NDArray[np.float64],
    reason: str,
    threshold: float | None,
) -> pa.Table:
    """:data:`LOSERS` of records at some places, by the rows of their twins among them.

    Who is its own twin stays, and so does whoever was there before.
    """
    gone = np.flatnonzero((twins != np.arange(len(twins))) & (index >= 0))
    columns = [
        pa.array(index[gone]),
        pa.array(index[twins[gone]]),
        pa.array([reason] * len(gone), pa.string()),
        pa.array(values[gone], pa.float64()),
        pa.array([threshold] * len(gone), pa.float64()),
    ]
    return pa.table(columns, schema=LOSERS)


def _hashes(signatures: pa.Table) -> list[NDArray[np.uint64]]:
    """Per image of a record, the hashes of all records."""
    flat = signatures["hashes"].combine_chunks().flatten().to_numpy()
    images = max(1, len(flat) // max(1, signatures.num_rows))
    return list(np.ascontiguousarray(flat.reshape(-1, images).T))
