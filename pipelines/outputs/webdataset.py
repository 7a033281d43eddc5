"""Records as WebDataset shards: tar files of samples, the same bytes for the same records."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator

import pyarrow as pa

from dim.images import suffix
from infra.storage import Store
from pipelines.outputs.manifest import FileEntry
from pipelines.outputs.shards import Shards

FOLDER = "data"

_BLOCK = tarfile.BLOCKSIZE
_END = tarfile.RECORDSIZE  # a tar is closed with zeros up to a multiple of this

Member = tuple[str, bytes]


def write(store: Store, shards: Shards, target_bytes: int) -> list[FileEntry]:
    """Write the kept records, in order, into ``data/train-00000.tar`` and on.

    A sample's key is its record's place in the input. ``KEY.image.EXT`` and, of a pair,
    ``KEY.image_target.EXT`` are the files of the record, byte for byte; ``KEY.json`` holds its
    other columns, among them its id.

    Args:
        target_bytes: size of a tar at most; a larger sample has its own.

    Raises:
        StorageError: something cannot be read or written.
    """
    samples = _samples(shards)
    following = next(samples, None)
    files: list[FileEntry] = []
    while following is not None or not files:
        name, rows = f"{FOLDER}/train-{len(files):05d}.tar", 0
        with store.open_output(name) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                while following is not None:
                    if rows and tar.offset + _size(following) + _END > target_bytes:
                        break
                    for member, data in following:
                        tar.addfile(_header(member, data), io.BytesIO(data))
                    rows, following = rows + 1, next(samples, None)
            files.append(FileEntry(path=name, rows=rows, bytes=file.size, sha256=file.sha256))
    return files


def _header(name: str, data: bytes) -> tarfile.TarInfo:
    """A header with nothing of this machine or this hour in it."""
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = len(data), 0o644, 0
    return header


def _size(sample: list[Member]) -> int:
    return sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for _, data in sample)


def _samples(shards: Shards) -> Iterator[list[Member]]:
    for batch in shards.batches():
        images = [field.name for field in batch.schema if pa.types.is_large_binary(field.type)]
        for row in batch.to_pylist():
            key = f"{row['index']:09d}"
            pictures = [(name, data) for name in images if (data := row.pop(name)) is not None]
            text = json.dumps(row, ensure_ascii=False, sort_keys=True).encode()
            files = [(f"{key}.{name}.{suffix(data)}", data) for name, data in pictures]
            yield [*files, (f"{key}.json", text)]
