"""Entries: the records of a range as their container holds them, before any image is looked at.

A container is a JSONL file, Parquet, Arrow as Hugging Face saves it, or a WebDataset tar. What
cannot be read is an entry with an error, so that a damaged file loses no record silently.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any

from dim import records
from dim.errors import InputError
from infra.storage import Store
from pipelines.outcome import Rejection
from pipelines.readers import compression, forms, ids
from pipelines.readers.bounds import MAX_BYTES, TarReader, batches, cells, read_member
from pipelines.readers.compression import Layers
from pipelines.readers.fetch import Fetching
from pipelines.readers.json_values import Walk
from pipelines.readers.layout import Layout
from pipelines.readers.media import Places
from pipelines.readers.names import is_hidden, is_image, said

_TEXTS = ("txt", "text", "caption")


@dataclass
class Entry:
    """One record of a container.

    Attributes:
        index: its place in the whole input.
        label: what to call it in an error.
        where: its provenance.
        values: its columns, empty if it cannot be read.
        error: why it cannot be read.
        id: what its container calls it; ``None`` leaves that to its columns.
        repeated: whether an earlier entry has its id.
        places: where the images lie in the media that the records of its range name, by key.
        fetching: images behind URLs that some records of its part name, if they are on their way.
    """

    index: int
    label: str
    where: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    id: str | None = None
    repeated: bool = False
    places: Places = field(default_factory=dict)
    fetching: Fetching | None = None


@dataclass(frozen=True)
class JsonTexts:
    """Entries from a JSON file: its lines, or values over any lines, in a list or without one.

    Args:
        store: the file's folder.
        name: the file.
        source: what the records call where they come from.
        layers: what the file has to be put through, if it is compressed.
        in_lines: whether each line is a record.
    """

    store: Store
    name: str
    source: str
    layers: Layers = ()
    in_lines: bool = True

    def of(self, each: dict[str, Any]) -> Iterator[Entry]:
        """One entry per line that is not blank, or per value."""
        with io.BufferedReader(compression.open_input(self.store, self.name, self.layers)) as file:
            file.seek(each["start"])
            data = file.read(each["end"] - each["start"])
        repeated = set(each["repeated"])
        kind = "line" if self.in_lines else "item"
        numbered = _lines(data, each["line"]) if self.in_lines else _values(data, each["first"])
        for index, (number, text) in enumerate(numbered, start=each["first"]):
            where = {"file": self.store.address(self.name), kind: number}
            entry = Entry(index, f"{kind} {number}", where, repeated=number in repeated)
            try:
                entry.values = parse_line(text)
            except InputError as error:
                entry.error = str(error)
            yield entry


def _lines(data: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    lines = enumerate(data.split(b"\n"), start=first)
    return ((number, text) for number, text in lines if text.strip())


def _values(data: bytes, first: int) -> Iterator[tuple[int, bytes]]:
    values = enumerate(Walk(io.BytesIO(data).read).values(), start=first)
    return ((number, text.encode("latin-1")) for number, (_, text, _) in values)


@dataclass(frozen=True)
class Files:
    """Entries from Parquet, Arrow or tar files.

    Args:
        store: the folder that the files' names are relative to.
        source: what the records call where they come from.
        columns: the columns to read.
        max_bytes: size of a cell or of a member of a tar at most; a larger one is not read.
    """

    store: Store
    source: str
    columns: frozenset[str]
    max_bytes: int = MAX_BYTES

    def of(self, each: dict[str, Any]) -> Iterator[Entry]:
        """The entries of each part of the range; a damaged rest of a file fails one by one."""
        index, repeated = each["first"], set(each["repeated"])
        for part in json.loads(each["files"]):
            end = index + part["count"]
            for entry in self._part(part, index):
                entry.repeated = entry.index in repeated
                index = entry.index + 1
                yield entry
            if index != end:
                raise InputError(f"{part['file']} changed while it was read")

    def _part(self, part: dict[str, Any], first: int) -> Iterator[Entry]:
        name, count = part["file"], part["count"]
        where = {"file": self.store.address(name)}
        done, error = 0, part["damage"]
        try:
            rows = iter(()) if error else self._rows(name, part)
            for values in rows:
                yield _entry(first + done, part, where, part["offset"] + done, values)
                done += 1
            error = error or "it ends early"
        except Exception as found:  # a damaged file can raise anything
            error = f"cannot be read ({said(found)})"
        for missing in range(done, count):
            label = f"record {part['offset'] + missing} of {name}" if not part["damage"] else name
            yield Entry(first + missing, label, where, error=error)

    def _rows(self, name: str, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The records of a part as dictionaries."""
        start, count = part["offset"], part["count"]
        if part["kind"] == forms.TAR:
            yield from self._samples(name, start, count)
            return
        stop = start + count
        for batch, first in batches(self.store, name, self.columns, start, stop, self.max_bytes):
            for row in range(max(0, start - first), min(batch.num_rows, stop - first)):
                yield cells(batch, row, self.max_bytes)

    def _samples(self, name: str, offset: int, count: int) -> Iterator[dict[str, Any]]:
        with self.store.open_input(name) as file:
            file.seek(offset)
            with tarfile.open(fileobj=TarReader(file, self.max_bytes), mode="r:") as tar:
                for key, files in islice(samples(members(tar)), count):
                    sample: dict[str, Any] = {"__key__": key}
                    for member in files:
                        self._add(sample, tar, member)
                    yield sample

    def _add(self, sample: dict[str, Any], tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """One file of a sample as columns: JSON as its own, an image by its name without suffix."""
        extension = split_key(member.name)[1]
        image = extension.rpartition(".")[0] or "image" if is_image(f".{extension}") else None
        column = image or ("txt" if extension in _TEXTS else None)
        if extension != "json" and column not in self.columns:
            return
        try:
            data = read_member(tar, member, self.max_bytes)
            if extension == "json":
                told = parse_line(data)
                new = self.columns & told.keys() - sample.keys()
                sample.update({k: told[k] for k in new if not k.startswith("__")})
            elif image:
                _add_image(sample, image, data)
            else:
                sample["txt"] = data.decode("utf-8", "replace").strip()
        except (tarfile.TarError, InputError, OSError) as error:
            sample["__damage__"] = f"{member.name} is damaged: {error}"
        except Rejection as rejection:
            if image:
                sample[image] = rejection
            else:
                sample["__damage__"] = rejection.detail


Entries = JsonTexts | Files
"""Who reads the entries of a range: exactly as many as it has records, in order."""


def _entry(
    index: int, part: dict[str, Any], where: dict[str, Any], row: int, values: dict[str, Any]
) -> Entry:
    name = part["file"]
    if part["kind"] != forms.TAR:
        return Entry(index, f"row {row} of {name}", {**where, "row": row}, values)
    key, damage = values.pop("__key__"), values.pop("__damage__", None)
    values.pop("__images__", None)
    place = {**where, "sample": key}
    return Entry(index, f"sample {key} of {name}", place, values, damage, f"{part['called']}/{key}")


def members(tar: tarfile.TarFile, hidden: Counter[str] | None = None) -> Iterator[tarfile.TarInfo]:
    """The files in a tar that are part of samples; ends early where the tar is damaged.

    Those that are not are counted in ``hidden``.
    """
    while True:
        start = tar.offset
        try:
            member = tar.next()
        except (tarfile.TarError, ValueError):  # also where a header's numbers are none
            tar.offset = start
            return
        if member is None:
            return
        tar.members = []  # type: ignore[attr-defined] # or it remembers every header it has seen
        if not member.isfile():
            continue
        if not is_hidden(member.name) and not member.name.rpartition("/")[2].startswith("__"):
            yield member
        elif hidden is not None:
            hidden["members"] += 1


def samples(
    members: Iterable[tarfile.TarInfo],
) -> Iterator[tuple[str, Iterator[tarfile.TarInfo]]]:
    """The files of a tar by sample, those that follow one another with one key."""
    return groupby(members, lambda member: split_key(member.name)[0])


def split_key(name: str) -> tuple[str, str]:
    """A member's key (all up to the first dot of its file name) and its extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return records.clean_text(f"{folder}{slash}{stem}"), extension


def _add_image(sample: dict[str, Any], name: str, data: bytes) -> None:
    """One image of a sample; of cat.jpg and cat.png neither is the image of the sample cat."""
    images: list[str] = sample.setdefault("__images__", [])
    if name in images:
        others = sample[name] if isinstance(sample[name], list) else [sample[name]]
        sample[name] = [*others, data]
    else:
        images.append(name)
        sample[name] = data


def parse_json(text: bytes | str, where: str = "") -> Any:
    """A JSON text as a value.

    Raises:
        InputError: it is not JSON; the message begins with ``where``.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{f'{where} is ' if where else ''}not JSON ({error})") from None


def parse_line(text: bytes | str) -> dict[str, Any]:
    """A JSON text as an object.

    Raises:
        InputError: it is not JSON, or not an object.
    """
    line = parse_json(text)
    if not isinstance(line, dict):
        raise InputError(f"a JSON {type(line).__name__} where an object was expected")
    return line


def known_id(values: dict[str, Any], layout: Layout) -> str | None:
    """What a record's columns call it, if they do; what is wrong there is said when it is read."""
    try:
        return ids.id_of(values, layout)
    except InputError:
        return None
