"""Export: finished records in the public layout of DIM-Edit, or as WebDataset tars."""

from __future__ import annotations

import json
import re
from itertools import chain
from typing import Annotated, Literal

import pyarrow as pa
import typer
from pydantic import Field

from dim.config import StrictModel, dump_config, load_config
from dim.errors import DimError, InputError
from dim.images import suffix
from dim.records import EDIT, RAW_IMAGE, RAW_PAIR, T2I, sha256_hex
from dim.redaction import redacted
from infra import storage
from infra.storage import Store
from pipelines.command import Out, Overrides, Overwrite, settings
from pipelines.outputs import manifest as manifests
from pipelines.outputs import webdataset
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
from pipelines.outputs.shards import Shards
from pipelines.outputs.summary import summary

LINES = "tos_dataset_edit.jsonl"
IMAGES = "image"

_COLUMNS = ("id", "image", "image_target", "answer")
_KINDS = {"public": (EDIT,), "webdataset": (EDIT, T2I, RAW_PAIR, RAW_IMAGE)}


class ExportConfig(StrictModel):
    """What to export."""

    data: str
    """Address of the records, as a data job makes them."""
    out: str
    """Address of the folder to write to."""
    format: Literal["public", "webdataset"] = "public"
    """``public``: tos_dataset_edit.jsonl and image/, of DIM-Edit. ``webdataset``: data/*.tar."""
    target_file_mb: float = Field(256, gt=0)
    """Size of a tar at most, in units of 2**20 bytes."""


def run(config: ExportConfig, *, overwrite: bool = False) -> Manifest:
    """Write finished records in another form.

    In the public form each line has ``id``, ``image_path``, ``image_path_target`` and ``prompt``,
    which is the blueprint in its designer's words. Images are the source's own files in any form.

    Raises:
        InputError: the data is of another kind or not finished, or ``out`` holds something else.
        StorageError: something cannot be read or written.
    """
    shards = Shards.open(config.data, *_KINDS[config.format])
    store = storage.open_store(config.out)
    done = manifests.read(store)
    if done and done.job == "export" and not overwrite and _same(done, shards, config):
        return done
    _claim(store, done, overwrite=overwrite)
    files = _write_all(store, shards, config)
    manifest = Manifest(
        job="export",
        config=dump_config(config),
        input=shards.identity,
        counts=Counts(input=shards.rows, kept=shards.rows, rejected=0, failed=0, by_reason={}),
        files=tuple(files),
    )
    manifests.write(store, manifest)
    store.delete(manifests.MARKER)
    return manifest


def _same(done: Manifest, shards: Shards, config: ExportConfig) -> bool:
    made = {**dump_config(ExportConfig(data="", out="")), **done.config}
    wanted = dump_config(config)
    return done.input == redacted(shards.identity) and all(
        made[key] == wanted[key] for key in ("format", "target_file_mb")
    )


def _claim(store: Store, done: Manifest | None, *, overwrite: bool) -> None:
    if done and not (overwrite and done.job == "export"):
        raise InputError(f"{store.uri} holds another output; choose another --out")
    if not done and not store.is_file(manifests.MARKER) and not store.is_empty():
        raise InputError(f"{store.uri} is not empty; choose another --out")
    store.write(manifests.MARKER, b'{"job": "export"}\n')
    for name in (manifests.NAME, LINES, IMAGES, webdataset.FOLDER):
        store.delete(name)


def _write_all(store: Store, shards: Shards, config: ExportConfig) -> list[FileEntry]:
    if config.format == "webdataset":
        files = webdataset.write(store, shards, int(config.target_file_mb * 2**20))
    else:
        files = _write_public(store, shards)
    rows = sum(file.rows for file in files if not file.path.startswith(f"{IMAGES}/"))
    if rows != shards.rows:
        raise DimError(f"{rows} records were exported of the {shards.rows} in {shards.store.uri}")
    return files


def _write_public(store: Store, shards: Shards) -> list[FileEntry]:
    lines: list[str] = []
    files: list[FileEntry] = []
    taken: set[str] = set()
    for row in chain.from_iterable(map(pa.Table.to_pylist, shards.batches(columns=_COLUMNS))):
        name = _file_name(row["id"], taken)
        source, target = (
            _write(store, f"{IMAGES}/{name}_{role}.{suffix(image)}", 1, image)
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
    return [*files, _write(store, LINES, len(lines), "".join(lines).encode())]


def _write(store: Store, path: str, rows: int, data: bytes) -> FileEntry:
    store.write(path, data)
    return FileEntry(path=path, rows=rows, bytes=len(data), sha256=sha256_hex(data))


def _file_name(record_id: str, taken: set[str]) -> str:
    """A name from an id: safe, and different also where only letter case or signs differ."""
    name = re.sub(r"[^\w.-]+", "_", record_id)[:100].lstrip(".") or "record"
    if name != record_id or name.casefold() in taken:
        name = f"{name}-{sha256_hex(record_id.encode())[:12]}"
    taken.add(name.casefold())
    return name


def main(
    data: Annotated[str, typer.Option(help="Output of a data job.")],
    out: Out,
    overrides: Overrides = None,
    form: Annotated[
        str | None, typer.Option("--format", help="public (DIM-Edit only) or webdataset.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write DIM-Edit in its public form, tos_dataset_edit.jsonl and image/, or any as tars."""
    given = settings(data=data, out=out, format=form)
    chosen = load_config(ExportConfig, None, [*(overrides or []), *given])
    summary(out, run(chosen, overwrite=overwrite))


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
