"""Readers: from the description of a fixed range of records to the raw records themselves.

The driver cuts an input into ranges (see :mod:`pipelines.readers.sources`), a worker turns them
into tables, part by part (see :mod:`pipelines.attempts`). What is wrong with a single record
becomes that record's outcome.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa

from dim import records
from dim.blueprint import Blueprint
from dim.errors import BlueprintError, InputError
from dim.redaction import redact
from infra.storage import Store
from pipelines.outcome import KEPT, Rejection, Row, fail, to_table, work_on
from pipelines.probe import probe
from pipelines.readers import inline
from pipelines.readers.addresses import Addresses, Place
from pipelines.readers.bounds import MAX_BYTES, read_file, too_many_bytes
from pipelines.readers.entries import Entries, Entry
from pipelines.readers.fetch import FetchConfig, Fetcher, is_url
from pipelines.readers.ids import as_text, id_of
from pipelines.readers.layout import Layout
from pipelines.readers.media import Found, Media, unpack
from pipelines.readers.names import shown, without_suffix

_FETCHES = 8  # images of one range that are fetched at once: an object store's latency is its cost
_LONGEST_URL = 8192  # characters
_PARTS_AHEAD = 8  # whose images may be on their way, or here, before they are wanted
ROWS_PER_PART = 64
"""No more records than this, with their encoded images, are held as Python objects at a time."""

_BYTES_PER_PART = 256 << 20  # of images that the container holds, with one that goes beyond it

STAGE = "ingest"

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Records:
    """Records of any container, by a layout: edit pairs if it has a target, else single images.

    Args:
        entries: reads the container.
        layout: which columns hold what.
        fetch: how the images behind URLs are fetched, if they are to be.
        media: where images lie that the records name by a key.
        max_bytes: size of an image at most; a larger one is not read.
        roots: where names in the records may lead besides their own folder.
    """

    entries: Entries
    layout: Layout
    fetch: FetchConfig | None = None
    media: Media | None = None
    max_bytes: int = MAX_BYTES
    roots: tuple[Store, ...] = ()

    @cached_property
    def addresses(self) -> Addresses:
        """Where names in the records may lead."""
        return Addresses(self.entries.store, self.roots)

    @cached_property
    def media_addresses(self) -> Addresses:
        """Where names in the media may lead."""
        return Addresses(self.media.store if self.media else self.entries.store, self.roots)

    @property
    def schema(self) -> pa.Schema:
        """What the records are."""
        return records.RAW_PAIR if self.layout.target else records.RAW_IMAGE

    @cached_property
    def _fetcher(self) -> Fetcher | None:
        return Fetcher(self.fetch) if self.fetch else None

    def count(self, each: Row) -> int:
        """How many records a range has."""
        return int(each["count"])

    def parts(self, each: Row) -> Iterator[list[Entry]]:
        """The entries of a range."""
        places = unpack(each.get("places"))
        for part in _in_parts(self.entries.of(each), _bytes_of):
            for entry in part:
                entry.places = places
            yield part

    def fetch_ahead(self, parts: Iterable[list[Entry]]) -> Iterator[list[Entry]]:
        """The same parts, while the images of those that follow are fetched: the window slides."""
        under_way: deque[list[Entry]] = deque()
        turn = self._fetcher.next_turn() if self._fetcher is not None else 0
        try:
            for part in parts:
                names = self._names(part) - part[0].places.keys()
                urls = [name for name in names if is_url(name)]
                if urls and self._fetcher is not None:
                    fetching = self._fetcher.begin(urls, turn)
                    for entry in part:
                        entry.fetching = fetching
                under_way.append(part)
                # Parts without URLs may hold their images, and need not be here before their turn.
                while len(under_way) > (_PARTS_AHEAD if urls else 0):
                    yield under_way.popleft()
            while under_way:
                yield under_way.popleft()
        finally:
            for part in under_way:
                if part[0].fetching is not None:
                    part[0].fetching.results.cancel()

    def _names(self, part: list[Entry]) -> set[str]:
        return {name for entry in part for name in image_names(entry, self.layout)}

    def table(self, part: list[Entry]) -> pa.Table:
        """Entries in, raw records with outcomes out."""
        found = self._find(part)
        with ThreadPoolExecutor(_FETCHES) as pool:
            return to_table(pool.map(lambda entry: self._read(entry, found), part), self.schema)

    def lost(self, each: Row, number: int, why: str) -> pa.Table:
        """A record that could not be read, by its place; nothing else of it is known."""
        index = each["first"] + number
        entry = Entry(index, f"record {index}", {"file": self.entries.store.uri})
        return _failed(self._begun(entry), why, self.schema)

    def _find(self, part: list[Entry]) -> Found:
        """What lies behind the keys and URLs of a few records."""
        named = self._names(part)
        places, fetcher = part[0].places, self._fetcher
        found: Found = {}
        if self.media is not None:
            there = {key: place for key in named if (place := places.get(key))}
            found = self.media.read(there)
            for name in named:
                if name in places and not places[name]:
                    detail = f"several images of {self.media.uri} are called {shown(name)!r}"
                    found[name] = Rejection("record.unmatched_key", detail)
        if fetcher is None:
            return found
        urls = {name for name in named - found.keys() if is_url(name)}
        urls |= {value for value in map(inline.held, found.values()) if is_url(value)}
        if part[0].fetching is not None:
            fetched = part[0].fetching.take()
            found = {**{url: fetched[url] for url in urls & fetched.keys()}, **found}
        return {**found, **fetcher(urls - found.keys())}

    def _read(self, entry: Entry, found: Found) -> Row:
        row = self._begun(entry)
        work_on([row], STAGE, lambda row: self._columns(row, entry, found))
        return row

    def _begun(self, entry: Entry) -> Row:
        return {
            "id": entry.id or f"{self.entries.source}-{entry.index:08d}",
            "index": entry.index,
            "source": self.entries.source,
            "provenance": json.dumps(entry.where),
            "outcome": KEPT,
        }

    def _columns(self, row: Row, entry: Entry, found: Found) -> Row:
        try:
            row["id"] = entry.id or id_of(entry.values, self.layout) or row["id"]
            if entry.error:
                raise InputError(entry.error)
            if entry.repeated:
                detail = f"an earlier one has the id {shown(row['id'])!r}"
                raise Rejection("record.repeated_id", detail)
            for value in entry.values.values():
                if isinstance(value, Rejection):  # of a cell or a file that was not read
                    raise value
            return self._build(row, entry.values, found)
        except Rejection:
            raise
        except Exception as error:  # a record can name any file and hold any value
            raise InputError(f"{shown(entry.label)}: {error}") from None

    def _build(self, row: Row, values: dict[str, Any], found: Found) -> Row:
        layout = self.layout
        if layout.target:
            row["instruction"] = _instruction(text_of(values, *layout.instruction))
        image, where = self._image(values, layout.image, found)
        named = {"image_path": where}
        if layout.target:
            target, where = self._image(values, layout.target, found)
            named["image_path_target"] = where
        known = {key: redact(where) for key, where in named.items() if where is not None}
        row["provenance"] = json.dumps({**json.loads(row["provenance"]), **known})
        if layout.target:
            return pair_columns(row["instruction"], image, target)
        hints = (values.get(name) for name in layout.caption)
        hint = next((str(hint) for hint in hints if hint and not _is_missing(hint)), None)
        return image_columns(image, hint)

    def _image(
        self, values: dict[str, Any], names: Sequence[str], found: Found
    ) -> tuple[bytes, str | None]:
        """The encoded image under one of ``names``, and what the record calls it.

        Raises:
            InputError: there is none.
            StorageError: it is not where the record says.
            Rejection: no image of the media has its key, or its URL is not to be used.
        """
        name, value = image_value(values, names)
        given = inline.held(value)
        path, addresses = _path(given), self.addresses
        if path is not None and path in found:
            given, addresses = inline.held(found[path]), self.media_addresses
        elif self.media is not None and path is not None and not is_url(path):
            detail = f"no image of {self.media.uri} is {shown(path)!r}"
            raise Rejection("record.unmatched_key", detail)
        if is_url(given) and given in found:  # a URL that the media have
            given = found[given]
        if isinstance(given, Exception):
            raise given
        try:
            image = inline.decoded(given)
        except InputError as error:
            raise InputError(f"{name!r} holds {error}") from None
        if isinstance(image, str):
            image = _file(image, addresses, self.max_bytes)
        if not isinstance(image, bytes):
            raise InputError(f"{name!r} holds no image but {type(image).__name__}")
        if len(image) > self.max_bytes:
            raise too_many_bytes(repr(name), len(image), self.max_bytes)
        return image, path or _path(value.get("path") if isinstance(value, dict) else None)


def _path(value: Any) -> str | None:
    """A text that names an image, and is not one itself."""
    if not isinstance(value, str) or inline.is_image_text(value):
        return None
    return records.clean_text(value).strip() or None


def _file(name: str, addresses: Addresses, most: int) -> bytes:
    if is_url(name):
        if len(name) > _LONGEST_URL:
            raise InputError(f"{shown(name)!r} is too long for a URL")
        raise InputError(f"{shown(name)} is a URL, and those are fetched only with --fetch")
    return addresses.read(records.clean_text(name), partial(read_file, most=most))


@dataclass(frozen=True)
class Singles:
    """Records that are read or drawn each by itself: the images of a folder, the tabletop's.

    Args:
        begin: all records of a range, with what is known of them beforehand.
        finish: the columns that are found out of one.
        schema: what the records are.
        at_once: how many are finished at once; more than one where they mostly wait.
    """

    begin: Callable[[Row], Iterator[Row]]
    finish: Callable[[Row], Row]
    schema: pa.Schema
    at_once: int = 1

    def count(self, each: Row) -> int:
        """How many records a range has."""
        return int(each["count"])

    def parts(self, each: Row) -> Iterator[list[Row]]:
        """The records of a range as they are begun."""
        return _in_parts(self.begin(each))

    def table(self, part: list[Row]) -> pa.Table:
        """Records that are begun in, raw records with outcomes out."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return to_table(pool.map(self._finished, part), self.schema)

    def lost(self, each: Row, number: int, why: str) -> pa.Table:
        """A record that could not be read or drawn."""
        row = next(islice(self.begin(each), number, None))
        return _failed(row, f"{shown(row['name'])}: {why}" if "name" in row else why, self.schema)

    def _finished(self, row: Row) -> Row:
        work_on([row], STAGE, self.finish)
        return row


