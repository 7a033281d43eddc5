"""The join of records with images that lie elsewhere: which key is where, and what has no match."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dim.config import StrictModel
from dim.errors import InputError
from dim.records import short_hash
from infra.storage import Store
from pipelines.readers import bounds, containers, entries, forms, ids
from pipelines.readers.addresses import Addresses, Place
from pipelines.readers.entries import Entries
from pipelines.readers.layout import Layout
from pipelines.readers.listing import Files, list_files
from pipelines.readers.media import Media, pack
from pipelines.readers.names import is_hidden, is_image, plain, said, spellings, without_suffix
from pipelines.readers.records import image_names
from pipelines.readers.scanning import in_tasks


class MediaConfig(StrictModel):
    """Where the images lie that the records name, and what they are called there."""

    uri: str
    """A folder of images, or WebDataset tars, Parquet, or Arrow files with the images (or URLs)."""
    key: str | None = None
    """The column that holds what the records call an image: ``uid`` of BLIP3-KALE, ``id`` of CC3M,
    ``image_id`` of PixMo, ``image`` of ALLaVA. In a tar it stands in the sample's JSON; without it
    a tar's images go by path, and by sample. In a folder they go by path."""
    image: tuple[str, ...] = ("image", "jpg", "url")
    """The columns of a table that may hold the image, its struct or its URL."""


_SEVERAL = 2**32 - 1  # what a name leads to that is short for several images
_NAMES_AT_ONCE = 4096  # images of a folder that are named together
_IMAGE = np.dtype([("file", "<u4"), ("offset", "<i8")])
_NAME = np.dtype([("hash", "<u8"), ("image", "<u4")])  # 8 bytes of a hash stand for a name

_Named = tuple[int, str | None, tuple[str, ...]]
"""An image's place in its file, its key, and what else it may be called."""


class _Scanned(NamedTuple):
    """The images of some files, as ``_IMAGE``; their keys and other names, as ``_NAME``."""

    images: NDArray[Any]
    keys: NDArray[Any]
    others: NDArray[Any]
    hidden: int


def _scan(store: Store, kind: str | None, config: MediaConfig, files: Files) -> _Scanned:
    images: list[tuple[int, int]] = []
    keys: list[tuple[int, int]] = []
    others: list[tuple[int, int]] = []
    hidden = Counter[str]()
    for number, (name, size) in enumerate(files):
        for offset, key, more in _keys(store, name, size, kind, config, hidden):
            called = set(more)
            if key is not None:
                keys.append((_hash(key), len(images)))
                called |= {plain(key)} - {key}
            others += [(_hash(other), len(images)) for other in called]
            images.append((number, offset))
    arrays = (np.array(images, _IMAGE), np.array(keys, _NAME), np.array(others, _NAME))
    return _Scanned(*arrays, hidden.total())


class _Table(NamedTuple):
    """Hashes of names, sorted, and the number of the image that each leads to, or ``_SEVERAL``."""

    hashes: NDArray[np.uint64]
    images: NDArray[np.uint32]

    @classmethod
    def of(cls, names: NDArray[Any], *, first_wins: bool) -> _Table:
        """A name that comes twice leads to the first of its images, or to neither."""
        hashes, first, counts = np.unique(names["hash"], return_index=True, return_counts=True)
        images = names["image"][first]
        if not first_wins:
            images[counts > 1] = _SEVERAL
        return cls(hashes, images)

    def find(self, names: Iterable[str]) -> set[int]:
        """The images that some names lead to."""
        wanted = np.array([_hash(name) for name in names], np.uint64)
        rows = np.minimum(np.searchsorted(self.hashes, wanted), max(len(self.hashes) - 1, 0))
        there = self.hashes[rows] == wanted if len(self.hashes) else slice(0)
        return set(self.images[rows[there]].tolist())


