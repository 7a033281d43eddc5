"""Sources: how an input is cut into ranges of records, before anything of it is read.

A range holds ``rows_per_file`` records and becomes one file of the output. It depends on the input
alone, never on the cluster, so that the same input always gives the same files.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from dim import records
from dim.errors import InputError
from infra import storage
from infra.storage import Store
from pipelines.stages.readers import (
    ImageFiles,
    ImageLines,
    JsonLines,
    PairLines,
    TabletopImages,
    TabletopPairs,
    line_id,
)

_IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_READ_AHEAD = 1 << 20


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


def pairs_from_lines(uri: str, source: str | None, rows_per_file: int) -> Source:
    """Edit pairs named by a JSONL file.

    Raises:
        StorageError: there is no such file.
        InputError: it is empty.
    """
    lines, scan = _open_lines(uri, source, rows_per_file)
    return Source(scan.units, PairLines(lines), scan.rows, scan.identity, records.RAW_PAIR)


def images_from_lines(uri: str, source: str | None, rows_per_file: int) -> Source:
    """Images named by a JSONL file; errors as of :func:`pairs_from_lines`."""
    lines, scan = _open_lines(uri, source, rows_per_file)
    return Source(scan.units, ImageLines(lines), scan.rows, scan.identity, records.RAW_IMAGE)


def images_from_folder(uri: str, source: str | None, rows_per_file: int) -> Source:
    """All images in a folder and below it, in order of name.

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
    reader = ImageFiles(store, source or PurePosixPath(store.root).name)
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
    path = PurePosixPath(name)
    return path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")


@dataclass
class _Scan:
    """One pass over a JSONL file: where each range starts, and which lines repeat an id."""

    units: list[dict[str, Any]] = field(default_factory=list)
    rows: int = 0
    identity: dict[str, Any] = field(default_factory=dict)


def _open_lines(uri: str, source: str | None, rows_per_file: int) -> tuple[JsonLines, _Scan]:
    store, name = storage.open_file(uri)
    scan = _scan(store, name, rows_per_file)
    if not scan.rows:
        raise InputError(f"{uri} is empty")
    return JsonLines(store, name, source or PurePosixPath(name).stem), scan


def _scan(store: Store, name: str, rows_per_file: int) -> _Scan:
    scan, digest, seen, position = _Scan(), hashlib.sha256(), set[bytes](), 0
    with io.BufferedReader(store.open_input(name), _READ_AHEAD) as file:
        for number, line in enumerate(file, start=1):
            digest.update(line)
            if line.strip():
                if scan.rows % rows_per_file == 0:
                    unit = {"first": scan.rows, "line": number, "start": position, "repeated": [0]}
                    scan.units.append(unit)
                scan.rows += 1
                if _is_repeated(line, seen):
                    scan.units[-1]["repeated"].append(number)
            position += len(line)
            if scan.units:
                scan.units[-1]["end"] = position
    scan.identity = {"file": storage.join(store.uri, name), "sha256": digest.hexdigest()}
    return scan


def _is_repeated(line: bytes, seen: set[bytes]) -> bool:
    """Whether an earlier line had this line's id; 8 bytes of a hash stand for an id."""
    identity = line_id(line)
    if identity is None:
        return False
    short = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    repeated = short in seen
    seen.add(short)
    return repeated
