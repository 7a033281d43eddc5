"""The join of records with images that lie elsewhere: which key is where, and what has no match."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from dim.config import StrictModel
from dim.errors import InputError
from dim.records import short_hash
from infra.storage import Store
from pipelines.readers import bounds, containers, entries
from pipelines.readers.entries import Entries
from pipelines.readers.layout import Layout
from pipelines.readers.media import Media
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


class MediaIndex:
    """Every key of the media and its place. 8 bytes of a hash stand for a key."""

    def __init__(self, config: MediaConfig, max_bytes: int = bounds.MAX_BYTES) -> None:
        store, files = containers.find_files(config.uri)
        if not files:
            files = [item for item in store.list() if entries.is_image(item[0])]
        if not files:
            raise InputError(f"there are no images, tables or tars in {config.uri}")
        self.media = Media(config.uri, store, config.image, max_bytes)
        self.identity = {"media": config.uri, "files": files}
        self._files = [name for name, _ in files]
        self._places: dict[bytes, tuple[int, int]] = {}
        self._used: set[tuple[int, int]] = set()
        for number, (name, size) in enumerate(files):
            for keys, offset in _keys(store, name, size, config):
                for key in keys:
                    self._places.setdefault(short_hash(key), (number, offset))
        self.images = len(set(self._places.values()))
        self.unmatched = 0

    def join(self, units: list[dict[str, Any]], reader: Entries, layout: Layout) -> None:
        """Give each range the places of the images that its records name."""
        for unit in units:
            places: dict[str, tuple[str, int]] = {}
            for entry in reader.of(unit):
                for name in image_names(entry, layout):
                    found = self._places.get(short_hash(name))
                    if found is None:
                        self.unmatched += 1
                        continue
                    self._used.add(found)
                    places[name] = (self._files[found[0]], found[1])
            unit["places"] = json.dumps(places)

    @property
    def unused(self) -> int:
        """Images that no record names."""
        return self.images - len(self._used)


def _keys(
    store: Store, name: str, size: int, config: MediaConfig
) -> Iterator[tuple[list[str], int]]:
    """What each image of a file goes by, and its place."""
    if name.endswith(".tar"):
        return _tar_keys(store, name, config.key)
    if name.endswith((".parquet", ".arrow")):
        return _table_keys(store, name, size, config)
    return iter([([name, str(PurePosixPath(name).with_suffix(""))], 0)])


def _table_keys(
    store: Store, name: str, size: int, config: MediaConfig
) -> Iterator[tuple[list[str], int]]:
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
                    yield ([str(value)] if value is not None else []), row
                    row += 1
    except InputError:
        raise
    except Exception as error:  # a damaged file can raise anything
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{where} cannot be read ({text})") from None


def _tar_keys(store: Store, name: str, key: str | None) -> Iterator[tuple[list[str], int]]:
    with store.open_input(name) as file:
        reader = bounds.TarReader(file, bounds.MAX_BYTES)
        try:
            with tarfile.open(fileobj=reader, mode="r:") as tar:
                yield from _member_keys(tar, key)
        except tarfile.TarError as error:
            raise InputError(f"{store.address(name)} cannot be read ({error})") from None


def _member_keys(tar: tarfile.TarFile, key: str | None) -> Iterator[tuple[list[str], int]]:
    """Images by path and sample, or by what the JSON of their sample says, before or after them."""
    sample, offset, declared = "", None, None
    for member in entries.members(tar):
        stem, extension = entries.split_key(member.name)
        if stem != sample:
            if declared is not None and offset is not None:
                yield [declared], offset
            sample, offset, declared = stem, None, None
        if entries.is_image(member.name):
            if key is None:
                yield [member.name, member.name.removeprefix("./"), stem], member.offset
            offset = member.offset
        elif key is not None and extension == "json":
            text = bounds.read_member(tar, member, bounds.MAX_BYTES)
            value = entries.parse_line(text).get(key)
            declared = None if value is None else str(value)
    if declared is not None and offset is not None:
        yield [declared], offset
