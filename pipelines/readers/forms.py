"""Forms: what a file is, told by its first bytes, and by its name only where they say nothing."""

from __future__ import annotations

import io
import tarfile
from pathlib import PurePosixPath
from typing import Any

from dim.errors import InputError
from infra.storage import Store
from pipelines.readers import compression
from pipelines.readers.compression import Layers

TABLE, TAR, JSON = "table", "tar", "json"

_WHAT = {TABLE: "a table", TAR: "a tar"}
_TABLES = {".parquet", ".arrow"}
_STARTS = (b"PAR1", b"PARE", b"ARROW1", b"\xff\xff\xff\xff")  # the last is that of a stream
_HEAD = 1024
_BOM = b"\xef\xbb\xbf"


def container_suffix(name: str) -> str | None:
    """``.parquet``, ``.arrow`` or ``.tar`` if that is what a file is by its name, whether it
    is compressed or not."""
    suffix = PurePosixPath(compression.without_suffix(name)).suffix.lower()
    if suffix == ".tar" or compression.codec_of_name(f"x{suffix}"):
        return ".tar"
    return suffix if suffix in _TABLES else None


def without_suffix(name: str) -> str:
    """A container's name without what says its form."""
    return str(PurePosixPath(compression.without_suffix(name)).with_suffix(""))


def of_file(store: Store, name: str) -> tuple[str, Layers]:
    """What a file is by what is in it, ``TABLE``, ``TAR`` or ``JSON``; and what it has to be put
    through.

    Raises:
        InputError: it is something that is not read; the message says what to do.
        OSError: it is damaged.
    """
    where = store.address(name)
    with store.open_input(name) as file:
        head = file.read(_HEAD)
    codec = compression.codec_of(head, where)
    layers: Layers = ()
    if codec is not None:
        layers = (codec,)
        head = io.BufferedReader(compression.Decompressed(store, name, layers)).read(_HEAD)
        if compression.codec_of(head, where) is not None:
            command = compression.unpack_command(codec, where)
            raise InputError(f"{where} is compressed twice: unpack it first ({command})")
    kind = _container(head)
    if kind is not None and codec is not None:
        raise compression.refusal(where, codec, _WHAT[kind])
    if kind is not None:
        return kind, ()
    encoding = compression.encoding_of(head)
    if encoding is not None:
        return JSON, (*layers, encoding)
    suffix = container_suffix(name)
    opens_json = head.removeprefix(_BOM).lstrip().startswith((b"{", b"["))
    if suffix is not None and codec is None and not opens_json:
        return of_suffix(suffix), ()  # a damaged one, which says so when it is read
    if b"\0" in head:
        raise InputError(f"{where} is neither JSON nor Parquet, Arrow or a tar")
    return JSON, layers


def of_suffix(suffix: str) -> str:
    """``TAR`` or ``TABLE``, of what :func:`container_suffix` says."""
    return TAR if suffix == ".tar" else TABLE


def is_parquet(file: Any) -> bool:
    """Whether an open table is Parquet, and not Arrow; it is left at its beginning."""
    start = file.read(4)
    file.seek(0)
    return start in _STARTS[:2]


def _container(head: bytes) -> str | None:
    if head.startswith(_STARTS):
        return TABLE
    try:
        tarfile.TarInfo.frombuf(head[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None
    return TAR