@dataclass(frozen=True)
class _Index:
    """Every image of the media: 12 bytes for its place, and 12 for each of its names."""

    files: pa.Array
    images: NDArray[Any]
    keys: _Table
    others: _Table

    def find(self, name: str) -> int | None:
        """The image of this very key; or the one that may be called so, in any spelling."""
        found = self.keys.find([name])
        if not found:
            spelled = {name, plain(name), *spellings(name)}
            found = self.keys.find(spelled) | self.others.find(spelled)
        return found.pop() if len(found) == 1 else (_SEVERAL if found else None)

    def place(self, image: int) -> tuple[str, int] | None:
        """The file of an image and its place there; nothing for a name that fits several."""
        if image == _SEVERAL:
            return None
        file, offset = self.images[image].item()
        return self.files[file].as_py(), offset


def _join(
    index: _Index, reader: Entries, layout: Layout, each: dict[str, Any]
) -> tuple[bytes, NDArray[np.uint32], int]:
    """What the records of a range name: the places, packed; the images; how many are not there."""
    named = [name for entry in reader.of(each) for name in image_names(entry, layout)]
    found = {name: index.find(name) for name in named}
    known = {name: image for name, image in found.items() if image is not None}
    places = {name: index.place(image) for name, image in known.items()}
    images = np.array(sorted({*known.values()} - {_SEVERAL}), np.uint32)
    return pack(places), images, sum(not places.get(name) for name in named)


class MediaIndex:
    """Every key of the media and its place, in sorted arrays.

    Args:
        config: where the media are.
        max_bytes: size of an image at most; a larger one is not read.
        roots: where their links, and names in them, may lead.
    """

    def __init__(
        self,
        config: MediaConfig,
        max_bytes: int = bounds.MAX_BYTES,
        roots: tuple[Store, ...] = (),
    ) -> None:
        found = containers.find_files(config.uri, roots)
        if found.kind == forms.JSON:
            raise InputError(f"{config.uri} is neither a tar nor Parquet or Arrow, nor a folder")
        kind, files, self.hidden = found.kind, found.files, found.hidden
        addresses = Addresses(found.store, roots)
        if not files:
            files, hidden = _images(addresses)
            self.hidden += hidden
        elif not found.single:
            for name, _ in files:
                addresses.checked(Place(found.store, name))
        if not files:
            raise InputError(f"there are no images, tables or tars in {config.uri}{found.advice}")
        self.media = Media(config.uri, found.store, config.image, kind, max_bytes)
        self.identity = {"media": config.uri, "files": files}
        at_once = 1 if kind else _NAMES_AT_ONCE
        parts = [files[first : first + at_once] for first in range(0, len(files), at_once)]
        scanned = list(in_tasks(partial(_scan, found.store, kind, config), parts))
        self.hidden += sum(each.hidden for each in scanned)
        counts = [len(each.images) for each in scanned]
        images = np.concatenate([each.images for each in scanned])
        images["file"] += np.repeat(np.arange(len(scanned), dtype=np.uint32) * at_once, counts)
        firsts = np.cumsum([0, *counts[:-1]], dtype=np.uint32)

        def table(parts: list[NDArray[Any]], *, first_wins: bool) -> _Table:
            names = np.concatenate(parts)
            names["image"] += np.repeat(firsts, [len(part) for part in parts])
            return _Table.of(names, first_wins=first_wins)

        self._index = _Index(
            pa.array([name for name, _ in files], pa.large_string()),
            images,
            table([each.keys for each in scanned], first_wins=config.key is not None),
            table([each.others for each in scanned], first_wins=False),
        )
        self._used = np.zeros(len(images), np.bool_)
        keyed = self._index.keys.images
        self.images = len(np.unique(keyed[keyed != _SEVERAL]))
        self.unmatched = 0

    def join(self, ranges: list[dict[str, Any]], reader: Entries, layout: Layout) -> None:
        """Give each range the places of the images that its records name, and nothing for those
        names that fit several."""
        joined = in_tasks(partial(_join, self._index, reader, layout), ranges)
        for each, (places, images, unmatched) in zip(ranges, joined, strict=True):
            each["places"] = places
            self._used[images] = True
            self.unmatched += unmatched

    @property
    def unused(self) -> int:
        """Images that no record names."""
        return self.images - int(self._used.sum())


