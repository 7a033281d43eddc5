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
from dim.errors import DimError
from dim.images import decode_image
from infra.storage import Store
from pipelines.outcome import FAILED, KEPT, REJECTED
from pipelines.outputs import manifest as manifests
from pipelines.outputs.files import FOLDERS, size_and_hash
from pipelines.outputs.manifest import Counts, FileEntry, Manifest

_AT_ONCE = 4  # files: an object store's latency is the cost
_IMAGES = ("image", "image_target")
_LEFT_OUT = {FOLDERS[REJECTED]: records.REJECT, FOLDERS[FAILED]: records.FAILED}
_KEPT = (
    *(records.RAW_PAIR, records.FILTERED_PAIR, records.RAW_IMAGE, records.FILTERED_IMAGE),
    *(records.EDIT, records.T2I),
)


@dataclass(frozen=True)
class Verification:
    """What was found: how much was looked at, and everything that is wrong, in order of file."""

    files: int
    rows: int
    problems: list[str]


@dataclass
class _Checked:
    """What one file holds, as far as it could be read."""

    entry: FileEntry
    rows: int = 0
    schema: pa.Schema | None = None
    ids: list[bytes] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """Where it lies, which says what became of its records."""
        return self.entry.path.partition("/")[0]


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
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        checked = list(pool.map(lambda entry: _check(store, entry, images), manifest.files))
    problems = [
        *(f"{file.entry.path}: {problem}" for file in checked for problem in file.problems),
        *_strangers(store, manifest),
        *_schemas(checked),
        *_repeated_ids(checked),
        *_counts(manifest.counts, checked),
    ]
    return Verification(len(checked), sum(file.rows for file in checked), problems)


def _check(store: Store, entry: FileEntry, images: bool) -> _Checked:
    found = _Checked(entry)
    try:
        for problem in _problems(store, entry, found, images):
            found.problems.append(problem)
    except (DimError, OSError) as error:
        found.problems.append(str(error))
    return found


def _problems(store: Store, entry: FileEntry, found: _Checked, images: bool) -> Iterator[str]:
    """What is wrong with a file by itself; on the way it is noted what is in it."""
    size, digest = size_and_hash(store, entry.path)
    if size != entry.bytes:
        yield f"{size} bytes, the manifest says {entry.bytes}"
    elif digest != entry.sha256:
        yield "the checksum is not the manifest's"
    if not entry.path.endswith(".parquet"):
        found.rows = entry.rows
        return
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
                found.ids += [records.short_hash(str(each)) for each in table["id"].to_pylist()]
            if "reason" in columns:
                found.reasons.update(table["reason"].to_pylist())
            for name in pictures:
                yield from _undecodable(table, name)
    if found.rows != entry.rows:
        yield f"{found.rows} rows, the manifest says {entry.rows}"


def _undecodable(table: pa.Table, name: str) -> Iterator[str]:
    for record_id, image in zip(table["id"].to_pylist(), table[name], strict=True):
        try:
            decode_image(image.as_py() or b"", name=name)
        except DimError as error:
            yield f"{record_id!r}: {error}"


def _strangers(store: Store, manifest: Manifest) -> Iterator[str]:
    """Files that a reader would take for records of this output."""
    listed = {file.path for file in manifest.files}
    for folder in FOLDERS.values():
        for name, _ in store.list(folder):
            if name not in listed:
                yield f"{name}: not in the manifest"


def _schemas(checked: list[_Checked]) -> Iterator[str]:
    first: dict[str, pa.Schema] = {}
    for file in checked:
        if file.schema is None:
            continue
        path, folder = file.entry.path, file.folder
        others = first.setdefault(folder, file.schema)
        declared = _declared(folder, file.schema)
        if records.kind_of(file.schema) is None:
            yield f"{path}: its schema says no kind of record"
        elif declared and not any(records.is_same(file.schema, each) for each in declared):
            wanted = records.kind_of(declared[0])
            yield f"{path}: its columns are not those of {wanted} records"
        elif not records.is_same(file.schema, others):
            yield f"{path}: its columns are not those of the other files in {folder}/"


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


def _repeated_ids(checked: list[_Checked]) -> Iterator[str]:
    """Kept records with one id; what was left out may well repeat one (that can be the reason)."""
    seen: set[bytes] = set()
    for file in checked:
        if file.folder == FOLDERS[KEPT]:
            before = len(seen)
            seen.update(file.ids)
            if repeated := len(file.ids) - (len(seen) - before):
                yield f"{file.entry.path}: {repeated} ids that an earlier record has"


def _counts(counts: Counts, checked: list[_Checked]) -> Iterator[str]:
    if not counts.add_up():
        yield f"{manifests.NAME}: its counts do not add up to its input: {counts}"
    rows: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for file in checked:
        rows[file.folder] += file.rows
        if file.folder == FOLDERS[REJECTED]:
            reasons.update(file.reasons)
    if rows.keys().isdisjoint(FOLDERS.values()):
        return
    said = {KEPT: counts.kept, REJECTED: counts.rejected, FAILED: counts.failed}
    for outcome, number in said.items():
        if rows[FOLDERS[outcome]] != number:
            yield f"{manifests.NAME}: {number} {outcome}, and {rows[FOLDERS[outcome]]} are there"
    for reason in sorted(reasons.keys() | counts.by_reason.keys()):
        number = counts.by_reason.get(reason, 0)
        if reasons[reason] != number:
            yield (
                f"{manifests.NAME}: {number} rejected for {reason}, and {reasons[reason]} are there"
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
