"""The hash by which an image names the model that painted it, and a registry finds that model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

SHOWN = 8  # digits of a hash, where a person reads it

_EDGE = 1 << 20  # bytes hashed at each end of a weights file


def digest(
    files: Iterable[tuple[str, int]], open: Callable[[str], AbstractContextManager[Any]]
) -> str:
    """The hash of some files: 64 hexadecimal digits. Of large ones only both ends are read.

    Args:
        files: (name, size in bytes) of each, sorted by name.
        open: a file by its name, to be read from and sought in.
    """
    found = hashlib.sha256()
    for name, size in files:
        found.update(f"{name} {size}\n".encode())
        with open(name) as stream:
            found.update(stream.read(_EDGE))
            if size > 2 * _EDGE:
                stream.seek(size - _EDGE)
            found.update(stream.read(_EDGE))
    return found.hexdigest()


def of_path(path: Path) -> str:
    """The hash of a folder of this machine and all below it, or of a single file."""
    if path.is_file():
        return digest([("", 0)], lambda _: path.open("rb"))
    return digest(sorted(_files(path)), lambda name: (path / name).open("rb"))


def name_of(folder: Path) -> str:
    """What a model is called: as its folder, or as its run where that is called ``model``."""
    return folder.parent.name if folder.name == "model" else folder.name


def release_of(name: str, model_hash: str) -> str:
    """What a model is called that no registry has given a version."""
    return f"{name}@{model_hash[:SHOWN]}"


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            file = Path(place, name)
            yield file.relative_to(folder).as_posix(), file.stat().st_size
