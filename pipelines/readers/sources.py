"""Sources: how an input is cut into ranges of records, before anything of it is read.

A range holds ``rows_per_file`` records and becomes one file of the output. It depends on the input
alone, never on the cluster, so that the same input always gives the same files.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from dim import records
from dim.errors import InputError
from infra import storage
from pipelines.attempts import Work
from pipelines.readers import compression, containers, ids, tabletop
from pipelines.readers.addresses import Addresses
from pipelines.readers.bounds import MAX_BYTES
from pipelines.readers.containers import Containers
from pipelines.readers.cutter import Cutter
from pipelines.readers.entries import Entries, Files, JsonTexts, known_id, parse_line
from pipelines.readers.fetch import FetchConfig
from pipelines.readers.join import MediaConfig, MediaIndex
from pipelines.readers.json_files import JsonFile
from pipelines.readers.layout import Layout
from pipelines.readers.listing import list_files
from pipelines.readers.names import is_hidden, is_image, without_suffix
from pipelines.readers.records import Records, image_files
from pipelines.readers.tabletop import TabletopConfig


@dataclass(frozen=True)
class Source:
    """An input, cut up.

    Attributes:
        ranges: one row per range, as :attr:`reader` wants it.
        reader: of the records of a range.
        rows: records in all ranges.
        identity: the same exactly when the input is.
        schema: what the records are.
    """

    ranges: list[dict[str, Any]]
    reader: Work[dict[str, Any]]
    rows: int
    identity: dict[str, Any]
    schema: pa.Schema


def from_records(
    uri: str,
    layout: Layout,
    source: str | None,
    rows_per_range: int,
    *,
    media: MediaConfig | None = None,
    fetch: FetchConfig | None = None,
    max_bytes: int = MAX_BYTES,
    read_from: Sequence[str] = (),
) -> Source:
    """Records of a JSON file, or Parquet, Arrow or tar files, by a layout.

    Args:
        uri: one file, or a folder of files of one kind.
        media: where the images lie, if not beside the records or in them.
        fetch: how images behind URLs are fetched; without it they are not.
        max_bytes: size of an image at most, wherever it lies but behind a URL.
        read_from: where names in the records may lead besides their own folder.

    Raises:
        StorageError: there is nothing at the address.
        InputError: it holds no records, lacks a column that the layout needs, or is of a form
            that is not read.
    """
    roots = tuple(map(storage.open_store, read_from))
    found = containers.find_files(uri, roots)
    called, hidden = source or _name_of(uri), found.hidden
    reader: Entries
    if found.files:
        reader = Files(found.store, called, layout.columns, max_bytes)
        cutter, more = containers.cut(found, layout, rows_per_range, called, roots)
        hidden += more
        seen = repr((found.store.uri, found.files))
        identity: dict[str, Any] = {"files": records.sha256_hex(seen.encode())}
    else:
        if found.kind is None and storage.open_store(uri).exists():
            raise InputError(f"there are no .parquet, .arrow or .tar files in {uri}{found.advice}")
        reader, cutter, identity = _json(uri, found, called, layout, rows_per_range)
    if not cutter.rows:
        raise InputError(f"{uri} is empty")
    index = MediaIndex(media, max_bytes, roots) if media is not None else None
    if index is not None:
        index.join(cutter.ranges, reader, layout)
        hidden += index.hidden
        identity["media"] = records.sha256_hex(repr(index.identity).encode())
        identity |= {"keys_unmatched": index.unmatched, "images_unused": index.unused}
    made = Records(reader, layout, fetch, index.media if index else None, max_bytes, roots)
    return Source(cutter.ranges, made, cutter.rows, _with(identity, hidden), made.schema)


def images_from_folder(
    uri: str,
    source: str | None,
    rows_per_file: int,
    max_bytes: int = MAX_BYTES,
    *,
    read_from: Sequence[str] = (),
) -> Source:
    """All images in a folder and below it, in order of name, but for those that are hidden.

    An image's id is its name without suffix; of cat.jpg and cat.png it is the whole name.
    None over ``max_bytes`` is read.

    Raises:
        InputError: there is none.
    """
    store = storage.open_store(uri)
    addresses = Addresses(store, tuple(map(storage.open_store, read_from)))
    listed = list_files(addresses)
    images = [item for item in listed.files if is_image(item[0])]
    found = [item for item in images if not is_hidden(item[0])]
    hidden = len(images) - len(found)
    if not found:
        raise InputError(
            f"there are no images in {uri}{containers.hint(store, listed.files, hidden)}"
        )
    names = [name for name, _ in found]
    shared = ids.apart(names, without_suffix)
    if listed.closed:
        names = sorted([*names, *(name for name in listed.closed if not is_hidden(name))])
    ranges = []
    for first in range(0, len(names), rows_per_file):
        part = names[first : first + rows_per_file]
        called = {name: shared[name] for name in part if name in shared} if shared else {}
        ranges.append(
            {"first": first, "count": len(part), "names": part, "called": json.dumps(called)}
        )
    identity = {"images": records.sha256_hex(repr(found).encode())}
    reader = image_files(addresses, source or PurePosixPath(store.root).name, max_bytes)
    return Source(ranges, reader, len(names), _with(identity, hidden), reader.schema)


def _with(identity: dict[str, Any], hidden: int) -> dict[str, Any]:
    """What identifies an input, and how many hidden files of it were left out, if any were."""
    return {**identity, "hidden": hidden} if hidden else identity


def from_tabletop(world: TabletopConfig, count: int, rows_per_file: int, *, pairs: bool) -> Source:
    """``count`` edit pairs of the tabletop world, or images with their captions."""
    ranges = [
        {"first": first, "count": min(rows_per_file, count - first)}
        for first in range(0, count, rows_per_file)
    ]
    reader = tabletop.reader(world, pairs=pairs)
    return Source(ranges, reader, count, {}, reader.schema)


def _name_of(uri: str) -> str:
    name = PurePosixPath(storage.open_store(uri).root).name
    return PurePosixPath(compression.without_suffix(name)).stem


def _json(
    uri: str, found: Containers, source: str, layout: Layout, rows_per_range: int
) -> tuple[Entries, Cutter, dict[str, Any]]:
    """One pass over a file: where each range starts, and which entries repeat an id."""
    store, name = storage.open_file(uri)
    file = JsonFile(store, name, found.layers, layout)
    cutter, lines = Cutter(rows_per_range, source), array("q")
    for number, start, end, text in file.records():
        if not cutter.room:
            cutter.begin(start=start, line=number or 0)
        try:
            cutter.ids.add(known_id(parse_line(text), layout))
        except InputError:  # said when it is read
            cutter.ids.add(None)
        cutter.count(1)
        cutter.ranges[-1]["end"] = end
        if number is not None:
            lines.append(number)
    cutter.name_repeated(np.frombuffer(lines, np.int64) if file.in_lines else None)
    where = storage.join(store.uri, name)
    identity = {"file": where, "sha256": file.digest.hexdigest()}
    reader = JsonTexts(store, name, source, found.layers, file.in_lines)
    return reader, cutter, identity
