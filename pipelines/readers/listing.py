"""Listing: the files of a folder that somebody named, whatever its links and its names are like."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from dim import records
from dim.errors import StorageError
from pipelines.readers.addresses import Addresses
from pipelines.readers.scanning import in_tasks

Files = list[tuple[str, int]]
"""Names and sizes in bytes, in order of name."""


class Listing(NamedTuple):
    """What a folder holds.

    Attributes:
        files: all files, those among them that are links as well.
        closed: links to folders where names may not lead, which are not followed.
        strays: links to files there, which are among ``files``.
    """

    files: Files
    closed: list[str]
    strays: list[str]


def list_files(addresses: Addresses) -> Listing:
    """All files in a folder (``addresses.home``) and below it.

    A link to a folder is followed if that is one of the roots. One to a folder that lies in this
    one is not: its files are there already.

    Raises:
        StorageError: it cannot be listed.
    """
    store = addresses.home
    if not store.is_local:
        children = store.children()
        below = in_tasks(store.list, [name[:-1] for name, _ in children if name[-1] == "/"])
        files = [item for item in children if item[0][-1] != "/"]
        return Listing(sorted(chain(files, *below)), [], [])
    if not os.path.isdir(store.root):
        return Listing([], [], [])
    closed: list[str] = []
    strays: list[str] = []
    try:
        files = sorted(_walk(addresses, closed, strays))
    except OSError as error:
        where = os.fsencode(error.filename or store.root).decode("utf-8", "replace")
        raise StorageError(f"cannot list {where}: {error.strerror}") from None
    return Listing(files, sorted(closed), sorted(strays))


def _walk(addresses: Addresses, closed: list[str], strays: list[str]) -> Iterator[tuple[str, int]]:
    root = addresses.home.root
    entered = [os.path.realpath(root)]
    folders = [("", root)]
    while folders:
        prefix, path = folders.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                name = prefix + records.clean_text(entry.name)
                if entry.is_symlink() and entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if any(f"{real}/".startswith(f"{known.rstrip('/')}/") for known in entered):
                        continue
                    if addresses.holds(real):
                        entered.append(real)
                        folders.append((f"{name}/", entry.path))
                    else:
                        closed.append(name)
                elif entry.is_dir():
                    folders.append((f"{name}/", entry.path))
                elif entry.is_file() or entry.is_symlink():  # of a broken link, the record fails
                    if entry.is_symlink() and not addresses.holds(os.path.realpath(entry.path)):
                        strays.append(name)
                    yield name, _size(entry)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:
        return 0
