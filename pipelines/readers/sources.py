"""Sources: how an input is cut into ranges of records, before anything of it is read.

A range holds ``rows_per_file`` records and becomes one file of the output. It depends on the input
alone, never on the cluster, so that the same input always gives the same files.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from dim import records
from dim.errors import InputError
from infra import storage
from pipelines.readers import containers
from pipelines.readers.bounds import MAX_BYTES, READ_AHEAD
from pipelines.readers.containers import Cutter
from pipelines.readers.entries import (
    ArrayItems,
    Entries,
    Files,
    JsonLines,
    is_image,
    parse_line,
)
from pipelines.readers.entries import identity as identity_of
from pipelines.readers.fetch import FetchConfig
from pipelines.readers.join import MediaConfig, MediaIndex
from pipelines.readers.layout import Layout
from pipelines.readers.records import ImageFiles, Records, TabletopImages, TabletopPairs


@dataclass(frozen=True)
class Source:
    """An input, cut up.

    Attributes:
        units: one row per range, as :attr:`reader` wants it.
        reader: from a batch of ranges to tables of records.
        rows: records in all ranges.
        identity: the same exactly when the input is.
        schema: what the records are.
    """

    units: list[dict[str, Any]]
    reader: Callable[[pa.Table], Iterator[pa.Table]]
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
) -> Source:
    """Records of a JSONL file, a JSON array, or Parquet, Arrow or tar files, by a layout.

    Args:
        uri: one file, or a folder of files of one kind.
        media: where the images lie, if not beside the records or in them.
        fetch: how images behind URLs are fetched; without it they are not.
        max_bytes: size of an image at most, wherever it lies but behind a URL.

    Raises:
        StorageError: there is nothing at the address.
        InputError: it holds no records, or lacks a column that the layout needs.
    """
    store, files = containers.find_files(uri)
    reader: Entries
    if files:
        reader = Files(store, source or _name_of(uri), layout.columns, max_bytes)
        cutter = containers.cut(store, files, layout, rows_per_range)
        identity: dict[str, Any] = {"files": records.sha256_hex(repr((store.uri, files)).encode())}
    else:
        if not storage.open_store(uri).is_file() and storage.open_store(uri).exists():
            raise InputError(f"there are no .parquet, .arrow or .tar files in {uri}")
        file_store, name = storage.open_file(uri)
        kind = ArrayItems if name.endswith(".json") else JsonLines
        reader = kind(file_store, name, source or _name_of(uri))
        cutter, identity = _scan(reader, layout, rows_per_range)
    if not cutter.rows:
        raise InputError(f"{uri} is empty")
    index = MediaIndex(media, max_bytes) if media is not None else None
    if index is not None:
        index.join(cutter.units, reader, layout)
        identity["media"] = records.sha256_hex(repr(index.identity).encode())
        identity |= {"keys_unmatched": index.unmatched, "images_unused": index.unused}
    made = Records(reader, layout, fetch, index.media if index else None, max_bytes)
    return Source(cutter.units, made, cutter.rows, identity, made.schema)


def images_from_folder(
    uri: str, source: str | None, rows_per_file: int, max_bytes: int = MAX_BYTES
) -> Source:
    """All images in a folder and below it, in order of name; none over ``max_bytes`` is read.

    Raises:
        InputError: there is none.
    """
    store = storage.open_store(uri)
    found = [item for item in store.list() if _is_image(item[0])]
    if not found:
        raise InputError(f"there are no images in {uri}")
    names = [name for name, _ in found]
    units = [
        {"first": first, "names": names[first : first + rows_per_file]}
        for first in range(0, len(names), rows_per_file)
    ]
    identity = {"images": records.sha256_hex(repr(found).encode())}
    reader = ImageFiles(store, source or PurePosixPath(store.root).name, max_bytes)
    return Source(units, reader, len(names), identity, records.RAW_IMAGE)


def tabletop_pairs(count: int, rows_per_file: int, reader: TabletopPairs) -> Source:
    """``count`` edit pairs of the tabletop world."""
    return Source(_counted(count, rows_per_file), reader, count, {}, records.RAW_PAIR)


def tabletop_images(count: int, rows_per_file: int, reader: TabletopImages) -> Source:
    """``count`` images of the tabletop world with their captions."""
    return Source(_counted(count, rows_per_file), reader, count, {}, records.RAW_IMAGE)


def _counted(count: int, rows_per_file: int) -> list[dict[str, Any]]:
    return [
        {"first": first, "count": min(rows_per_file, count - first)}
        for first in range(0, count, rows_per_file)
    ]


def _is_image(name: str) -> bool:
    return is_image(name) and not PurePosixPath(name).name.startswith(".")


def _name_of(uri: str) -> str:
    return PurePosixPath(storage.open_store(uri).root).stem


def _scan(
    reader: JsonLines | ArrayItems, layout: Layout, rows_per_range: int
) -> tuple[Cutter, dict[str, Any]]:
    """One pass over a file: where each range starts, and which entries repeat an id."""
    cutter, digest = Cutter(rows_per_range), hashlib.sha256()
    if isinstance(reader, ArrayItems):
        data = reader.store.read(reader.name)
        digest.update(data)
        for item in _array(data, reader.store.address(reader.name)):
            if cutter.begins():
                cutter.begin(items=[])
            text = json.dumps(item)
            cutter.units[-1]["items"].append(text)
            cutter.add(_id_of(text.encode(), layout))
    else:
        position = 0
        with io.BufferedReader(reader.store.open_input(reader.name), READ_AHEAD) as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    if cutter.begins():
                        cutter.begin(line=number, start=position)
                    cutter.add(_id_of(line, layout), number)
                position += len(line)
                if cutter.units:
                    cutter.units[-1]["end"] = position
    where = storage.join(reader.store.uri, reader.name)
    return cutter, {"file": where, "sha256": digest.hexdigest()}


def _array(data: bytes, where: str) -> list[Any]:
    try:
        items = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})") from None
    if not isinstance(items, list):
        raise InputError(f"{where} holds a JSON {type(items).__name__} where an array is expected")
    return items


def _id_of(text: bytes, layout: Layout) -> str | None:
    try:
        return identity_of(parse_line(text), layout)
    except InputError:
        return None