def image_files(addresses: Addresses, source: str, max_bytes: int) -> Singles:
    """The images of a folder, which the ranges name.

    Args:
        addresses: the folder, and where links in it may lead.
        source: what the records call it.
        max_bytes: size of an image at most; a larger one is not read.
    """
    home = addresses.home

    def begin(each: Row) -> Iterator[Row]:
        called = json.loads(each["called"])
        for index, name in enumerate(each["names"], start=each["first"]):
            yield {
                "id": called.get(name) or without_suffix(name),
                "index": index,
                "source": source,
                "provenance": json.dumps({"file": home.address(name)}),
                "outcome": KEPT,
                "name": name,
            }

    def finish(row: Row) -> Row:
        name = addresses.checked(Place(home, row["name"]))
        return image_columns(read_file(home, name, max_bytes), None)

    return Singles(begin, finish, records.RAW_IMAGE, _FETCHES)


def pair_columns(instruction: str, image: bytes, target: bytes) -> Row:
    """The columns that follow from an encoded pair.

    Raises:
        Rejection: one of them is no image.
    """
    probe(target, "the target")
    image_hash, target_hash = records.sha256_hex(image), records.sha256_hex(target)
    width, height = probe(image, "the source")
    return {
        "image": image,
        "image_target": target,
        "width": width,
        "height": height,
        "image_hash": image_hash,
        "image_target_hash": target_hash,
        "content_hash": records.content_hash(image_hash, target_hash, instruction),
    }


