"""Containers: what is found out about Parquet, Arrow and tar files before work starts.

Only footers, headers and id columns are read, by tasks where there are many files. A damaged file
yields a record of its own that fails, so that the rest of the input goes on.
"""

from __future__ import annotations

import io
import json
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from dim.errors import InputError, StorageError
from infra import storage
from infra.storage import Store
from pipelines.readers import bounds, compression, entries, forms, ids
from pipelines.readers.addresses import Addresses, Place
from pipelines.readers.compression import Layers
from pipelines.readers.cutter import Cutter, Ids
from pipelines.readers.layout import Layout
from pipelines.readers.listing import list_files
from pipelines.readers.names import is_hidden, is_hidden_table, said, shown
from pipelines.readers.scanning import in_tasks

_MOST_NAMED = 30  # columns in a message
_JSON = (".json", ".jsonl", ".ndjson")
_ARCHIVES = (".zip", ".7z", ".rar")
_STATE = "state.json"  # names the files of a data set that save_to_disk wrote

_Start = tuple[int, str | None]
"""Where a record starts, a row of a table or a byte of a tar; and what it is called."""


class _DamagedError(Exception):
    """A file that is read only up to a place; the message says which."""


class Containers(NamedTuple):
    """The container files at an address.

    Attributes:
        store: the folder that their names are relative to.
        files: their names and sizes, in order of name.
        kind: ``forms.TABLE`` or ``forms.TAR``, which all of them are; ``forms.JSON`` if the
            address is that of a file that is none; ``None`` if there are none in a folder.
        hidden: how many more there are that are hidden.
        single: whether the address is that of a file.
        layers: what a JSON file has to be put through, if it is compressed.
        advice: of a folder without containers, what may have been meant.
    """

    store: Store
    files: list[tuple[str, int]]
    kind: str | None = None
    hidden: int = 0
    single: bool = False
    layers: Layers = ()
    advice: str = ""


def find_files(uri: str, roots: Sequence[Store] = ()) -> Containers:
    """The container files at an address; none is an answer.

    One file is what is in it, whatever it is called. Of a folder's files the names decide; a link
    to a folder elsewhere is among them, and fails when it is read.

    Args:
        uri: of a file or a folder.
        roots: where the folder's links may lead.

    Raises:
        StorageError: the address cannot be read.
        InputError: it mixes kinds of containers, or they are compressed as a whole.
    """
    if storage.open_store(uri).is_file():
        return _single(*storage.open_file(uri))
    store = storage.open_store(uri)
    files, closed, _ = list_files(Addresses(store, tuple(roots)))
    named = [item for item in files if forms.container_suffix(item[0])]
    taken = [item for item in named if not _is_hidden(item[0])]
    hidden = len(named) - len(taken)
    plain = [item for item in taken if not compression.codec_of_name(item[0])]
    suffixes = sorted({forms.container_suffix(name) or "" for name, _ in plain})
    if not plain:
        return Containers(store, [], hidden=hidden, advice=hint(store, files, hidden))
    if len(suffixes) > 1:
        raise InputError(f"{uri} holds {' and '.join(suffixes)} files; give one kind at a time")
    for name, _ in taken:
        codec = compression.codec_of_name(name)
        if codec is not None and forms.container_suffix(name) == suffixes[0]:
            raise compression.refusal(store.address(name), codec)
    if suffixes == [".arrow"]:
        plain = _saved(store, files, plain)
    plain = sorted([*plain, *((name, 0) for name in closed if not is_hidden(name))])
    return Containers(store, plain, forms.of_suffix(suffixes[0]), hidden)


def hint(store: Store, files: Sequence[tuple[str, int]], hidden: int) -> str:
    """What to do with a folder of other things."""
    if hidden:
        return f" ({hidden:,} that are hidden are left out)"
    for name in (name for name, _ in files if not is_hidden(name)):
        suffix = PurePosixPath(compression.without_suffix(name)).suffix.lower()
        codec = compression.codec_of_name(name)
        if suffix in _JSON:
            return f"; a JSON file is read by its own address, such as {store.address(name)}"
        if suffix in _ARCHIVES:
            return f"; {store.address(name)} has to be unpacked first"
        if codec is not None and forms.container_suffix(name):
            return f"; {compression.refusal(store.address(name), codec)}"
    return ""


