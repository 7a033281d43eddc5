"""The samples of a stage, by the addresses of data jobs' outputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from dim.errors import InputError
from dim.features.shards import FeatureShards, ImageShards, ShardFile, are_features
from infra import storage
from infra.storage import Store


def holds_features(uris: Sequence[str]) -> bool:
    """Whether the data folders of a stage hold features (or images and texts, as is usual).

    Raises:
        InputError: some do and some do not.
        StorageError: a folder cannot be read.
    """
    features = [are_features(storage.open_dataset([uri]).schema) for uri in uris]
    if any(features) and not all(features):
        yes, no = uris[features.index(True)], uris[features.index(False)]
        raise InputError(f"{yes} holds features and {no} does not: a stage takes one kind of data")
    return all(features)


def open_features(uris: Sequence[str], texts: Sequence[str], *, edits: bool) -> FeatureShards:
    """Open feature shards for a stage, and check that they are whole and what it needs.

    Raises:
        InputError: as for ``FeatureShards``; or a file is not as long as its manifest says.
        StorageError: a folder or file cannot be read.
    """
    files = [file for uri in uris for file in _whole_files(uri)]
    return FeatureShards(files, texts, edits=edits, where=", ".join(uris))


def open_images(uris: Sequence[str], columns: Sequence[str]) -> ImageShards:
    """Open the outputs of data jobs, and check that they can be trained on.

    Raises:
        InputError: as for ``ImageShards``; the message says where.
        StorageError: a folder cannot be read.
    """
    return ImageShards(storage.open_dataset(uris), columns, where=", ".join(uris))


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
    return [file for file in manifest["files"] if file["path"].startswith("data/")]


def _whole_files(uri: str) -> list[ShardFile]:
    """The files of kept records that the manifest at ``uri`` names, all of them whole."""
    store = storage.open_store(uri)
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
        ShardFile(store.uri, store.address(name), partial(store.open_parquet, name))
        for name in (file["path"] for file in files)
    ]
