"""Entries: the records of a range as their container holds them, before any image is looked at.

A container is a JSONL file, Parquet, Arrow as Hugging Face saves it, or a WebDataset tar. What
cannot be read is an entry with an error, so that a damaged file loses no record silently.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from dim import records
from dim.errors import InputError
from infra.storage import Store
from pipelines.readers.layout import Layout

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp"),
        *(".bmp", ".dib", ".gif", ".tif", ".tiff"),
    }
)
READ_AHEAD = 1 << 20

_ROWS_AT_ONCE = 16  # of a Parquet file: encoded images are large


@dataclass
class Entry:
    """One record of a container.

    Attributes:
        index: its place in the whole input.
        label: what to call it in an error.
        where: its provenance.
        values: its columns, empty if it cannot be read.
        error: why it cannot be read.
        id: what its container calls it; ``None`` leaves that to its columns.
        repeated: whether an earlier entry has its id.
    """

    index: int
    label: str
    where: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    id: str | None = None
    repeated: bool = False


class Entries(Protocol):
    """Reads the entries of a range."""

    store: Store
    source: str

    def of(self, unit: dict[str, Any]) -> Iterator[Entry]:
        """Exactly as many entries as the range has records, in order."""
        ...


@dataclass(frozen=True)
class JsonLines:
    """Entries from lines of a JSONL file.

    Args:
        store: the file's folder.
        name: the file.
        source: what the records call where they come from.
    """

    store: Store
    name: str
    source: str

    def of(self, unit: dict[str, Any]) -> Iterator[Entry]:
        """One entry per line that is not blank."""
        with self.store.open_input(self.name) as file:
            file.seek(unit["start"])
            data = file.read(unit["end"] - unit["start"])
        index, repeated = unit["first"], set(unit["repeated"])
        for number, text in enumerate(data.split(b"\n"), start=unit["line"]):
            if text.strip():
                where = {"file": self.store.address(self.name), "line": number}
                entry = Entry(index, f"line {number}", where, repeated=number in repeated)
                try:
                    entry.values = parse_line(text)
                except InputError as error:
                    entry.error = str(error)
                yield entry
                index += 1


@dataclass(frozen=True)
class ArrayItems:
    """Entries from a JSON array, which the ranges carry with them."""

    store: Store
    name: str
    source: str

    def of(self, unit: dict[str, Any]) -> Iterator[Entry]:
        """One entry per item."""
        repeated = set(unit["repeated"])
        for index, text in enumerate(unit["items"], start=unit["first"]):
            where = {"file": self.store.address(self.name), "item": index}
            entry = Entry(index, f"item {index}", where, repeated=index in repeated)
            try:
                entry.values = parse_line(text)
            except InputError as error:
                entry.error = str(error)
            yield entry


@dataclass(frozen=True)
class Files:
    """Entries from Parquet, Arrow or tar files.

    Args:
        store: the folder that the files' names are relative to.
        source: what the records call where they come from.
        columns: the columns to read.
    """

    store: Store
    source: str
    columns: frozenset[str]

    def of(self, unit: dict[str, Any]) -> Iterator[Entry]:
        """The entries of each part of the range; a damaged rest of a file fails one by one."""
        index, repeated = unit["first"], set(unit["repeated"])
        for part in json.loads(unit["parts"]):
            end = index + part["count"]
            for entry in self._part(part, index):
                entry.repeated = entry.index in repeated
                index = entry.index + 1
                yield entry
            assert index == end, f"{part['file']} was cut into {end}, read {index}"

    def _part(self, part: dict[str, Any], first: int) -> Iterator[Entry]:
        name, count = part["file"], part["count"]
        where = {"file": self.store.address(name)}
        done, error = 0, part["damage"]
        try:
            rows = iter(()) if error else read_rows(self.store, name, part, self.columns)
            for values in rows:
                yield _entry(first + done, name, where, part["offset"] + done, values)
                done += 1
            error = error or "it ends early"
        except Exception as found:  # a damaged file can raise anything
            error = f"cannot be read ({' '.join(str(found).split())[:200]})"
        for missing in range(done, count):
            label = f"record {part['offset'] + missing} of {name}" if not part["damage"] else name
            yield Entry(first + missing, label, where, error=error)


def _entry(index: int, name: str, where: dict[str, Any], row: int, values: dict[str, Any]) -> Entry:
    key = values.pop("__key__", None)
    if key is None:
        return Entry(index, f"row {row} of {name}", {**where, "row": row}, values)
    damage = values.pop("__damage__", None)
    stem = str(PurePosixPath(name).with_suffix(""))
    place = {**where, "sample": key}
    return Entry(index, f"sample {key} of {name}", place, values, damage, f"{stem}/{key}")


def read_rows(
    store: Store, name: str, part: dict[str, Any], columns: frozenset[str]
) -> Iterator[dict[str, Any]]:
    """``part["count"]`` records of a file from ``part["offset"]`` on, as dictionaries."""
    if name.endswith(".tar"):
        yield from _tar_samples(store, name, part["offset"], part["count"])
        return
    skip, left = part["offset"], part["count"]
    for batch, first in batches(store, name, columns, skip, skip + left):
        begin = max(0, skip - first)
        chosen = batch.slice(begin, left)
        left -= chosen.num_rows
        skip += chosen.num_rows
        yield from chosen.to_pylist()
        if not left:
            return


def batches(
    store: Store, name: str, columns: frozenset[str] | None, start: int, stop: int
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of a Parquet or Arrow file that touch rows ``start`` to ``stop``, with each
    batch's first row."""
    with ExitStack() as stack:
        file = stack.enter_context(store.open_input(name))
        if name.endswith(".parquet"):
            yield from _parquet_batches(pq.ParquetFile(file), columns, start, stop)
            return
        if store.is_local:
            file = stack.enter_context(pa.memory_map(store.path(name)))
        first = 0
        for batch in open_arrow(file):
            if first >= stop:
                return
            if first + batch.num_rows > start:
                known = [c for c in batch.schema.names if columns is None or c in columns]
                yield batch.select(known), first
            first += batch.num_rows


