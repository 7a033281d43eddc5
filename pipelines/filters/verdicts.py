"""Verdicts: what becomes of every record of a data set, known before the first one goes on.

Duplicates need all signatures first. So the pictures are read twice and decoded once: the first
pass leaves verdicts of a few hundred bytes a record in the job's output folder, the second gives
them to the records. In both, pictures stay in the process that read them. A job that is run again
takes the verdicts that are there. Who looks for duplicates among all of them is in
:mod:`pipelines.filters.everything`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from dim import records
from dim.errors import DimError, InputError
from infra.storage import Store
from infra.tracing import span
from pipelines.attempts import stop_after
from pipelines.filters import FilterImages, FilterPairs, scorers
from pipelines.filters.duplicates import (
    SIGNATURE,
    DuplicateRules,
    known_of,
    reject_duplicates,
)
from pipelines.filters.everything import Everything, Part
from pipelines.filters.images import STAGE
from pipelines.filters.rules import ImageRules, without_thresholds
from pipelines.filters.signatures import Signer
from pipelines.outcome import FAILED, IMAGES, KEPT, failed, to_table, travelling
from pipelines.outputs.files import by_place
from pipelines.outputs.receipts import VERDICTS
from pipelines.outputs.shards import Shards
from pipelines.ranges import TIMEOUT_S, Piece, gather, pieces_of

_BEFORE, _ROWS_PER_CUT = -(1 << 62), 1 << 24  # places of the records of an earlier data set


@dataclass(frozen=True)
class Judged:
    """Raw records of which is known what becomes of each.

    Attributes:
        raw: the folder that they lie in.
        schema: what they are.
        verdicts: the folder that the verdicts lie in.
        losers: the table of duplicates, or where it is if it is large: what an actor is made of
            should not lie in the object store, where a restarted one might not find it.
        rows: a batch has at most.
    """

    raw: Store
    schema: pa.Schema
    verdicts: KeptVerdicts
    losers: pa.Table | ray.ObjectRef
    rows: int

    def records(self, each: dict[str, Any]) -> Iterator[pa.Table]:
        """The records of a range with their outcomes, some at a time.

        Args:
            each: a range as :func:`judge` gives it.

        Raises:
            InputError: they are no longer those that the verdicts are about.
            DimError: the task was begun too often; nothing of it can fail by itself.
        """
        stop_after()
        yield from self.surely(each)

    def surely(self, each: dict[str, Any]) -> Iterator[pa.Table]:
        """The same for who can say of a record that it failed, however often it was begun."""
        losers = self.losers if isinstance(self.losers, pa.Table) else ray.get(self.losers)
        for given, cuts in zip(each["pieces"], each["cuts"], strict=True):
            piece = Piece(**given)
            tables = [self.verdicts.read(Piece(**cut)) for cut in cuts]
            verdicts = reject_duplicates(pa.concat_tables(tables), losers)
            yield from self._apply(piece, verdicts)

    def _apply(self, piece: Piece, verdicts: pa.Table) -> Iterator[pa.Table]:
        apply, done = ApplyVerdicts(self.schema), 0
        for batch in piece.batches(self.raw, self.rows):
            own = verdicts.slice(done, batch.num_rows)
            if own["index"].to_pylist() != batch["index"].to_pylist():
                raise self._changed(piece)
            if batch.num_rows:
                yield apply(batch, by_place(own))
            done += batch.num_rows
        if done != verdicts.num_rows:
            raise self._changed(piece)

    def _changed(self, piece: Piece) -> InputError:
        return InputError(f"{self.raw.address(piece.file)} changed while it was read")


@dataclass(frozen=True)
class KeptVerdicts:
    """Verdicts in a folder of the job's output, a file a piece of the input.

    Attributes:
        store: the output.
        folder: in it.
        look: what is looked at together with all other records, of verdicts.
        retry: make those anew among which is a failure.
    """

    store: Store
    folder: str
    look: Callable[[pa.Table], pa.Table]
    retry: bool = False

    def __call__(self, piece: Piece, make: Callable[[], pa.Table]) -> pa.Table:
        """That of the verdicts on a piece, which are made unless they are there."""
        found = self._find(piece)
        if found is None:
            found = make()
            with (
                self.store.open_output(self._name(piece)) as file,
                pa.ipc.new_file(file, found.schema) as writer,
            ):
                writer.write_table(found)
        return self.look(found)

    def read(self, piece: Piece) -> pa.Table:
        """All columns of them.

        Raises:
            StorageError: they cannot be read.
        """
        with self.store.open_arrow(self._name(piece)) as (schema, batches):
            return pa.Table.from_batches(batches, schema)

    def _find(self, piece: Piece) -> pa.Table | None:
        try:
            found = self.read(piece) if self.store.is_file(self._name(piece)) else None
        except DimError:  # a file that is not whole is made again
            return None
        again = found is not None and self.retry and FAILED in found["outcome"].to_pylist()
        return None if again else found

    def _name(self, piece: Piece) -> str:
        which = records.sha256_hex(json.dumps(asdict(piece)).encode())
        return f"{self.folder}/{which[:24]}.arrow"


@span("filter and duplicates")
def judge(
    raw: Shards,
    ranges: Sequence[Sequence[Piece]],
    todo: Sequence[int],
    stage: FilterImages | FilterPairs,
    rules: DuplicateRules,
    rows: int,
    *,
    store: Store,
    key: str,
    retry: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> tuple[list[dict[str, Any]], Judged]:
    """What becomes of raw records: what ``stage`` says, but of several alike one is kept.

    Args:
        raw: the records.
        ranges: all of them.
        todo: the ranges that are wanted. Where duplicates are looked for, others are read too.
        stage: the filter.
        rules: what a duplicate is.
        rows: a batch has at most.
        store: the job's output, where verdicts are kept.
        key: what they follow from, as a hash.
        retry: make verdicts anew where one of them is a failure.
        timeout_s: a piece may take.

    Returns:
        The wanted ranges as rows of a data set, and who reads their records.

    Raises:
        InputError: a model's folder is not there, or no such records where ``rules`` say.
    """
    check_models(stage.rules, rules)
    look = known_of if rules.wanted else _places
    kept = KeptVerdicts(store, f"{VERDICTS}/{key}", look, retry)
    judging = partial(gather, rows=rows, num_gpus=stage.rules.gpus, timeout_s=timeout_s)
    everything = Everything()
    if rules.against is not None:
        earlier = Shards.open(rules.against, stage.schema)
        bare: Any = without_thresholds(stage.rules)
        signed = replace(stage, rules=bare)
        theirs = KeptVerdicts(store, f"{VERDICTS}/{key}-against", look)
        for each in judging(earlier, pieces_of(earlier), GiveVerdicts.of(signed, rules), theirs):
            first = _BEFORE + each.number * _ROWS_PER_CUT
            everything.add(Part(theirs, each.cut, rules.against, first), each.table)
    numbers = range(len(ranges)) if rules.wanted else todo
    pieces = [piece for number in numbers for piece in ranges[number]]
    cuts: dict[Piece, dict[Piece, int]] = {piece: {} for piece in pieces}
    for each in judging(raw, pieces, GiveVerdicts.of(stage, rules), kept):
        cuts[each.piece][each.cut] = each.table.num_rows
        if rules.wanted:
            everything.add(Part(kept, each.cut), each.table)
    losers = everything.losers(rules, len(set(IMAGES) & set(stage.schema.names)))
    by_number = attrgetter("cut")
    wanted = [
        {
            "number": number,
            "rows": sum(sum(cuts[each].values()) for each in ranges[number]),
            "pieces": [asdict(each) for each in ranges[number]],
            "cuts": [
                [asdict(cut) for cut in sorted(cuts[each], key=by_number)]
                for each in ranges[number]
            ],
        }
        for number in todo
    ]
    return wanted, Judged(raw.store, stage.schema, kept, losers, rows)


def identity_of(raw: Shards, rules: DuplicateRules) -> dict[str, Any]:
    """What a filter reads, the same exactly when the records are.

    Raises:
        InputError: there are no raw records of this kind where ``rules`` say.
        StorageError: they cannot be read.
    """
    if rules.against is None:
        return raw.identity
    return {**raw.identity, "against": Shards.open(rules.against, raw.schema).identity}


def _places(verdicts: pa.Table) -> pa.Table:
    return verdicts.select(["index"])


@dataclass(frozen=True)
class GiveVerdicts:
    """Filters records into verdicts, which have no pictures."""

    filter: FilterImages | FilterPairs

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Raw records in; their outcomes, measures and :data:`SIGNATURE` out."""
        return to_table(self.filter.verdicts(batch), SIGNATURE)

    def lost(self, record: pa.Table, why: str) -> pa.Table:
        """The verdict on a record that the filter does not survive."""
        return to_table(failed(record, STAGE, why), SIGNATURE)

    @classmethod
    def of(cls, chosen: FilterImages | FilterPairs, rules: DuplicateRules) -> GiveVerdicts:
        """By ``chosen``, with the signatures that ``rules`` look at."""
        signing: Any = replace(chosen, signer=Signer(rules.embedding_model))
        return cls(signing)