def _hash(name: str) -> int:
    return int.from_bytes(short_hash(name))


def _images(addresses: Addresses) -> tuple[list[tuple[str, int]], int]:
    """The images of a folder, and how many hidden ones are left out.

    Raises:
        InputError: a link among them leads out.
    """
    listed = list_files(addresses)
    images = [item for item in listed.files if is_image(item[0])]
    files = [item for item in images if not is_hidden(item[0])]
    strays = [name for name in listed.strays if is_image(name)]
    for name in (*listed.closed, *strays):
        if not is_hidden(name):
            addresses.checked(Place(addresses.home, name))
    return files, len(images) - len(files)


def _keys(
    store: Store,
    name: str,
    size: int,
    kind: str | None,
    config: MediaConfig,
    hidden: Counter[str],
) -> Iterator[_Named]:
    """What each image of a file goes by, and its place."""
    if kind == forms.TAR:
        return _tar_keys(store, name, config.key, hidden)
    if kind == forms.TABLE:
        return _table_keys(store, name, size, config)
    return iter([(0, name, (without_suffix(name),))])


def _table_keys(store: Store, name: str, size: int, config: MediaConfig) -> Iterator[_Named]:
    where = store.address(name)
    if config.key is None:
        raise InputError(f"{where} is a table: say with media.key which column names its images")
    try:
        with bounds.open_keys(store, name, size, [config.key]) as (schema, found):
            needed = Layout(image=config.image, target=(config.key,))
            containers.check_columns(where, schema, needed)
            values = (value for batch in found for value in batch.column(0).to_pylist())
            for row, value in enumerate(values):
                yield row, _key(value), ()
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{where} cannot be read ({said(error)})") from None


def _key(value: Any) -> str | None:
    try:
        return ids.as_text(value)
    except InputError:
        return str(value)


def _tar_keys(store: Store, name: str, key: str | None, hidden: Counter[str]) -> Iterator[_Named]:
    with store.open_input(name) as file:
        reader = bounds.TarReader(file, bounds.MAX_BYTES)
        containers.check_plain(reader, store.address(name))
        try:
            with tarfile.open(fileobj=reader, mode="r:") as tar:
                members = entries.members(tar, hidden)
                yield from _by_path(members) if key is None else _declared(tar, members, key)
        except tarfile.TarError as error:
            raise InputError(f"{store.address(name)} cannot be read ({error})") from None


def _by_path(members: Iterator[tarfile.TarInfo]) -> Iterator[_Named]:
    """Images by path, and by sample: of several images in one, that which is plainly its image."""
    for sample, of_sample in entries.samples(members):
        images = [member for member in of_sample if is_image(member.name)]
        plainly = [member for member in images if _column(member) in ("", "image")]
        for member in images:
            short = member.name.removeprefix("./")
            by_sample = member in (plainly or images)
            yield member.offset, member.name, (short, sample) if by_sample else (short,)


def _column(member: tarfile.TarInfo) -> str:
    """What an image is in its sample: ``image_target`` of 7.image_target.png."""
    return entries.split_key(member.name)[1].rpartition(".")[0]


def _declared(
    tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo], key: str
) -> Iterator[_Named]:
    """Images by what the JSON of their sample says, before or after them."""
    for _, of_sample in entries.samples(members):
        offset, declared = None, None
        for member in of_sample:
            if is_image(member.name):
                offset = member.offset
            elif entries.split_key(member.name)[1] == "json":
                text = bounds.read_member(tar, member, bounds.MAX_BYTES)
                value = entries.parse_line(text).get(key)
                declared = _key(value)
        if declared is not None and offset is not None:
            yield offset, declared, ()
