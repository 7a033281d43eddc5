"""The samples of a stage, by the addresses of data jobs' outputs."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from dim.errors import InputError, StorageError
from dim.features.row_groups import ShardFile
from dim.features.shards import FeatureShards, ImageShards, are_features
from infra import storage
from infra.storage import Store


def holds_features(uris: Sequence[str]) -> bool:
    """Whether the data folders of a stage hold features (or images and texts, as is usual).

    Raises:
        InputError: some do and some do not.
        StorageError: a folder cannot be read.
    """
    features = [are_features(_first_schema(uri)) for uri in uris]
    if any(features) and not all(features):
        yes, no = uris[features.index(True)], uris[features.index(False)]
        raise InputError(f"{yes} holds features and {no} does not: a stage takes one kind of data")
    return all(features)


def open_features(
    uris: Sequence[str], texts: Sequence[str], *, edits: bool, every_file: bool = True
) -> FeatureShards:
    """Open feature shards for a stage, and check that they are whole and what it needs.

    Args:
        uris: Output folders of features jobs.
        texts: The texts that the stage trains on.
        edits: Whether it needs features of edits.
        every_file: Read every footer now, as the driver does; else each with the file's first row.

    Raises:
        InputError: as for ``FeatureShards``; or a file is not as long as its manifest says.
        StorageError: a folder or file cannot be read.
    """
    files = [file for uri in uris for file in _whole_files(uri)]
    shards = FeatureShards(files, texts, edits=edits, where=", ".join(uris))
    if every_file:
        shards.check_files()
    return shards


def open_images(
    uris: Sequence[str], columns: Sequence[str], *, every_file: bool = True
) -> ImageShards:
    """Open the outputs of data jobs, and check that they can be trained on.

    Args:
        uris: The output folders.
        columns: What is read of them.
        every_file: As for ``open_features``.

    Raises:
        InputError: as for ``ImageShards``; or a file is not as long as its manifest says.
        StorageError: a folder or file cannot be read.
    """
    files = [file for uri in uris for file in _whole_files(uri)]
    shards = ImageShards(files, columns, where=", ".join(uris))
    if every_file:
        shards.check_files()
    return shards


def fingerprint(uris: Sequence[str]) -> str:
    """A hash of what the data folders hold, to tell whether a run goes on with the same data."""
    digest = hashlib.sha256()
    for uri in uris:
        for file in _kept(storage.open_store(uri)):
            digest.update(f"{file['sha256']} {file['rows']}\n".encode())
    return digest.hexdigest()


def extent(uri: str) -> dict[str, int]:
    """How much a data folder holds: its kept ``records``, and their ``files``."""
    files = _kept(storage.open_store(uri))
    return {"records": sum(file["rows"] for file in files), "files": len(files)}


def _kept(store: Store) -> list[dict[str, Any]]:
    """What the manifest says of the files of kept records; nothing else is trained on."""
    manifest = json.loads(store.read("manifest.json"))
    files = [file for file in manifest["files"] if file["path"].startswith("data/")]
    for file in files:
        if posixpath.normpath(file["path"]) != file["path"]:  # it would lie elsewhere
            raise InputError(f"{store.address('manifest.json')} names the file {file['path']!r}")
    return files


def _first_schema(uri: str) -> pa.Schema:
    """The columns of the kept records at ``uri``."""
    store = storage.open_finished(uri)
    files = _kept(store)
    if not files:
        raise StorageError(f"the dataset {uri} has no data/*.parquet")
    with store.open_parquet(files[0]["path"]) as parquet:
        return parquet.schema_arrow


def _whole_files(uri: str) -> list[ShardFile]:
    """The files of kept records that the manifest at ``uri`` names, all of them whole."""
    store = storage.open_finished(uri)
    files = _kept(store)
    there = dict(store.list("data"))
    for file in files:
        size = there.get(file["path"])
        if size != file["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes"
            raise InputError(
                f"{store.address(file['path'])} {state}, and its manifest says "
                f"{file['bytes']} bytes: the copy is not complete"
            )
    return [
        ShardFile(
            store.uri,
            store.address(file["path"]),
            file["rows"],
            partial(store.open_parquet, file["path"]),
        )
        for file in files
    ]
