"""Receipts: a range of the input is the unit of work, of output and of resume.

A task does all steps on a range, writes its files and then its receipt. A range with a receipt is
done: whoever runs the job again does the others. Readers know nothing of receipts; the manifest,
which names the files of all of them, is written when the last one is there.

A file's name holds the hash of what is in it. So whoever does a range again writes the same files,
or files beside them, and never others in their place: not a second driver, and not a worker that
comes late from a run of other settings.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from dim import records
from dim.config import StrictModel
from dim.errors import DimError
from infra import tracing
from infra.logs import log
from infra.storage import Store
from pipelines.attempts import attempt
from pipelines.outcome import FAILED, KEPT, OUTCOMES, REJECTED
from pipelines.outputs import histograms
from pipelines.outputs.files import (
    FOLDERS,
    Limits,
    Name,
    count_reasons,
    schemas_of,
    split,
    write_empty,
    write_files,
)
from pipelines.outputs.manifest import FileEntry, Manifest

FOLDER = "ranges"
"""Where the receipts of an unfinished output lie, those of each way of making it apart."""

VERDICTS = "verdicts"
"""Where what the filters found lies, until the output is finished and no record of it failed."""

_VERSION = 4  # raised whenever ranges are cut otherwise, or their steps make other records
_DIGITS = 16  # of a hash, in names
_READERS = 16  # an object store answers each in its own time
_NAME = re.compile(r"(?:data|rejected|failed)/part-(\d+)-of-(\d+)-\d+-[0-9a-f]+\.parquet")


class Paid(StrictModel):
    """What was paid for the answers about a range, which lie in ``folder``, by name."""

    folder: str
    sums: dict[str, float]


class Receipt(StrictModel):
    """A range that is done: its files, in order, why records of it were rejected, how what was
    measured of them is spread, and what it cost.

    One of an earlier version, or one made from a finished output, does not say what was measured;
    one of a job that pays nobody says nothing of a cost either.
    """

    number: int
    files: tuple[FileEntry, ...]
    reasons: dict[str, int]
    measured: histograms.Counts | None = None
    paid: Paid | None = None

    @property
    def has_failures(self) -> bool:
        """Whether a record of it failed."""
        return any(file.rows for file in self.files if file.path.startswith(FOLDERS[FAILED]))


class Done:
    """The ranges that are done.

    What was measured is summed up: that of a range is several times as long as the rest of its
    receipt, and the driver holds all of them.

    Attributes:
        receipts: theirs, by number, without what was measured.
        measured: in all of them; ``None`` if one does not say.
        usd: what was paid for those that say so, in dollars.
    """

    def __init__(self) -> None:
        self.receipts: dict[int, Receipt] = {}
        self.measured: histograms.Counts | None = {}
        self.usd = 0.0

    def add(self, receipt: Receipt) -> None:
        """One more; of two of a range the first counts."""
        if receipt.number in self.receipts:
            return
        self.receipts[receipt.number] = receipt.model_copy(update={"measured": None})
        self.usd += receipt.paid.sums["usd"] if receipt.paid is not None else 0.0
        if self.measured is None or receipt.measured is None:
            self.measured = None
        else:
            histograms.add(self.measured, receipt.measured)


@dataclass(frozen=True)
class RangeOutput:
    """Where the ranges of a job go: what a task is given to write them with.

    Attributes:
        store: the job's output folder.
        key: what the records are made of and how, as a hash.
        of: how many ranges there are.
        schema: the columns of kept records.
        limits: how large files are.
        trace: of what ranges are spans; where this was made.
    """

    store: Store
    key: str
    of: int
    schema: pa.Schema
    limits: Limits
    trace: tracing.Trace = field(default_factory=tracing.here)

    def done(
        self,
        number: int,
        rows: int,
        tables: Iterable[pa.Table],
        paid: Callable[[], Paid | None] = lambda: None,
    ) -> pa.Table:
        """Write a range, unless it was written before this process was begun in place of another.

        Args:
            number: of the range.
            rows: how many records it has.
            tables: they, with outcomes, in order; they are made while they are written.
            paid: what was, when all of them are written.

        Returns:
            The receipt, as a row of a data set.

        Raises:
            DimError: there are more or fewer records.
            StorageError: something cannot be written.
        """
        receipt = self._find(number) if attempt() else None
        with self.trace.span("range", output=self.store.uri, number=number, records=rows):
            receipt = receipt or self._write(number, rows, tables, paid)
        log("range written", output=self.store.uri, range=number, records=rows)
        return pa.table({"receipt": [receipt.model_dump_json()]})

    def found(self) -> Iterator[Receipt]:
        """The receipts that there are now, as they are read.

        Raises:
            StorageError: they cannot be read.
        """
        listed = [name for name, _ in self.store.list(f"{FOLDER}/{self.key}", suffix=".json")]
        return self._read([int(stem) for name in listed if (stem := _stem(name)).isdecimal()])

    def name(self, outcome: str, number: int) -> Name:
        """What the files of one outcome of a range are called."""
        start = f"{FOLDERS[outcome]}/part-{number:05d}-of-{self.of:05d}"
        return lambda part, sha256: f"{start}-{part}-{sha256[:_DIGITS]}.parquet"

    def write_missing(self, there: Iterable[FileEntry]) -> Iterator[FileEntry]:
        """A file without records for each outcome that no record has."""
        folders = {file.path.partition("/")[0] for file in there}
        for outcome, schema in schemas_of(self.schema).items():
            if FOLDERS[outcome] not in folders:
                yield write_empty(self.store, schema, self.name(outcome, 0))

    def _write(
        self,
        number: int,
        rows: int,
        tables: Iterable[pa.Table],
        paid: Callable[[], Paid | None],
    ) -> Receipt:
        schemas = schemas_of(self.schema)
        left_out: dict[str, list[pa.Table]] = defaultdict(list)
        measured: histograms.Counts = {}
        seen = 0

        def kept() -> Iterator[pa.Table]:
            """Those that are kept; the others have no pictures, and wait here until the end."""
            nonlocal seen
            for table in tables:
                seen += table.num_rows
                for outcome, part in split(table, schemas):
                    if outcome != FAILED:
                        histograms.add(measured, histograms.count(part))
                    if outcome == KEPT:
                        yield part
                    else:
                        left_out[outcome].append(part)

        files = [
            *self._files(number, KEPT, kept()),
            *(
                file
                for outcome in (REJECTED, FAILED)
                for file in self._files(number, outcome, left_out[outcome])
            ),
        ]
        if seen != rows or sum(file.rows for file in files) != rows:
            raise DimError(f"range {number} of {self.store.uri} has {rows} records and gave {seen}")
        reasons = count_reasons(left_out[REJECTED])
        receipt = Receipt(
            number=number, files=tuple(files), reasons=reasons, measured=measured, paid=paid()
        )
        self.store.write(self._path(number), receipt.model_dump_json().encode())
        return receipt

    def _files(self, number: int, outcome: str, tables: Iterable[pa.Table]) -> Iterator[FileEntry]:
        schema = schemas_of(self.schema)[outcome]
        return write_files(self.store, schema, tables, self.limits, self.name(outcome, number))

    def _read(self, numbers: Iterable[int]) -> Iterator[Receipt]:
        with ThreadPoolExecutor(_READERS) as pool:
            for receipt in pool.map(self._find, numbers):
                if receipt is not None:
                    yield receipt

    def _find(self, number: int) -> Receipt | None:
        """The receipt of a range; one that cannot be read is none."""
        if not self.store.is_file(self._path(number)):
            return None
        try:
            receipt = Receipt.model_validate_json(self.store.read(self._path(number)))
        except ValidationError:
            return None
        return receipt if receipt.number == number < self.of else None

    def _path(self, number: int) -> str:
        return f"{FOLDER}/{self.key}/{number:05d}.json"


@dataclass(frozen=True)
class WriteRanges:
    """What a task does with the ranges it is given: all of its work on each, files, receipt.

    Attributes:
        work: from a range, as a row of a data set, to its records with outcomes.
        output: where they go.
    """

    work: Callable[[dict[str, Any]], Iterable[pa.Table]]
    output: RangeOutput

    def __call__(self, ranges: pa.Table) -> Iterator[pa.Table]:
        """Ranges with ``number`` and ``rows`` in, receipts out."""
        for each in ranges.to_pylist():
            yield self.output.done(each["number"], each["rows"], self.work(each))


def key_of(*what: Any) -> str:
    """The key of an output that is made of ``what``: the same exactly when the records are."""
    text = json.dumps([_VERSION, *what], sort_keys=True)
    return records.sha256_hex(text.encode())[:_DIGITS]


def whole(store: Store, receipts: Iterable[Receipt]) -> Iterator[Receipt]:
    """Those of which every file is there, with the length that they say.

    A name is there when its file is whole, and it holds the hash of what was written; to read
    everything again is ``dim data verify``'s.

    Raises:
        StorageError: the files cannot be listed.
    """
    lengths = _lengths(store)
    for receipt in receipts:
        if all(lengths.get(file.path) == file.bytes for file in receipt.files):
            yield receipt


def lacking(store: Store, files: Iterable[FileEntry]) -> list[str]:
    """The files that are not there, or are shorter or longer than they should be.

    Raises:
        StorageError: the files cannot be listed.
    """
    lengths = _lengths(store)
    return [file.path for file in files if lengths.get(file.path) != file.bytes]


def without_failures(store: Store, done: Manifest, of: int) -> list[Receipt]:
    """The ranges of a finished output in which no record failed.

    Args:
        store: its folder.
        done: its manifest.
        of: how many ranges it has if it is cut as it would be now; else there are none.

    Raises:
        StorageError: something cannot be read.
    """
    files: dict[int, list[FileEntry]] = {number: [] for number in range(of)}
    for file in done.files:
        found = _NAME.fullmatch(file.path)
        if found is None or int(found[2]) != of or int(found[1]) >= of:
            return []
        if file.rows:
            files[int(found[1])].append(file)
    receipts = (
        Receipt(number=number, files=tuple(own), reasons={}) for number, own in files.items()
    )
    return [
        receipt.model_copy(update={"reasons": _reasons(store, receipt.files)})
        for receipt in receipts
        if not receipt.has_failures
    ]


def receipts_in(tables: Iterable[pa.Table]) -> Iterator[Receipt]:
    """The receipts in the rows of a data set."""
    for table in tables:
        yield from map(Receipt.model_validate_json, table["receipt"].to_pylist())


def files_in_order(receipts: Iterable[Receipt]) -> list[FileEntry]:
    """The files of all ranges: those of an outcome together, and there by place in the input."""
    files: dict[str, list[FileEntry]] = {FOLDERS[outcome]: [] for outcome in OUTCOMES}
    for receipt in sorted(receipts, key=lambda receipt: receipt.number):
        for file in receipt.files:
            files[file.path.partition("/")[0]].append(file)
    return [file for folder in sorted(files) for file in files[folder]]


def _reasons(store: Store, files: Iterable[FileEntry]) -> dict[str, int]:
    reasons: Counter[str] = Counter()
    for file in files:
        if file.path.startswith(f"{FOLDERS[REJECTED]}/"):
            with store.open_parquet(file.path) as parquet:
                reasons.update(count_reasons([parquet.read(columns=["reason"])]))
    return dict(reasons)


def _lengths(store: Store) -> dict[str, int]:
    return dict(item for folder in FOLDERS.values() for item in store.list(folder))


def _stem(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[0]
