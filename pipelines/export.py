"""Export: a DIM-Edit folder in the public layout, ``tos_dataset_edit.jsonl`` beside ``image/``."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

import pyarrow.dataset as ds
import typer
from PIL import Image

from dim.config import StrictModel, dump_config
from dim.errors import InputError
from dim.records import EDIT, sha256_hex
from infra import storage
from infra.storage import Store
from pipelines import manifest as manifests
from pipelines.command import Out, Overwrite, summary
from pipelines.job import MARKER
from pipelines.manifest import Counts, FileEntry, Manifest
from pipelines.shards import Shards

LINES = "tos_dataset_edit.jsonl"
IMAGES = "image"

_COLUMNS = ("id", "image", "image_target", "answer")
_ROWS_AT_ONCE = 64
_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}


class ExportConfig(StrictModel):
    """What to export."""

    data: str
    """Address of the edit records, as ``dim data edit`` makes them."""
    out: str
    """Address of the folder to write to."""


def run(config: ExportConfig, *, overwrite: bool = False) -> Manifest:
    """Write the public form of a DIM-Edit folder.

    Each line has ``id``, ``image_path``, ``image_path_target`` and ``prompt``, which is the
    blueprint in its designer's words. Images are the source's own files.

    Raises:
        InputError: the data is not DIM-Edit or not finished, or ``out`` holds something else.
        StorageError: something cannot be read or written.
    """
    shards = Shards.open(config.data, EDIT)
    store = storage.open_store(config.out)
    done = manifests.read(store)
    if done and done.job == "export" and done.input == shards.identity and not overwrite:
        return done
    _claim(store, done, overwrite=overwrite)
    manifest = _write(store, shards, config)
    manifests.write(store, manifest)
    store.delete(MARKER)
    return manifest


def _claim(store: Store, done: Manifest | None, *, overwrite: bool) -> None:
    if done and not (overwrite and done.job == "export"):
        raise InputError(f"{store.uri} holds another output; choose another --out")
    if not done and not store.is_file(MARKER) and not store.is_empty():
        raise InputError(f"{store.uri} is not empty; choose another --out")
    store.write(MARKER, b'{"job": "export"}\n')
    for name in (manifests.NAME, LINES, IMAGES):
        store.delete(name)


def _write(store: Store, shards: Shards, config: ExportConfig) -> Manifest:
    lines: list[str] = []
    files: list[FileEntry] = []
    names = _Names()
    for row in _rows(shards):
        name = names.choose(row["id"])
        source, target = (
            _write_image(store, f"{name}_{role}", image)
            for role, image in (("source", row["image"]), ("target", row["image_target"]))
        )
        files += [source, target]
        line = {
            "id": row["id"],
            "image_path": source.path,
            "image_path_target": target.path,
            "prompt": row["answer"],
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    text = "".join(lines).encode()
    store.write(LINES, text)
    files.append(FileEntry(path=LINES, rows=len(lines), bytes=len(text), sha256=sha256_hex(text)))
    return Manifest(
        job="export",
        config=dump_config(config),
        input=shards.identity,
        counts=Counts(input=shards.rows, kept=len(lines), rejected=0, failed=0, by_reason={}),
        files=tuple(files),
    )


def _rows(shards: Shards) -> Iterator[dict[str, Any]]:
    """The records in order, a few in memory at a time."""
    paths = [shards.store.path(name) for name in shards.names]
    dataset = ds.dataset(paths, format="parquet", filesystem=shards.store.filesystem)
    for batch in dataset.to_batches(columns=list(_COLUMNS), batch_size=_ROWS_AT_ONCE):
        yield from batch.to_pylist()


def _write_image(store: Store, name: str, image: bytes) -> FileEntry:
    path = f"{IMAGES}/{name}.{_suffix(image)}"
    store.write(path, image)
    return FileEntry(path=path, rows=1, bytes=len(image), sha256=sha256_hex(image))


def _suffix(image: bytes) -> str:
    with Image.open(io.BytesIO(image)) as opened:
        return _SUFFIXES.get(opened.format or "", "bin")


class _Names:
    """File names from ids: safe, and different also where only letter case or signs differ."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def choose(self, record_id: str) -> str:
        """A name for a record; its id where that can be one."""
        name = re.sub(r"[^\w.-]+", "_", record_id)[:100].lstrip(".") or "record"
        if name != record_id or name.casefold() in self._taken:
            name = f"{name}-{sha256_hex(record_id.encode())[:12]}"
        self._taken.add(name.casefold())
        return name


def main(
    data: Annotated[str, typer.Option(help="DIM-Edit: the output of `dim data edit`.")],
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Write DIM-Edit in its public form: tos_dataset_edit.jsonl and image/."""
    summary(out, run(ExportConfig(data=data, out=out), overwrite=overwrite))


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
