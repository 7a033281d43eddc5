"""The join of records with images that lie elsewhere: which key is where, and what has no match."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from dim.config import StrictModel
from dim.errors import InputError
from dim.records import short_hash
from infra.storage import Store
from pipelines.readers import bounds, containers, entries, forms, ids
from pipelines.readers.addresses import Addresses, Place
from pipelines.readers.entries import Entries
from pipelines.readers.layout import Layout
from pipelines.readers.listing import list_files
from pipelines.readers.media import Media
from pipelines.readers.names import is_hidden, plain, said, spellings, without_suffix
from pipelines.readers.records import image_names


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


_Place = tuple[int, int]
_SEVERAL: _Place = (-1, -1)  # what a name leads to that is short for several images


class _Named(NamedTuple):
    """An image's place in its file, its key, and what else it may be called."""

    offset: int
    key: str | None = None
    others: tuple[str, ...] = ()


class MediaIndex:
    """Every key of the media and its place. 8 bytes of a hash stand for a key.

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
        if not files:
            files, hidden = _images(Addresses(found.store, roots))
            self.hidden += hidden
        elif not found.single:
            _check_links(Addresses(found.store, roots), [name for name, _ in files])
        if not files:
            raise InputError(f"there are no images, tables or tars in {config.uri}{found.advice}")
        self.media = Media(config.uri, found.store, config.image, kind, max_bytes)
        self.identity = {"media": config.uri, "files": files}
        self._files = [name for name, _ in files]
        self._places: dict[bytes, _Place] = {}
        self._otherwise: dict[bytes, _Place] = {}
        self._used: set[_Place] = set()
        members = Counter[str]()
        for number, (name, size) in enumerate(files):
            for named in _keys(found.store, name, size, kind, config, members):
                self._add(named, (number, named.offset), by_path=config.key is None)
        self.hidden += members.total()
        self.images = len(set(self._places.values()) - {_SEVERAL})
        self.unmatched = 0

    def _add(self, named: _Named, place: _Place, *, by_path: bool) -> None:
        """A key that comes twice leads to the first of its images; a path leads to neither."""
        others = set(named.others)
        if named.key is not None:
            known = self._places.setdefault(short_hash(named.key), place)
            if known != place and by_path:
                self._places[short_hash(named.key)] = _SEVERAL
            others |= {plain(named.key)} - {named.key}
        for other in others:
            known = self._otherwise.setdefault(short_hash(other), place)
            if known != place:
                self._otherwise[short_hash(other)] = _SEVERAL

    def _find(self, name: str) -> _Place | None:
        """The image of this very key; or the one that may be called so, in any spelling."""
        exact = self._places.get(short_hash(name))
        if exact is not None:
            return exact
        hashes = {short_hash(text) for text in (name, plain(name), *spellings(name))}
        tables = (self._places, self._otherwise)
        found = {table[short] for short in hashes for table in tables if short in table}
        return found.pop() if len(found) == 1 else (_SEVERAL if found else None)

    def join(self, ranges: list[dict[str, Any]], reader: Entries, layout: Layout) -> None:
        """Give each range the places of the images that its records name, and nothing for those
        names that fit several."""
        for each in ranges:
            places: dict[str, tuple[str, int] | None] = {}
            for entry in reader.of(each):
                for name in image_names(entry, layout):
                    found = self._find(name)
                    if found is None or found == _SEVERAL:
                        self.unmatched += 1
                    else:
                        self._used.add(found)
                    if found is not None:
                        place = (self._files[found[0]], found[1])
                        places[name] = None if found == _SEVERAL else place
            each["places"] = json.dumps(places)

    @property
    def unused(self) -> int:
        """Images that no record names."""
        return self.images - len(self._used)


def _images(addresses: Addresses) -> tuple[list[tuple[str, int]], int]:
    """The images of a folder, and how many hidden ones are left out.

    Raises:
        InputError: a link among them leads out.
    """
    listed = list_files(addresses)
    images = [item for item in listed.files if entries.is_image(item[0])]
    files = [item for item in images if not is_hidden(item[0])]
    strays = [name for name in listed.strays if entries.is_image(name)]
    _check_links(addresses, [name for name in (*listed.closed, *strays) if not is_hidden(name)])
    return files, len(images) - len(files)


def _check_links(addresses: Addresses, names: Sequence[str]) -> None:
    for name in names:
        addresses.checked(Place(addresses.home, name))


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
    return iter([_Named(0, name, (without_suffix(name),))])


def _table_keys(store: Store, name: str, size: int, config: MediaConfig) -> Iterator[_Named]:
    where = store.address(name)
    if config.key is None:
        raise InputError(f"{where} is a table: say with media.key which column names its images")
    try:
        with bounds.open_keys(store, name, size, [config.key]) as (schema, found):
            needed = Layout(image=config.image, target=(config.key,))
            containers.check_columns(where, schema, needed)
            row = 0
            for batch in found:
                for value in batch.column(0).to_pylist():
                    yield _Named(row, _key(value))
                    row += 1
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
    samples = groupby(members, lambda member: entries.split_key(member.name)[0])
    for sample, of_sample in samples:
        images = [member for member in of_sample if entries.is_image(member.name)]
        plainly = [member for member in images if _column(member) in ("", "image")]
        for member in images:
            short = member.name.removeprefix("./")
            by_sample = member in (plainly or images)
            yield _Named(member.offset, member.name, (short, sample) if by_sample else (short,))


def _column(member: tarfile.TarInfo) -> str:
    """What an image is in its sample: ``image_target`` of 7.image_target.png."""
    return entries.split_key(member.name)[1].rpartition(".")[0]


def _declared(
    tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo], key: str
) -> Iterator[_Named]:
    """Images by what the JSON of their sample says, before or after them."""
    for _, of_sample in groupby(members, lambda member: entries.split_key(member.name)[0]):
        offset, declared = None, None
        for member in of_sample:
            if entries.is_image(member.name):
                offset = member.offset
            elif entries.split_key(member.name)[1] == "json":
                text = bounds.read_member(tar, member, bounds.MAX_BYTES)
                value = entries.parse_line(text).get(key)
                declared = _key(value)
        if declared is not None and offset is not None:
            yield _Named(offset, declared)