def _single(store: Store, name: str) -> Containers:
    try:
        kind, layers = forms.of_file(store, name)
    except OSError as error:
        raise InputError(f"{store.address(name)} is damaged: {said(error)}") from None
    if kind == forms.JSON:
        return Containers(store, [], kind, single=True, layers=layers)
    size = store.filesystem.get_file_info(store.path(name)).size
    return Containers(store, [(name, size)], kind, single=True)


def _is_hidden(name: str) -> bool:
    if forms.container_suffix(name) == ".tar":
        return is_hidden(name) or PurePosixPath(name).name.startswith(("_", "cache-"))
    return is_hidden_table(name)


def _saved(
    store: Store, listed: Sequence[tuple[str, int]], files: list[tuple[str, int]]
) -> list[tuple[str, int]]:
    """Those Arrow files that a ``state.json`` beside them names, where there is one."""
    there = {name for name, _ in listed}
    named: set[str] = set()
    folders: set[str] = set()
    for name in there:
        path = PurePosixPath(name)
        files_of = _data_files(store, name) if path.name == _STATE else None
        if files_of is not None:
            folders.add(str(path.parent))
            named |= {str(path.parent / part) for part in files_of}
    missing = sorted(named - there)
    if missing:
        raise InputError(
            f"{store.uri} lacks {shown(missing[0])}, which its {_STATE} names"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}"
        )
    return [
        item
        for item in files
        if str(PurePosixPath(item[0]).parent) not in folders or item[0] in named
    ]


def _data_files(store: Store, name: str) -> list[str] | None:
    """The files that a ``state.json`` names, which lie beside it; ``None`` if it is another's."""
    where = store.address(name)
    state = entries.parse_json(store.read(name, bounds.MAX_BYTES), where)
    if not isinstance(state, dict) or "_data_files" not in state:
        return None
    try:
        files = [item["filename"] for item in state["_data_files"]]
    except (TypeError, KeyError):
        raise InputError(f"{where} does not name its files as save_to_disk does") from None
    for file in files:
        if not isinstance(file, str) or PurePosixPath(file).name != file:
            raise InputError(f"{where} names a file that is not beside it: {shown(file)!r}")
    return files


def _scan_table(store: Store, name: str, size: int, layout: Layout) -> Iterator[_Start]:
    with bounds.open_keys(store, name, size, layout.id) as (schema, found):
        check_columns(store.address(name), schema, layout)
        rows = (values for batch in found for values in batch.to_pylist())
        for row, values in enumerate(rows):
            yield row, entries.known_id(values, layout)


def check_columns(where: str, schema: pa.Schema, layout: Layout) -> None:
    """See that a table has what the layout needs.

    Raises:
        InputError: it does not; the message names what there is.
    """
    for names in layout.required:
        if not set(names) & set(schema.names):
            more = len(schema.names) - _MOST_NAMED
            raise InputError(
                f"{where} has no column {' or '.join(map(repr, names))}; its columns are "
                f"{', '.join(map(shown, schema.names[:_MOST_NAMED]))}"
                f"{f' and {more:,} more' if more > 0 else ''}: choose a --layout that fits"
            )


def _scan_tar(
    store: Store, name: str, size: int, called: str, hidden: Counter[str]
) -> Iterator[_Start]:
    with store.open_input(name) as file:
        reader = bounds.TarReader(file, bounds.MAX_BYTES)
        check_plain(reader, store.address(name))
        with tarfile.open(fileobj=reader, mode="r:") as tar:
            last, end = None, 0
            for member in entries.members(tar, hidden):
                key, _ = entries.split_key(member.name)
                if key != last:
                    yield member.offset, f"{called}/{key}"
                    last = key
                end = member.offset_data + member.size
            stopped = tar.offset
        if end > size:
            return
        reader.seek(stopped)
        if reader.read(tarfile.BLOCKSIZE).strip(b"\0"):  # neither zeros nor the end of the file
            raise _DamagedError(f"{store.address(name)} is damaged from byte {stopped} on")