def image_columns(image: bytes, hint: str | None) -> Row:
    """The columns that follow from an encoded image.

    Raises:
        Rejection: it is no image.
    """
    width, height = probe(image, "the image")
    image_hash = records.sha256_hex(image)
    return {
        "image": image,
        "width": width,
        "height": height,
        "image_hash": image_hash,
        "content_hash": records.content_hash(image_hash),
        "caption_hint": records.clean_text(hint) if hint is not None else None,
    }


def image_value(values: dict[str, Any], names: Sequence[str]) -> tuple[str, Any]:
    """The first of ``names`` that holds something, and what; of a list its first item.

    A number is the name of an image, as text.

    Raises:
        InputError: there is none.
        Rejection: there are several in a list.
    """
    for name in names:
        value = values.get(name)
        if isinstance(value, list):
            if len(value) > 1:
                detail = f"{name!r} holds {len(value)} images where a pair has one"
                raise Rejection("record.several_images", detail, len(value), 1)
            value = value[0] if value else None
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            value = as_text(value)
        if isinstance(value, str):
            value = records.clean_text(value).strip() or None
        if value is not None:
            return name, value
    raise InputError(f"no {' or '.join(map(repr, names))}")


def image_names(entry: Entry, layout: Layout) -> Iterator[str]:
    """The paths, keys and URLs under which a record names its images."""
    for names in (layout.image, layout.target):
        try:
            _, value = image_value(entry.values, names) if names else ("", None)
        except (InputError, Rejection):
            continue  # said when the record is built
        name = _path(inline.held(value))
        if name is not None and len(name) <= _LONGEST_URL:
            yield name


def text_of(line: dict[str, Any], *names: str) -> str:
    """The text under the first of ``names`` that a line has.

    Raises:
        InputError: it has none, or no text there.
    """
    for name in names:
        value = line.get(name)
        if value is not None and not _is_missing(value):
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{name!r} must be a text, not {value!r:.60}")
            return records.clean_text(value)
    raise InputError(f"no {' or '.join(map(repr, names))}")


def _is_missing(value: Any) -> bool:
    """Whether a value is the NaN that data frames put where there is none."""
    return isinstance(value, float | Decimal) and math.isnan(value)


def _instruction(prompt: str) -> str:
    try:
        return Blueprint.parse(prompt).instruction
    except BlueprintError:
        return prompt.strip()


def _in_parts(
    items: Iterable[ItemT], weigh: Callable[[ItemT], int] = lambda _: 0
) -> Iterator[list[ItemT]]:
    part: list[ItemT] = []
    size = 0
    for item in items:
        part.append(item)
        size += weigh(item)
        if len(part) == ROWS_PER_PART or size > _BYTES_PER_PART:
            yield part
            part, size = [], 0
    if part:
        yield part


def _bytes_of(entry: Entry) -> int:
    """What an entry holds of encoded images, as bytes or in the structs of Hugging Face."""
    values = (v.get("bytes") if isinstance(v, dict) else v for v in entry.values.values())
    return sum(len(value) for value in values if isinstance(value, bytes))


def _failed(row: Row, why: str, schema: pa.Schema) -> pa.Table:
    fail(row, STAGE, why)
    return to_table([row], schema)
