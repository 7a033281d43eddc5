"""Addresses: what names in data may lead to, and how a file is found that goes by another spelling.

Whoever made a data set chose the names in it. So a name is looked for in the folder of the data and
in the roots that the job was told (``read_from``), and nowhere else; it brings no options, and no
link leads out.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from dim.errors import InputError, StorageError
from infra.storage import Store
from pipelines.readers.names import shown, spellings, without_case

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # one letter is a drive
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\|//")
_LONGEST = 1024  # characters of a name
_LONGEST_PART = 255  # bytes, on any disk
_MOST_ALIKE = 100
_MOST_ENTRIES = 50_000  # of a folder that is searched for a name in other letters
_ESCAPE = "allow it with read_from=[{}], if it is meant"

Parts = tuple[str, ...]


class Place(NamedTuple):
    """A file of a store, by its name there."""

    store: Store
    name: str


@dataclass(frozen=True)
class Addresses:
    """Where the files lie that data name.

    Args:
        home: the data's own folder, to which names are relative.
        roots: what else they may lead to.
    """

    home: Store
    roots: tuple[Store, ...] = ()

    def read(self, name: str, read: Callable[[Store, str], bytes] = Store.read) -> bytes:
        """The bytes of a file that a record names.

        Args:
            name: as the record has it.
            read: reads a file of a store.

        Raises:
            InputError: the name leads where it may not, or fits several files.
            StorageError: there is no such file, or it cannot be read.
        """
        try:
            place = self.place(name)
            return read(place.store, self.checked(place))
        except (InputError, StorageError):
            other = self._other(name)
            if other is None:
                raise
            return read(other.store, self.checked(other))

    def place(self, name: str) -> Place:
        """Where a name leads, by its text alone.

        Raises:
            InputError: nowhere it may; the message says what would allow it.
        """
        if _is_no_name(name):
            raise InputError(f"{shown(name)!r} cannot be the name of a file")
        scheme = _SCHEME.match(name)
        if scheme and (name[scheme.end() :].startswith("//") or scheme[1].lower() == "file"):
            return self._address(name, scheme[1].lower())
        if name.startswith("/"):
            return self._found(name, _parts(name, ()), True)
        return self._found(name, _parts(name, _parts(self.home.root, ())), self.home.is_local)

    def checked(self, place: Place) -> str:
        """The name of a local file whose links stay where names may lead, and which is a file.

        Raises:
            InputError: it is not.
        """
        if not place.store.is_local:
            return place.name
        if any(len(part.encode()) > _LONGEST_PART for part in place.name.split("/")):
            raise InputError(f"{shown(place.name)!r} cannot be the name of a file")
        real = os.path.realpath(place.store.path(place.name))
        if not self.holds(real):
            raise InputError(
                f"{shown(place.name)!r} is a link that leads out of {place.store.uri}, to "
                f"{shown(real)}: {_ESCAPE.format(shown(os.path.dirname(real)))}"
            )
        kind = _type(real)
        if kind and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            raise InputError(f"{shown(place.name)!r} is no file but a device or a pipe")
        return place.name

    def holds(self, real: str) -> bool:
        """Whether a local path without links lies where names may lead."""
        return any(real == root or real.startswith(f"{root.rstrip('/')}/") for root in self._roots)

    @cached_property
    def _roots(self) -> list[str]:
        """The local folders in which names may lead to files, without links."""
        stores = [store for store in (self.home, *self.roots) if store.is_local]
        return [root for store in stores for root in _real_roots(store.root)]

    @cached_property
    def _spelt_roots(self) -> list[tuple[Store, Parts]]:
        """Each store with its root; a local one also with what that is without links."""
        return [
            (store, _parts(root, ()))
            for store in (self.home, *self.roots)
            for root in (store.root, *([os.path.realpath(store.root)] if store.is_local else []))
        ]

    def _address(self, name: str, scheme: str) -> Place:
        if scheme == "s3":
            if "?" in name:
                raise InputError(f"{shown(name)!r} has options, which no address in data may have")
            return self._found(name, _parts(name.partition("://")[2], ()), False)
        parts = urlsplit(name)
        path = unquote(parts.path)
        if scheme != "file" or parts.netloc not in ("", "localhost") or parts.query:
            raise InputError(
                f"{shown(name)!r} is no address that data may have: a name beside them, or one "
                "below read_from"
            )
        if not path.startswith("/") or _is_no_name(path):
            raise InputError(f"{shown(name)!r} cannot be the name of a file")
        return self._found(name, _parts(path, ()), True)

    def _found(self, name: str, whole: Parts, local: bool) -> Place:
        """The place of a path in the first store that it lies in, compared part by part."""
        for store, root in self._spelt_roots:
            if store.is_local == local and whole[: len(root)] == root:
                if whole == root:
                    raise InputError(f"{shown(name)!r} cannot be the name of a file")
                return Place(store, "/".join(whole[len(root) :]))
        folder = "/".join(whole[:-1])
        raise InputError(
            f"{shown(name)!r} leads out of {self.home.uri}: "
            + _ESCAPE.format(shown(f"/{folder}" if local else f"s3://{folder}"))
        )

    def _other(self, name: str) -> Place | None:
        """The one file that a name fits that is not found, in another spelling.

        Raises:
            InputError: there are several; or the name is one of another machine.
        """
        if _is_no_name(name) or "://" in name or self._is_there(name):
            return None  # of the last it is the reading that failed
        foreign, found = _DRIVE.match(name), set[Place]()
        refused: InputError | None = None
        others = [] if foreign else spellings(name)
        for spelling in others:
            try:
                place = self.place(spelling)
                found |= {place} if _is_file(place) else set()
            except InputError as error:
                refused = refused or error
        if not found and not foreign:
            found = set(self._in_other_letters([name, *others]))
        if len(found) > 1:
            names = " and ".join(sorted(shown(place.name) for place in found)[:3])
            raise InputError(f"{shown(name)!r} fits {len(found)} files: {names}")
        if not found and foreign and not name.startswith("/"):
            raise InputError(
                f"{shown(name)!r} is a path of another machine: names must be relative to "
                f"{self.home.uri}"
            )
        if not found and refused is not None:
            raise refused
        return next(iter(found), None)

    def _is_there(self, name: str) -> bool:
        try:
            place = self.place(name)
            return place.store.exists(place.name)
        except (InputError, StorageError):
            return False

    def _in_other_letters(self, names: Sequence[str]) -> Iterator[Place]:
        """The local files whose names differ in letter case or accents only."""
        for name in names:
            try:
                place = self.place(name)
            except InputError:
                continue
            if place.store.is_local:
                for path in _alike(place.store.root, place.name.split("/")):
                    yield Place(place.store, path)


def _is_no_name(name: str) -> bool:
    return not name or "\0" in name or len(name) > _LONGEST


def _parts(path: str, base: Parts) -> Parts:
    """A path without ``.``, ``..`` and empty parts, from ``base`` on; never above its beginning."""
    parts = list(base)
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return tuple(parts)


def _real_roots(folder: str) -> tuple[str, ...]:
    """A folder without links; with the blobs beside it, if it is a snapshot in a cache of the
    Hugging Face hub, which consists of links to them."""
    real = os.path.realpath(folder)
    before, snapshots, _ = f"{real}/".rpartition("/snapshots/")
    blobs = f"{before}/blobs"
    if snapshots and os.path.isdir(blobs):
        return real, blobs  # if that is a link itself, nothing really lies in it
    return (real,)


def _type(path: str) -> int:
    """The kind of a file as ``stat`` says it; 0 if there is none."""
    try:
        return os.stat(path).st_mode
    except (OSError, ValueError):
        return 0


def _is_file(place: Place) -> bool:
    try:
        return place.store.is_file(place.name)
    except StorageError:
        return False


def _alike(root: str, parts: Sequence[str]) -> list[str]:
    """The files in a folder that a path leads to if letter case does not count."""
    found = [""]
    for part in parts:
        found = [f"{path}/{name}" for path in found for name in _like(f"{root}{path}", part)]
        if len(found) > _MOST_ALIKE:
            return []
    return [path[1:] for path in found if stat.S_ISREG(_type(f"{root}{path}"))]


def _like(folder: str, part: str) -> Sequence[str]:
    try:
        changed = os.stat(folder).st_mtime_ns
    except (OSError, ValueError):
        return ()
    listed = _listed(folder, changed)
    return (part,) if listed is None else listed.get(without_case(part), ())


@lru_cache(maxsize=8)
def _listed(folder: str, changed: int) -> dict[str, tuple[str, ...]] | None:
    """The names in a folder by what they have in common; ``None`` of a folder that is very large.

    ``changed`` is when that was last so.
    """
    names: dict[str, tuple[str, ...]] = {}
    try:
        with os.scandir(folder) as entries:
            for count, entry in enumerate(entries):
                if count >= _MOST_ENTRIES:
                    return None
                common = without_case(entry.name)
                names[common] = (*names.get(common, ()), entry.name)
    except OSError:
        return {}
    return names
