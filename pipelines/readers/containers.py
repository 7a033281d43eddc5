"""Containers: what the driver finds out about Parquet, Arrow and tar files before work starts.

Only footers, headers and id columns are read. A file that is damaged yields a record of its own
that fails, so that the rest of the input goes on.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from dim.errors import InputError, StorageError
from dim.records import short_hash
from infra import storage
from infra.storage import Store
from pipelines.readers import bounds, entries
from pipelines.readers.layout import Layout

SUFFIXES = (".parquet", ".arrow", ".tar")
_STATE = "state.json"  # names the files of a data set that save_to_disk wrote


class Found(NamedTuple):
    """One record of a file: where it starts, what it is called, and why it cannot be read.

    ``offset`` is a row of a table, or a byte of a tar.
    """

    offset: int
    identity: str | None = None
    damage: str | None = None


def find_files(uri: str) -> tuple[Store, list[tuple[str, int]]]:
    """The container files at an address, with their sizes, in order of name; none is an answer.

    Raises:
        StorageError: the address cannot be read.
        InputError: it mixes kinds of containers, or names a compressed tar.
    """
    if storage.open_store(uri).is_file():
        store, name = storage.open_file(uri)
        listed = [item for item in store.list() if item[0] == name]
        return store, [item for item in listed if name.endswith(SUFFIXES)]
    store = storage.open_store(uri)
    listed = store.list()
    files = [item for item in listed if _is_container(item[0])]
    kinds = sorted({PurePosixPath(name).suffix for name, _ in files})
    if len(kinds) > 1:
        raise InputError(f"{uri} holds {' and '.join(kinds)} files; give one kind at a time")
    if kinds == [".arrow"]:
        files = _saved(store, listed, files)
    return store, files


def _is_container(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix in SUFFIXES and not path.name.startswith((".", "_", "cache-"))


def _saved(
    store: Store, listed: Sequence[tuple[str, int]], files: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Those Arrow files that a ``state.json`` beside them names, where there is one."""
    named: set[str] = set()
    folders: set[str] = set()
    for name, _ in listed:
        path = PurePosixPath(name)
        if path.name == _STATE:
            folders.add(str(path.parent))
            named |= {str(path.parent / file) for file in _named_in(store, name)}
    return [
        item
        for item in files
        if str(PurePosixPath(item[0]).parent) not in folders or item[0] in named
    ]


def _named_in(store: Store, name: str) -> list[str]:
    """The files that a ``state.json`` names.

    Raises:
        InputError: it is none.
        StorageError: it cannot be read.
    """
    try:
        state = entries.parse_line(store.read(name, bounds.MAX_BYTES))
        return [str(item["filename"]) for item in state.get("_data_files", [])]
    except (InputError, TypeError, KeyError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{store.address(name)} names no files of a data set ({said})") from None


def scan(store: Store, name: str, size: int, layout: Layout) -> Iterator[Found]:
    """Every record of one file.

    Raises:
        InputError: a table lacks a column that the layout needs.
        StorageError: the store does not give the file.
    """
    try:
        if name.endswith(".tar"):
            yield from _scan_tar(store, name, size)
        else:
            yield from _scan_table(store, name, size, layout)
    except (InputError, StorageError):
        raise
    except (pa.ArrowException, OSError, tarfile.TarError) as error:
        text = " ".join(str(error).split())[:200]
        yield Found(0, None, f"{store.address(name)} is damaged: {text}")


def _scan_table(store: Store, name: str, size: int, layout: Layout) -> Iterator[Found]:
    with bounds.open_keys(store, name, size, layout.id) as (schema, found):
        check_columns(store.address(name), schema, layout)
        row = 0
        for batch in found:
            for values in batch.to_pylist():
                yield Found(row, entries.identity(values, layout))
                row += 1


def check_columns(where: str, schema: pa.Schema, layout: Layout) -> None:
    """See that a table has what the layout needs.

    Raises:
        InputError: it does not; the message names what there is.
    """
    for names in layout.required:
        if not set(names) & set(schema.names):
            raise InputError(
                f"{where} has no column {' or '.join(map(repr, names))}; its columns are "
                f"{', '.join(schema.names)}: choose a --layout that fits"
            )


def _scan_tar(store: Store, name: str, size: int) -> Iterator[Found]:
    with store.open_input(name) as file:
        reader = bounds.TarReader(file, bounds.MAX_BYTES)
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            last, end = None, 0
            for member in entries.members(tar):
                key, _ = entries.split_key(member.name)
                if key != last:
                    yield Found(member.offset, f"{PurePosixPath(name).with_suffix('')}/{key}")
                    last = key
                end = member.offset_data + member.size
            stopped = tar.offset
        if end <= size and not _is_end(reader, stopped):
            yield Found(0, None, f"{store.address(name)} is damaged from byte {stopped} on")


def _is_end(reader: io.BufferedReader, offset: int) -> bool:
    """Whether a tar that stopped at ``offset`` ended there: with zeros, or with the file."""
    reader.seek(offset)
    return not reader.read(tarfile.BLOCKSIZE).strip(b"\0")


class Cutter:
    """Cuts a stream of records into ranges, and notices ids that repeat."""

    def __init__(self, rows_per_range: int) -> None:
        self.units: list[dict[str, Any]] = []
        self.rows = 0
        self._per_range = rows_per_range
        self._seen: set[bytes] = set()

    def begins(self) -> bool:
        """Whether the next record is the first of a range."""
        return self.rows % self._per_range == 0

    def begin(self, **more: Any) -> None:
        """Start a range. ``repeated`` is never empty, so that its type is known."""
        self.units.append({"first": self.rows, "repeated": [-1], **more})

    def add(self, identity: str | None, place: int | None = None) -> None:
        """Count one record in; ``place`` names it among the repeated, its index if not given."""
        if self._is_repeated(identity):
            self.units[-1]["repeated"].append(self.rows if place is None else place)
        self.rows += 1

    def _is_repeated(self, identity: str | None) -> bool:
        """Whether an earlier record had this id; 8 bytes of a hash stand for an id."""
        if identity is None:
            return False
        short = short_hash(identity)
        repeated = short in self._seen
        self._seen.add(short)
        return repeated


def cut(
    store: Store, files: Sequence[tuple[str, int]], layout: Layout, rows_per_range: int
) -> Cutter:
    """The files as ranges of ``rows_per_range`` records each, over the files' borders."""
    cutter = Cutter(rows_per_range)
    parts: list[dict[str, Any]] = []
    for name, size in files:
        for offset, called, damage in scan(store, name, size, layout):
            if cutter.begins():
                _close(cutter, parts)
                cutter.begin(parts="")
            if parts and parts[-1]["file"] == name and not (damage or parts[-1]["damage"]):
                parts[-1]["count"] += 1
            else:
                part = {"file": name, "offset": offset, "count": 1, "damage": damage}
                parts.append(part)
            cutter.add(called)
    _close(cutter, parts)
    return cutter


def _close(cutter: Cutter, parts: list[dict[str, Any]]) -> None:
    if cutter.units and parts:
        cutter.units[-1]["parts"] = json.dumps(parts)
        parts.clear()