def _parquet_batches(
    file: pq.ParquetFile, columns: frozenset[str] | None, start: int, stop: int
) -> Iterator[tuple[pa.RecordBatch, int]]:
    known = [name for name in file.schema_arrow.names if columns is None or name in columns]
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first + rows > start and first < stop:
            place = first
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=known):
                if place + batch.num_rows > start and place < stop:
                    yield batch, place
                place += batch.num_rows
        first += rows


def open_arrow(file: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow file, stream (as ``save_to_disk`` writes it) or file."""
    start = file.read(6)
    file.seek(0)
    if start == b"ARROW1":
        reader = pa.ipc.open_file(file)
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(pa.ipc.open_stream(file))


def _tar_samples(store: Store, name: str, offset: int, count: int) -> Iterator[dict[str, Any]]:
    with store.open_input(name) as file:
        file.seek(offset)
        with tarfile.open(fileobj=io.BufferedReader(file, READ_AHEAD), mode="r:") as tar:
            sample: dict[str, Any] = {}
            for member in members(tar):
                key, extension = split_key(member.name)
                if sample and sample["__key__"] != key:
                    yield sample
                    count -= 1
                    sample = {}
                    if not count:
                        return
                sample.setdefault("__key__", key)
                _add(sample, tar, member, extension)
            if sample:
                yield sample


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files in a tar that are part of samples; ends early where the tar is damaged."""
    while True:
        try:
            member = tar.next()
        except tarfile.TarError:
            return
        if member is None:
            return
        tar.members = []  # or the tar remembers every header it has seen
        if member.isfile() and not PurePosixPath(member.name).name.startswith((".", "__")):
            yield member


def split_key(name: str) -> tuple[str, str]:
    """A member's key (all up to the first dot of its file name) and its extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return records.clean_text(f"{folder}{slash}{stem}"), extension


def _add(
    sample: dict[str, Any], tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str
) -> None:
    """One file of a sample as columns: JSON as its own, an image by its name without suffix."""
    opened = tar.extractfile(member)
    try:
        data = opened.read() if opened else b""
        if len(data) != member.size:
            raise tarfile.ReadError("unexpected end of data")
        if extension == "json":
            sample.update({k: v for k, v in parse_line(data).items() if k not in sample})
        elif is_image(f".{extension}"):
            inner = extension.rpartition(".")[0]
            sample[inner or "image"] = data
        elif extension in ("txt", "text", "caption"):
            sample["txt"] = data.decode("utf-8", "replace").strip()
    except (tarfile.TarError, InputError, OSError) as error:
        sample["__damage__"] = f"{member.name} is damaged: {error}"


def is_image(name: str) -> bool:
    """Whether a name is one of an image file."""
    dot = name.rpartition(".")[2].lower()
    return f".{dot}" in IMAGE_SUFFIXES


def parse_line(text: bytes | str) -> dict[str, Any]:
    """A JSON text as an object.

    Raises:
        InputError: it is not JSON, or not an object.
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from None
    if not isinstance(line, dict):
        raise InputError(f"a JSON {type(line).__name__} where an object was expected")
    return line


def identity(values: dict[str, Any], layout: Layout) -> str | None:
    """What a record's columns call it, if they do."""
    parts = [values.get(name) for name in layout.id]
    if not parts or any(not isinstance(p, str | int) or p == "" for p in parts):
        return None
    return records.clean_text("-".join(map(str, parts)))