@dataclass(frozen=True)
class ApplyVerdicts:
    """Gives raw records the outcomes that were found without them.

    Args:
        schema: what the records are.
    """

    schema: pa.Schema

    def __call__(self, batch: pa.Table, verdicts: pa.Table) -> pa.Table:
        """Raw records in, the same with outcomes out; ``verdicts`` are sorted by index.

        Raises:
            InputError: a record has no verdict.
        """
        wanted = batch["index"].to_numpy()
        places = np.searchsorted(verdicts["index"].to_numpy(), wanted)
        chosen = verdicts.take(pa.array(np.minimum(places, max(verdicts.num_rows - 1, 0))))
        strangers = np.flatnonzero(chosen["index"].to_numpy() != wanted)
        if len(strangers):
            name = batch["id"][int(strangers[0])].as_py()
            raise InputError(f"the input changed while it was read: record {name}")
        kept = pc.equal(chosen["outcome"], KEPT)
        # By columns, for a picture that only passes need not become a Python object.
        columns = [
            chosen[field.name]
            if field.name in chosen.schema.names and field.name not in self.schema.names
            else _only(kept, batch[field.name])
            if field.name in IMAGES
            else batch[field.name]
            for field in travelling(self.schema)
        ]
        return pa.table(columns, schema=travelling(self.schema))


def check_models(rules: ImageRules, duplicates: DuplicateRules) -> None:
    """See that every model is there before the first record is read.

    Raises:
        InputError: one is not.
    """
    settings = [*rules.model_dump().items(), *duplicates.model_dump().items()]
    for name, path in settings:
        if name.endswith("_model") and path is not None:
            scorers.check_folder(path)


def _only(kept: pa.ChunkedArray, images: pa.ChunkedArray) -> pa.ChunkedArray:
    """The pictures of kept records; a record that is out travels on without."""
    if pc.all(kept).as_py():
        return images
    return pc.if_else(kept, images, pa.scalar(None, images.type))