def check_plain(reader: io.BufferedReader, where: str) -> None:
    """Refuse a tar that is compressed, whatever it is called.

    Raises:
        InputError: it is.
    """
    codec = compression.codec_of(reader.peek(1), where)
    if codec is not None:
        raise compression.refusal(where, codec)


@dataclass
class Scanned:
    """What is known of a file's records.

    Attributes:
        ids: what they are called.
        offsets: where each starts, but for one that cannot be read.
        damage: why the last one cannot be read, if that is so.
        hidden: members of a tar that are left out.
    """

    ids: Ids
    offsets: array[int] = field(default_factory=lambda: array("q"))
    damage: str | None = None
    hidden: int = 0

    def until(self, damage: str) -> Scanned:
        """The same, with a record more that cannot be read."""
        self.damage = damage
        self.ids.add(None)
        return self


def _scan(
    found: Containers,
    layout: Layout,
    source: str,
    addresses: Addresses,
    file: tuple[str, int, str],
) -> Scanned:
    """Every record of a file; one that cannot be read to its end has one more, which fails.

    Args:
        file: its name, its size, and what the samples of a tar are called after.

    Raises:
        InputError: a table lacks a column that the layout needs, or a tar is compressed.
        StorageError: the store does not give the file.
    """
    (name, size, called), store, hidden = file, found.store, Counter[str]()
    scanned = Scanned(Ids(source))
    try:
        if not found.single:
            addresses.checked(Place(store, name))
    except InputError as error:  # it is a link that leads out of its folder
        return scanned.until(str(error))
    if found.kind == forms.TAR:
        starts = _scan_tar(store, name, size, called, hidden)
    else:
        starts = _scan_table(store, name, size, layout)
    try:
        for offset, identity in starts:
            scanned.ids.add(identity)
            scanned.offsets.append(offset)
    except (InputError, StorageError):
        raise
    except _DamagedError as error:
        scanned.until(str(error))
    except (pa.ArrowException, OSError, tarfile.TarError) as error:
        scanned.until(f"{store.address(name)} is damaged: {said(error)}")
    scanned.hidden = hidden.total()
    return scanned


def cut(
    found: Containers,
    layout: Layout,
    rows_per_range: int,
    source: str,
    roots: Sequence[Store] = (),
) -> tuple[Cutter, int]:
    """The files as ranges of ``rows_per_range`` records each, over the files' borders; and the
    number of hidden members of tars."""
    cutter, hidden = Cutter(rows_per_range, source), 0
    called = ids.apart([name for name, _ in found.files], forms.without_suffix)
    files = [
        (name, size, called.get(name, forms.without_suffix(name))) for name, size in found.files
    ]
    parts: list[dict[str, Any]] = []

    def take(rows: int, **part: Any) -> None:
        if not cutter.room:
            _close(cutter, parts)
            cutter.begin(files="")
        parts.append({**part, "count": rows})
        cutter.count(rows)

    addresses = Addresses(found.store, tuple(roots))
    bare = found._replace(files=[])  # or every task would be sent all names
    scans = in_tasks(partial(_scan, bare, layout, source, addresses), files)
    for (name, _, stem), scanned in zip(files, scans, strict=True):
        part, done = {"file": name, "kind": found.kind, "called": stem}, 0
        while done < len(scanned.offsets):
            rows = min(len(scanned.offsets) - done, cutter.room or rows_per_range)
            take(rows, **part, offset=scanned.offsets[done], damage=None)
            done += rows
        if scanned.damage is not None:
            take(1, **part, offset=0, damage=scanned.damage)
        cutter.ids.extend(scanned.ids)
        hidden += scanned.hidden
    _close(cutter, parts)
    cutter.name_repeated()
    return cutter, hidden


def _close(cutter: Cutter, parts: list[dict[str, Any]]) -> None:
    if cutter.ranges and parts:
        cutter.ranges[-1]["files"] = json.dumps(parts)
        parts.clear()
