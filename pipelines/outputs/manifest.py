"""The manifest: what a job read, what became of every record, and which files hold it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationError

from dim.config import StrictModel
from dim.errors import StorageError
from dim.redaction import redacted
from infra.storage import Store

NAME = "manifest.json"
VERSION = 1
"""Raised whenever an older program would read a manifest wrongly."""


Shown = Annotated[dict[str, Any], AfterValidator(redacted)]
"""Settings without the credentials of the addresses in them."""


class FileEntry(StrictModel):
    """One file of an output; ``path`` is relative to the manifest, ``bytes`` its size."""

    path: str
    rows: int
    bytes: int
    sha256: str


class Counts(StrictModel):
    """What became of the records; ``by_reason`` divides ``rejected`` by reason code."""

    input: int
    kept: int
    rejected: int
    failed: int
    by_reason: dict[str, int]

    def add_up(self) -> bool:
        """Whether every record that went in came out exactly once."""
        outcomes = self.kept + self.rejected + self.failed
        return self.input == outcomes and self.rejected == sum(self.by_reason.values())


class Manifest(StrictModel):
    """Written last, so that its presence says that the output is complete.

    ``input`` identifies what the job read: the same value and the same ``config`` give the same
    files. ``cost`` is what the records cost, as numbers by name (``requests``, ``input_tokens``,
    ``output_tokens``, ``usd``), from the job that paid; a job that pays nothing has none.
    """

    version: int = VERSION
    job: str
    config: Shown
    input: Shown
    counts: Counts
    files: tuple[FileEntry, ...]
    cost: dict[str, float] | None = None

    def rows_in(self, folder: str) -> int:
        """Rows of all files below ``folder``."""
        return sum(file.rows for file in self.files if file.path.startswith(f"{folder}/"))


def read(store: Store) -> Manifest | None:
    """The manifest of an output, or ``None`` while it is not finished.

    Raises:
        StorageError: there is one that is not readable, or of a newer version.
    """
    if not store.is_file(NAME):
        return None
    text = store.read(NAME)
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
