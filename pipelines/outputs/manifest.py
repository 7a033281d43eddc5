"""The manifest: what a job read, what became of every record, and which files hold it."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationError, field_validator

from dim.config import StrictModel
from dim.errors import InputError, StorageError
from dim.redaction import redacted
from infra.storage import Store, open_store
from pipelines.outputs import histograms

NAME = "manifest.json"
MARKER = "unfinished.json"
"""Says whose an output is while it has no manifest."""
VERSION = 2
"""Raised whenever an older program would read a manifest wrongly."""


Shown = Annotated[dict[str, Any], AfterValidator(redacted)]
"""Settings without the credentials of the addresses in them."""


class FileEntry(StrictModel):
    """One file of an output; ``path`` is relative to the manifest, ``bytes`` its size."""

    path: str
    rows: int
    bytes: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _within(cls, path: str) -> str:
        """A manifest of others must not name what lies elsewhere."""
        if not path or path != posixpath.normpath(path) or path.startswith(("/", ".")):
            raise ValueError(f"{path!r} is not the name of a file below the manifest")
        return path


class Counts(StrictModel):
    """What became of the records; ``by_reason`` divides ``rejected`` by reason code."""

    input: int
    kept: int
    rejected: int
    failed: int
    by_reason: dict[str, int]

    def in_words(self) -> str:
        """What became of the records, in one line."""
        return (
            f"{self.input:,} records: {self.kept:,} kept, {self.rejected:,} rejected, "
            f"{self.failed:,} failed"
        )

    def add_up(self) -> bool:
        """Whether every record that went in came out exactly once."""
        outcomes = self.kept + self.rejected + self.failed
        return self.input == outcomes and self.rejected == sum(self.by_reason.values())


class Manifest(StrictModel):
    """Written last, so that its presence says that the output is complete.

    ``input`` identifies what the job read: the same value and the same ``config`` give the same
    files. ``cost`` is what the records cost, as numbers by name (``requests``, ``input_tokens``,
    ``output_tokens``, ``usd``), from the job that paid; a job that pays nothing has none.
    ``measured`` is how the filters' measures are spread, see :mod:`pipelines.outputs.histograms`;
    ``None`` where some ranges did not say.
    """

    version: int = VERSION
    job: str
    config: Shown
    input: Shown
    counts: Counts
    files: tuple[FileEntry, ...]
    cost: dict[str, float] | None = None
    measured: histograms.Counts | None = None

    def rows_in(self, folder: str) -> int:
        """Rows of all files below ``folder``."""
        return sum(file.rows for file in self.files if file.path.startswith(f"{folder}/"))


def read_bytes(store: Store) -> bytes | None:
    """The manifest as it lies there, to tell it from another one; ``None`` if there is none.

    Raises:
        StorageError: it cannot be read.
    """
    return store.read(NAME) if store.is_file(NAME) else None


def read(store: Store) -> Manifest | None:
    """The manifest of an output, or ``None`` while it is not finished.

    Raises:
        StorageError: there is one that is not readable, or of a newer version.
    """
    text = read_bytes(store)
    if text is None:
        return None
    version = _version(text)
    if version > VERSION:
        raise StorageError(
            f"{store.address(NAME)} is of version {version}, and this program knows {VERSION} and "
            "older; use a newer one"
        )
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise StorageError(
            f"{store.address(NAME)} is no manifest: {where} {first['msg']}"
        ) from None


def open_finished(uri: str, what: str = "output") -> tuple[Store, Manifest]:
    """The folder of a finished output, and its manifest.

    Args:
        uri: its address.
        what: it is to the caller, for the error.

    Raises:
        InputError: it does not exist, or is not finished.
        StorageError: its manifest cannot be read.
    """
    store = open_store(uri)
    manifest = read(store)
    if manifest is None:
        state = "is not finished" if store.exists() else "does not exist"
        raise InputError(f"the {what} {uri} {state} (no {NAME})")
    return store, manifest


def _version(text: bytes) -> int:
    """The version a manifest says it has, also where the rest of it is not as we know it."""
    try:
        found = json.loads(text).get("version")
    except (ValueError, AttributeError):
        return 0
    return found if isinstance(found, int) else 0


def write(store: Store, manifest: Manifest) -> None:
    """Write the manifest, at once and completely."""
    store.write(NAME, (manifest.model_dump_json(indent=2) + "\n").encode())


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterable[str]:
    """The dotted names that differ between two configurations, with both values."""
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from differences(before, after, f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key} was {before!r} and is {after!r}"
