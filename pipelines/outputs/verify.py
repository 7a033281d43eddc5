"""Verify: whether an output folder holds what its manifest says, all of it and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated

import pyarrow as pa
import typer
from rich.console import Console

from dim import records
from dim.errors import DimError, StorageError
from dim.images import decode_image
from infra.storage import Store
from pipelines.outcome import FAILED, KEPT, REJECTED
from pipelines.outputs import manifest as manifests
from pipelines.outputs.files import FOLDERS, size_and_hash
from pipelines.outputs.manifest import FileEntry, Manifest

_AT_ONCE = 4  # files: an object store's latency is the cost
_IMAGES = ("image", "image_target")
_LEFT_OUT = {FOLDERS[REJECTED]: records.REJECT, FOLDERS[FAILED]: records.FAILED}
_KEPT = (
    *(records.RAW_PAIR, records.FILTERED_PAIR, records.RAW_IMAGE, records.FILTERED_IMAGE),
    *(records.EDIT, records.T2I),
)


@dataclass
class Verification:
    """What was found: how much was looked at, and everything that is wrong, in order of file."""

    files: int = 0
    rows: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass
class _Checked:
    """What one file holds, as far as it could be read."""

    rows: int = 0
    schema: pa.Schema | None = None
    ids: list[bytes] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def verify(uri: str, *, images: bool = False) -> Verification:
    """Check every file of an output against its manifest, and the numbers against each other.

    Reads everything once, a row group at a time; of every id, 8 bytes stay in memory.

    Args:
        images: also decode every image.

    Raises:
        InputError: there is no finished output.
        StorageError: its manifest cannot be read.
    """
    store, manifest = manifests.open_finished(uri)
    result = Verification(files=len(manifest.files))
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        checked = list(pool.map(lambda entry: _check(store, entry, images), manifest.files))
    for file in checked:
        result.problems += file.problems
    result.rows = sum(file.rows for file in checked)
    result.problems += [
        *_strangers(store, manifest),
        *_schemas(manifest, checked),
        *_repeated_ids(manifest, checked),
        *_counts(manifest, checked),
    ]
    return result


def _check(store: Store, entry: FileEntry, images: bool) -> _Checked:
    found = _Checked()
    try:
        size, digest = size_and_hash(store, entry.path)
    except (StorageError, OSError) as error:
        found.problems.append(f"{entry.path}: {error}")
        return found
    if size != entry.bytes:
        found.problems.append(f"{entry.path}: {size} bytes, the manifest says {entry.bytes}")
    elif digest != entry.sha256:
        found.problems.append(f"{entry.path}: the checksum is not the manifest's")
    if not entry.path.endswith(".parquet"):
        found.rows = entry.rows
        return found
    try:
        _read(store, entry, found, images)
    except DimError as error:
        found.problems.append(f"{entry.path}: {error}")
        return found
    if found.rows != entry.rows:
        found.problems.append(f"{entry.path}: {found.rows} rows, the manifest says {entry.rows}")
    return found


def _read(store: Store, entry: FileEntry, found: _Checked, images: bool) -> None:
    with store.open_parquet(entry.path) as file:
        schema = file.schema_arrow
        records.check_version(schema, entry.path)
        found.schema = schema
        pictures = [name for name in _IMAGES if images and name in schema.names]
        columns = [name for name in ("id", "reason", *pictures) if name in schema.names]
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            found.rows += table.num_rows
            if "id" in columns:
                found.ids += [
                    records.short_hash(str(record_id)) for record_id in table["id"].to_pylist()
                ]
            if "reason" in columns:
                found.reasons.update(table["reason"].to_pylist())
            for name in pictures:
                found.problems += _undecodable(entry.path, table, name)


def _undecodable(path: str, table: pa.Table, name: str) -> Iterator[str]:
    for record_id, image in zip(table["id"].to_pylist(), table[name], strict=True):
        try:
            decode_image(image.as_py() or b"", name=name)
        except DimError as error:
            yield f"{path}: {record_id!r}: {error}"


def _strangers(store: Store, manifest: Manifest) -> Iterator[str]:
    """Files that a reader would take for records of this output."""
    listed = {file.path for file in manifest.files}
    for folder in FOLDERS.values():
        for name, _ in store.list(folder):
            if name not in listed:
                yield f"{name}: not in the manifest"


def _schemas(manifest: Manifest, checked: list[_Checked]) -> Iterator[str]:
    first: dict[str, pa.Schema] = {}
    for entry, file in zip(manifest.files, checked, strict=True):
        if file.schema is None:
            continue
        folder = entry.path.partition("/")[0]
        kind = records.kind_of(file.schema)
        others = first.setdefault(folder, file.schema)
        declared = _declared(folder, file.schema)
        fits = any(records.is_same(file.schema, schema) for schema in declared)
        if kind is None:
            yield f"{entry.path}: its schema says no kind of record"
        elif declared and not fits:
            wanted = records.kind_of(declared[0])
            yield f"{entry.path}: its columns are not those of {wanted} records"
        elif not records.is_same(file.schema, others):
            yield f"{entry.path}: its columns are not those of the other files in {folder}/"


def _declared(folder: str, schema: pa.Schema) -> list[pa.Schema]:
    """The columns that a file may have; none if this program does not know them.

    Records of an older schema version had others.
    """
    kind = records.kind_of(schema)
    wanted = [_LEFT_OUT[folder]] if folder in _LEFT_OUT else _KEPT
    known = [each for each in wanted if folder in _LEFT_OUT or records.kind_of(each) == kind]
    if known and records.version_of(schema) == records.version_of(known[0]):
        return known
    return []


def _repeated_ids(manifest: Manifest, checked: list[_Checked]) -> Iterator[str]:
    """Kept records with one id; what was left out may well repeat one (that can be the reason)."""
    seen: set[bytes] = set()
    for entry, file in zip(manifest.files, checked, strict=True):
        if not entry.path.startswith(f"{FOLDERS[KEPT]}/"):
            continue
        before = len(seen)
        seen.update(file.ids)
        repeated = len(file.ids) - (len(seen) - before)
        if repeated:
            yield f"{entry.path}: {repeated} ids that an earlier record has"


def _counts(manifest: Manifest, checked: list[_Checked]) -> Iterator[str]:
    counts = manifest.counts
    if not counts.add_up():
        yield f"{manifests.NAME}: its counts do not add up to its input: {counts}"
    rows: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for entry, file in zip(manifest.files, checked, strict=True):
        folder = entry.path.partition("/")[0]
        rows[folder] += file.rows
        if folder == FOLDERS[REJECTED]:
            reasons.update(file.reasons)
    if any(folder in rows for folder in FOLDERS.values()):
        said = {KEPT: counts.kept, REJECTED: counts.rejected, FAILED: counts.failed}
        for outcome, number in said.items():
            if rows[FOLDERS[outcome]] != number:
                yield (
                    f"{manifests.NAME}: {number} {outcome}, and {rows[FOLDERS[outcome]]} are there"
                )
        for reason in sorted(reasons.keys() | counts.by_reason.keys()):
            if reasons[reason] != counts.by_reason.get(reason, 0):
                yield (
                    f"{manifests.NAME}: {counts.by_reason.get(reason, 0)} rejected for {reason}, "
                    f"and {reasons[reason]} are there"
                )


def main(
    out: Annotated[str, typer.Argument(help="Output folder of a data job: a path or s3://…")],
    images: Annotated[bool, typer.Option("--images", help="Also decode every image.")] = False,
) -> None:
    """Check an output against its manifest: checksums, rows, columns, ids and counts.

    Every problem is listed; with one or more the exit code is 1.
    """
    result = verify(out, images=images)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for problem in result.problems:
        console.print(problem)
    if result.problems:
        number = len(result.problems)
        raise DimError(f"{out} has {number} problem{'s' if number > 1 else ''}")
    console.print(f"{out}: {result.files:,} files with {result.rows:,} rows are as written")


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
