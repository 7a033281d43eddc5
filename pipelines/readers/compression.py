"""Compression: texts that are compressed, or written in UTF-16, read as if they were not.

Such a file can only be read from its beginning. A range of it is reached by decompressing all that
lies before, so that all ranges together cost the square of the file; ``MOST`` keeps that small
beside the work on the records.
"""

from __future__ import annotations

import io
import json
import lzma
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa

from dim.errors import InputError
from infra.storage import Store
from pipelines.readers.names import said

MOST = 1 << 30
"""Bytes of a decompressed file at most."""

Layers = tuple[str, ...]
"""What a file has to be put through, the outermost first: a codec, an encoding of text."""


class _Codec(NamedTuple):
    """How files of it begin, where we read them; how they are called; and what unpacks them."""

    magic: bytes | None
    suffix: str
    command: str


_CODECS = {
    "gzip": _Codec(b"\x1f\x8b", ".gz", "gzip -dk"),
    "bz2": _Codec(b"BZh", ".bz2", "bzip2 -dk"),
    "zstd": _Codec(b"\x28\xb5\x2f\xfd", ".zst", "zstd -d"),
    "xz": _Codec(b"\xfd7zXZ\x00", ".xz", "xz -dk"),
    "lz4": _Codec(b"\x04\x22\x4d\x18", ".lz4", "lz4 -d"),
    "brotli": _Codec(None, ".br", "brotli -d"),
    "compress": _Codec(None, ".Z", "uncompress"),
}
_SUFFIXES = {codec.suffix: name for name, codec in _CODECS.items()}
_OF_TARS = {".tgz": "gzip", ".tbz": "bz2", ".tbz2": "bz2", ".txz": "xz", ".tzst": "zstd"}
_REFUSED = {
    b"PK\x03\x04": ("a zip archive", "unzip"),
    b"PK\x05\x06": ("an empty zip archive", "unzip"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x"),
    b"Rar!\x1a\x07": ("a rar archive", "unrar x"),
    b"\x1f\x9d": ("compressed with compress", "uncompress"),
    b"\xff\x06\x00\x00sNaPpY": ("compressed with snappy", "snzip -d"),
}
_BOMS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}


def codec_of(head: bytes, where: str) -> str | None:
    """What a file is compressed with, by its first bytes; ``None`` if it is not.

    Raises:
        InputError: it is compressed with something that is not read; the message says what
            unpacks it.
    """
    for start, (what, command) in _REFUSED.items():
        if head.startswith(start):
            raise InputError(f"{where} is {what}: unpack it first ({command})")
    known = ((name, codec.magic) for name, codec in _CODECS.items() if codec.magic)
    return next((name for name, magic in known if head.startswith(magic)), None)


def codec_of_name(name: str) -> str | None:
    """What a file is compressed with, by its name."""
    suffix = PurePosixPath(name).suffix
    return _SUFFIXES.get(suffix) or (_SUFFIXES | _OF_TARS).get(suffix.lower())


def refusal(where: str, codec: str, what: str = "a container") -> InputError:
    """Why a container is not read that is compressed as a whole."""
    return InputError(
        f"{where} is {what} compressed with {codec}, and is read from its midst: unpack it first "
        f"({unpack_command(codec, where)})"
    )


def unpack_command(layer: str, where: str) -> str:
    """What a user can type to be rid of a layer of a file."""
    command = _CODECS[layer].command if layer in _CODECS else f"iconv -f {layer} -t utf-8"
    return f"{command} {PurePosixPath(where.partition('?')[0]).name}"


def encoding_of(head: bytes) -> str | None:
    """Of a text that is not UTF-8, what it is, by its first bytes."""
    marked = next((encoding for bom, encoding in _BOMS.items() if head.startswith(bom)), None)
    found = marked or json.detect_encoding(head[:4])
    return None if found.startswith("utf-8") else found


def without_suffix(name: str) -> str:
    """A name without ``.gz`` and the like."""
    suffix = PurePosixPath(name).suffix
    known = suffix in _SUFFIXES or suffix.lower() in _SUFFIXES
    return name.removesuffix(suffix) if known else name


def open_input(store: Store, name: str, layers: Layers = ()) -> Any:
    """A seekable reader of a file; of a compressed one, of what is in it."""
    return Decompressed(store, name, layers) if layers else store.open_input(name)


class Decompressed(io.RawIOBase):
    """A compressed file as if it lay there decompressed. It is read forward only.

    Args:
        store: the file's folder.
        name: the file.
        layers: what it has to be put through.

    Raises:
        InputError: while it is read, what is in it turns out to be over ``MOST`` bytes.
        OSError: while it is read, it is damaged.
    """

    def __init__(self, store: Store, name: str, layers: Layers) -> None:
        self._where, self._layers, self._at = store.address(name), layers, 0
        file: Any = store.open_input(name)
        for layer in layers:
            if layer.startswith("utf-"):
                file = pa.transcoding_input_stream(file, layer, "utf-8")
            elif layer == "xz":
                unpacked = lzma.LZMAFile(file)  # noqa: SIM115 - it stays open as long as we do
                file = pa.PythonFile(unpacked, mode="r")
            else:
                file = pa.CompressedInputStream(file, layer)
        self._file = file

    def close(self) -> None:
        """Close the file as well."""
        self._file.close()
        super().close()

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Forward, at a price."""
        return True

    def tell(self) -> int:
        """The position in what is decompressed."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; returns how many bytes there were."""
        try:
            data = self._file.read(len(buffer))
        except (OSError, EOFError, ValueError, pa.ArrowException, lzma.LZMAError) as error:
            raise OSError(f"{said(error)} ({'+'.join(self._layers)})") from None
        self._at += len(data)
        if self._at > MOST:
            raise InputError(
                f"{self._where} has over {MOST:,} bytes decompressed, and "
                f"a range of a compressed file is read from its beginning: unpack it first "
                f"({unpack_command(self._layers[0], self._where)})"
            )
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go forward to a position; returns it."""
        if whence != io.SEEK_SET or offset < self._at:
            raise io.UnsupportedOperation("a compressed file is read forward only")
        while self._at < offset and self.read(min(offset - self._at, 1 << 20)):
            pass
        return self._at
