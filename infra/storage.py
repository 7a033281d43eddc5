"""Object storage: local folders and S3 behind the same few calls, with errors a user can act on.

An address is a local path, ``file://…`` or ``s3://bucket/key``. The S3 endpoint comes from
``?endpoint_override=http://host:port`` in the address, or from ``AWS_ENDPOINT_URL``; credentials
come from where AWS's own tools look for them (see :mod:`infra.s3`). A :class:`Store` is opened once
in the driver and travels to workers with its connection, so that they need no environment variable
of their own.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from filelock import FileLock

from dim import records, tables
from dim.errors import StorageError, StorageUnavailable, UnreadableFile
from infra.s3 import ATTEMPTS, Connection, Files, PatientFile, squeezed

_PART = 16 << 20
_FOOTERS_AT_ONCE = 16
_FILES_AT_ONCE = 4
# Of a manifest of others nothing is opened that lies elsewhere.
_KEPT_FILE = r"data/(?!\.)[^/]+\.parquet"
_LOCK_S = 60.0  # whoever holds it writes a small file

_EXPIRED = (
    "the session token has expired; run it again with fresh credentials, or use a profile or a "
    "role, which renew theirs"
)
_MEANINGS = (
    ("NO_SUCH_BUCKET", "the bucket does not exist"),
    ("ACCESS_DENIED", "access denied"),
    ("INVALID_ACCESS_KEY_ID", "the access key is not known there"),
    ("SIGNATURE_DOES_NOT_MATCH", "the secret key is wrong"),
    ("SLOW_DOWN", f"the store is too busy, also after {ATTEMPTS} attempts"),
    ("SERVICE_UNAVAILABLE", f"the store is unavailable, also after {ATTEMPTS} attempts"),
    ("HTTP STATUS 503", f"the store is unavailable, also after {ATTEMPTS} attempts"),
    ("EXPIRED_TOKEN", _EXPIRED),
    ("TOKEN_REFRESH_REQUIRED", _EXPIRED),
    ("HTTP STATUS 400) DURING HEAD", f"refused, as a store does where {_EXPIRED}"),
    ("NETWORK_CONNECTION", "the store cannot be reached"),
    ("CURLCODE", "the store cannot be reached"),
)
# What a store takes back, and what a network or a disk on one does: another try may go well.
_PASSING = (
    "SLOW_DOWN",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "INTERNAL_ERROR",
    "REQUEST_TIMEOUT",
    "THROTTLING",
    "NETWORK_CONNECTION",
    "CURLCODE",
    *(f"HTTP STATUS {code}" for code in (429, 500, 502, 503, 504)),
)
_PASSING_NUMBERS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)


class TooLargeError(StorageError):
    """A file has more bytes than were allowed.

    Attributes:
        address: of the file.
        size: its bytes, as far as they are known.
        most: what was allowed.
    """

    def __init__(self, address: str, size: int, most: int) -> None:
        super().__init__(f"{address} is over {most:,} bytes")
        self.address, self.size, self.most = address, size, most


class Output(io.RawIOBase):
    """A file being written, which knows its size in bytes and its SHA-256 as it grows."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, data: Any) -> int:
        """Add bytes at the end; returns how many."""
        count = self._file.write(data)
        self._digest.update(data)
        self.size += count
        return count

    def tell(self) -> int:
        """Where the next bytes go."""
        return self.size

    @property
    def sha256(self) -> str:
        """The hash of what was written so far, in hex."""
        return self._digest.hexdigest()


class Version(NamedTuple):
    """A file's bytes, and a tag that other bytes in its place do not have."""

    data: bytes
    tag: str


@dataclass(frozen=True)
class Store:
    """A folder in a store. Names are relative to it, with ``/`` between parts.

    Every method raises ``StorageError`` with the address and the cause; nothing is ever seen half
    written: files appear under their name when they are complete.
    """

    uri: str
    root: str
    connection: Connection | None = None

    @cached_property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow file system that :attr:`root` lies in."""
        return pafs.LocalFileSystem() if self._files is None else pafs.PyFileSystem(self._files)

    @cached_property
    def _files(self) -> Files | None:
        """The object store, which has more than pyarrow asks for."""
        return None if self.connection is None else Files(self.connection)

    def __getstate__(self) -> dict[str, object]:
        """Leave the open file system behind: a worker opens its own."""
        return {key: self.__dict__[key] for key in ("uri", "root", "connection")}

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on this machine's file system."""
        return self.connection is None

    def path(self, name: str = "") -> str:
        """Where ``name`` lies, as :attr:`filesystem` calls it."""
        return f"{self.root.rstrip('/')}/{name}" if name else self.root

    def address(self, name: str = "") -> str:
        """What to call ``name`` in a message or a manifest."""
        return join(self.uri, name) if name else self.uri

    def read(self, name: str = "", most: int | None = None) -> bytes:
        """The bytes of a file, which has no more than ``most``.

        Raises:
            TooLargeError: it has more; no more than that was read.
        """
        with _errors("read", self.address(name)):
            if most is not None:
                return self._read_some(name, most)
            if self.is_local:
                return Path(self.path(name)).read_bytes()
            with self._open(name) as file:
                return file.read()

    def read_part(self, name: str, start: int, size: int) -> bytes:
        """``size`` bytes of a file from ``start`` on, or fewer where it ends before."""
        with _errors("read", self.address(name)), self._open(name) as file:
            file.seek(start)
            return bytes(file.read(size))

    def map(self, name: str = "") -> pa.Buffer:
        """The bytes of a file; of a local one, in memory page by page as they are looked at."""
        if not self.is_local:
            return pa.py_buffer(self.read(name))
        with _errors("read", self.address(name)), pa.memory_map(self.path(name)) as file:
            return file.read_buffer()

    def open_input(self, name: str = "") -> pa.NativeFile:
        """A seekable reader of a file."""
        with _errors("read", self.address(name)):
            return self._open(name)

    @contextmanager
    def open_parquet(self, name: str, **options: Any) -> Iterator[pq.ParquetFile]:
        """A Parquet file; what goes wrong while it is read inside the block says which file.

        ``options`` are those of pyarrow's ``ParquetFile``.

        Raises:
            InputError: a column is more than data, see :mod:`dim.tables`.
        """
        where = self.address(name)
        with (
            _errors("read", where),
            self._open(name) as file,
            tables.open_parquet(file, where, **options) as parquet,
        ):
            yield parquet

    @contextmanager
    def open_arrow(self, name: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
        """The schema and batches of an Arrow stream or file, with errors as of a Parquet file."""
        where = self.address(name)
        with _errors("read", where), pa.BufferReader(self.map(name)) as file:
            yield tables.open_arrow(file, where)

    def open_dataset(self, names: Sequence[str]) -> ds.Dataset:
        """Parquet files as one data set, with the columns of the first.

        Raises:
            InputError: a column of one of them is more than data, see :mod:`dim.tables`.
        """
        with _errors("read", self.uri):
            paths = [self.path(name) for name in names]
            dataset = ds.dataset(paths, format="parquet", filesystem=self.filesystem)
            with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
                list(pool.map(_check_fragment, dataset.get_fragments()))
        return dataset

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a whole file; it replaces one that is there, at once and completely."""
        with _errors("write", self.address(name)):
            if self._files is None:
                with _replacing(Path(self.path(name))) as new:
                    new.file.write(data)
            else:
                self._files.put(self.path(name), lambda: io.BytesIO(data))

    def presign(self, name: str, seconds: int, content_type: str) -> str:
        """A URL at which anybody reads a file of an object store for so long, as that type.

        Raises:
            StorageError: this is a local folder, or there are no credentials to sign with.
        """
        with _errors("sign a URL of", self.address(name)):
            if self._files is None:
                raise StorageError(f"{self.address(name)} is local: no URL leads there")
            return self._files.presign(self.path(name), seconds, content_type)

    def read_version(self, name: str) -> Version | None:
        """A small file with what tells it from others of its name; ``None`` if it is not there."""
        with _errors("read", self.address(name)):
            if self._files is not None:
                found = self._files.read_version(self.path(name))
                return found and Version(*found)
            path = Path(self.path(name))
            return _version(path.read_bytes()) if path.is_file() else None

    def write_version(self, name: str, data: bytes, before: Version | None) -> Version | None:
        """Write a small file if what lies there is ``before`` (``None``: nothing).

        Of several who try, one succeeds: on disks that know locks, and in stores that heed the
        condition of a write (``If-None-Match``, ``If-Match``). Others write all the same.

        Returns:
            What lies there now; ``None`` if something else than ``before`` did.
        """
        with _errors("write", self.address(name)):
            if self._files is not None:
                expected = before and before.tag
                tag = self._files.write_version(self.path(name), data, expected)
                if tag is not None:
                    return Version(data, tag)
                # A write whose answer was lost is tried again, and meets itself.
                return found if (found := self.read_version(name)) and found.data == data else None
            path = Path(self.path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_S):
                if self.read_version(name) != before:
                    return None
                self.write(name, data)
                return _version(data)

    @contextmanager
    def open_output(self, name: str) -> Iterator[Output]:
        """A file that is written part by part and appears when the block ends without an error.

        On its way to an object store it lies on this machine's disk and not in memory.
        """
        with self.open_unnamed(name, lambda file: name) as file:
            yield file

    @contextmanager
    def open_unnamed(self, near: str, name: Callable[[Output], str]) -> Iterator[Output]:
        """The same, with a name that follows from what was written, such as its hash.

        Args:
            near: a name in the folder that the file will lie in.
            name: the file's own, when it is whole.
        """
        with _errors("write", self.address(near)):
            if self._files is None:
                with _replacing(Path(self.path(near))) as file:
                    output = Output(file.file)
                    yield output
                    file.path = Path(self.path(name(output)))
            else:
                with tempfile.NamedTemporaryFile() as whole:
                    output = Output(whole)
                    yield output
                    whole.flush()
                    self._files.put(self.path(name(output)), partial(_open_local, whole.name))

    @contextmanager
    def open_upload(self, name: str) -> Iterator[Output]:
        """The same, but on its way to an object store it lies nowhere: a part of it is in memory.

        A block that ends in an error leaves a shorter object there, where that cannot be deleted.
        """
        if self.is_local:
            with self.open_output(name) as file:
                yield file
            return
        with _errors("write", self.address(name)):
            stream = self.filesystem.open_output_stream(self.path(name), compression=None)
            try:
                with stream:
                    yield Output(stream)
            except BaseException:
                with suppress(Exception):  # it is the first error that matters
                    self.filesystem.delete_file(self.path(name))
                raise

    def open_append(self, name: str) -> TextIO:
        """A local file that lines are added to; an object store has no such thing."""
        with _errors("write", self.address(name)):
            path = Path(local_path(self.address(name)))
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a", encoding="utf-8")

    def move(self, name: str, to: str) -> None:
        """Give a file another name; it replaces one that is there."""
        with _errors("write", self.address(to)):
            if self.is_local:
                Path(self.path(to)).parent.mkdir(parents=True, exist_ok=True)
            self.filesystem.move(self.path(name), self.path(to))

    def exists(self, name: str = "") -> bool:
        """Whether there is a file or a folder of this name."""
        with _errors("read", self.address(name)):
            return self._type(name) != pafs.FileType.NotFound

    def is_file(self, name: str = "") -> bool:
        """Whether there is a file (and not a folder) of this name."""
        with _errors("read", self.address(name)):
            return self._type(name) == pafs.FileType.File

    def list(self, folder: str = "", *, suffix: str = "") -> list[tuple[str, int]]:
        """(name, size in bytes) of all files in ``folder`` and below, sorted by name.

        A folder that does not exist has no files.
        """
        with _errors("list", self.address(folder)):
            chosen = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
            found = self.filesystem.get_file_info(chosen)
        start = len(self.root.rstrip("/")) + 1
        files = [item for item in found if item.type == pafs.FileType.File]
        return sorted(
            (item.path[start:], item.size) for item in files if item.path.endswith(suffix)
        )

    def children(self, folder: str = "") -> tuple[tuple[str, int], ...]:
        """(name, size in bytes) of what lies in ``folder`` itself; folders end in ``/``."""
        with _errors("list", self.address(folder)):
            chosen = pafs.FileSelector(self.path(folder), allow_not_found=True)
            found = self.filesystem.get_file_info(chosen)
        start = len(self.root.rstrip("/")) + 1
        slash = {pafs.FileType.Directory: "/"}
        return tuple(
            (item.path[start:].rstrip("/") + slash.get(item.type, ""), item.size or 0)
            for item in sorted(found, key=lambda item: item.path)
        )

    def is_empty(self) -> bool:
        """Whether there is nothing at all in this folder, or no folder."""
        with _errors("list", self.uri):
            chosen = pafs.FileSelector(self.root, allow_not_found=True)
            return not self.filesystem.get_file_info(chosen)

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, if it is there."""
        with _errors("delete", self.address(name)):
            kind = self._type(name)
            if kind == pafs.FileType.File:
                self.filesystem.delete_file(self.path(name))
            elif kind == pafs.FileType.Directory:
                self.filesystem.delete_dir(self.path(name))

    def _read_some(self, name: str, most: int) -> bytes:
        if self.is_local and Path(self.path(name)).exists() and not self.is_file(name):
            raise StorageError(f"{self.address(name)} is not a file")  # a pipe would never end
        with self._open(name) as file:
            size = file.size()
            if size > most:
                raise TooLargeError(self.address(name), size, most)
            data = file.read(most + 1)  # a file can grow, or be a device that says 0
        if len(data) > most:
            raise TooLargeError(self.address(name), len(data), most)
        return data

    def _open(self, name: str) -> pa.NativeFile:
        file = self.filesystem.open_input_file(self.path(name))
        return file if self.is_local else pa.PythonFile(PatientFile(file), mode="r")

    def _type(self, name: str) -> pafs.FileType:
        return self.filesystem.get_file_info(self.path(name)).type


def open_store(uri: str) -> Store:
    """Open the folder (or file) at an address. Nothing is contacted or created yet.

    Raises:
        StorageError: the address has an unknown scheme, or no bucket.
    """
    if not uri:
        raise StorageError("the storage address is empty")
    scheme = _scheme(uri)
    if scheme == "s3":
        return _open_s3(uri)
    if scheme == "file":
        return Store(uri.rstrip("/"), _absolute(unquote(urlsplit(uri).path)))
    if scheme:
        raise StorageError(f"cannot store at {uri}: use a local path, file:// or s3://")
    return Store(uri.rstrip("/") or "/", _absolute(uri))


def is_known_server(store: Store, *known: Store) -> bool:
    """Whether a store is on this machine, on one of the servers of ``known``, or where the
    environment says: an address out of a file of others can name any server, which then gets a
    request that is signed with our key."""
    if store.connection is None:
        return True
    theirs = [other.connection.endpoint for other in known if other.connection is not None]
    return store.connection.endpoint in (None, _endpoint({}), *theirs)


def open_file(uri: str) -> tuple[Store, str]:
    """The store of a file's folder, and the file's name in it.

    Raises:
        StorageError: the address is not one of a file.
    """
    base, query = _split_query(uri)
    if _scheme(base) == "s3" and "/" not in base[len("s3://") :].rstrip("/"):
        raise StorageError(f"{uri} names a bucket and no file in it")
    folder, slash, name = base.rstrip("/").rpartition("/")
    return open_store((folder or slash or ".") + query), name


def join(uri: str, *names: str) -> str:
    """``uri`` with names added to its path, in front of any ``?…`` of an ``s3://`` address."""
    base, query = _split_query(uri)
    return "/".join([base.rstrip("/"), *(name.strip("/") for name in names)]) + query


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow file system and path of an address."""
    store = open_store(uri)
    return store.filesystem, store.root


def is_local(uri: str) -> bool:
    """Whether an address lies on this machine's file system."""
    return open_store(uri).is_local


def local_path(uri: str) -> str:
    """The absolute path of a local address.

    Raises:
        StorageError: the address is not local.
    """
    store = open_store(uri)
    if not store.is_local:
        raise StorageError(f"{uri} is not on this machine's file system")
    return store.root


def read_bytes(uri: str) -> bytes:
    """The bytes of a file.

    Raises:
        StorageError: it does not exist or cannot be read.
    """
    store, name = open_file(uri)
    return store.read(name)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file, atomically.

    Raises:
        StorageError: it cannot be written.
    """
    store, name = open_file(uri)
    store.write(name, data)


def exists(uri: str) -> bool:
    """Whether there is a file or folder at an address."""
    return open_store(uri).exists()


def upload_folder(folder: str | Path, uri: str) -> None:
    """Copy all files of a local folder to an address, below the same relative names.

    Raises:
        StorageError: there is no such folder, or a file cannot be read or written.
    """
    _copy_folder(open_store(str(folder)), open_store(uri))


def replace_folder(folder: str | Path, uri: str, last: str) -> None:
    """Put a local folder's files in the place of all that lies at an address.

    Its file ``last`` is what makes the folder one. It goes first and comes last, so what a call
    that is cut off leaves is none, and nothing of an older folder stays beside the new files.

    Raises:
        StorageError: a file cannot be read, written or deleted.
    """
    source, target = open_store(str(folder)), open_store(uri)
    target.delete(last)
    target.delete("")
    names = [name for name, _ in source.list() if name != last]
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(lambda name: _copy_file(source, target, name), names))
    _copy_file(source, target, last)


def _copy_file(source: Store, target: Store, name: str) -> None:
    with _errors("copy", f"{source.address(name)} to {target.uri}"):
        if target.is_local:
            with _replacing(Path(target.path(name))) as new, source.open_input(name) as stream:
                shutil.copyfileobj(stream, new.file, _PART)
        else:
            _copy(replace(source, root=source.path(name)), replace(target, root=target.path(name)))


def everywhere(address: str) -> str:
    """An address as a process with another working directory can use it."""
    store = open_store(address)
    return store.root if store.is_local else address


def download_folder(uri: str, folder: str | Path) -> None:
    """Copy all files at an address to a local folder, below the same relative names.

    They appear there when all of them have arrived.

    Raises:
        StorageError: there is nothing at the address, or a file cannot be read or written.
    """
    source = open_store(uri)
    files = source.list()
    if not files:
        raise StorageError(f"there is nothing at {uri}")
    for name, _ in files:
        if ".." in name.split("/"):  # an object may be called so
            raise StorageError(f"{source.address(name)} would lie outside of {folder}")
    _copy_folder(source, open_store(str(folder)))


def _copy_folder(source: Store, target: Store) -> None:
    with _errors("copy", f"{source.uri} to {target.uri}"):
        if not target.is_local:
            _copy(source, target)
            return
        place = Path(target.root)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as folder:
            arrived = open_store(folder)
            _copy(source, arrived)
            for name, _ in arrived.list():
                final = place / name
                final.parent.mkdir(parents=True, exist_ok=True)
                Path(folder, name).replace(final)


def _copy(source: Store, target: Store) -> None:
    """A file or all in a folder: several files at a time, a few parts of each in memory."""
    try:
        pafs.copy_files(
            source.root,
            target.root,
            source_filesystem=source.filesystem,
            destination_filesystem=target.filesystem,
            chunk_size=_PART,
        )
    except Exception:
        with suppress(Exception):  # it is the first error that matters
            _delete_short(source, target)
        raise


def _delete_short(source: Store, target: Store) -> None:
    """pyarrow completes an upload also when reading ends in an error (apache/arrow#40502)."""
    alone = [("", os.path.getsize(source.root))]
    for name, size in alone if source.is_file() else source.list():
        found = target.filesystem.get_file_info(target.path(name))
        if found.type == pafs.FileType.File and found.size != size:
            target.delete(name)


def open_dataset(uris: str | Sequence[str]) -> ds.Dataset:
    """The kept records of one or more job outputs: the files that their manifests name, in order.

    Raises:
        InputError: its records are of a schema newer than this program knows, or have a column
            that is more than data.
        StorageError: an output does not exist or holds no finished shards.
    """
    parts = [_open_shards(uri) for uri in ([uris] if isinstance(uris, str) else uris)]
    if not parts:
        raise StorageError("no data address was given")
    return parts[0] if len(parts) == 1 else ds.dataset(parts)


def open_finished(uri: str) -> Store:
    """The output folder of a job that is finished.

    Raises:
        StorageError: there is none, or it is not finished.
    """
    store = open_store(uri)
    if not store.exists("manifest.json"):
        there = "is not finished (it has no manifest.json)" if store.exists() else "does not exist"
        raise StorageError(f"the dataset {uri} {there}")
    return store


def _open_shards(uri: str) -> ds.Dataset:
    store = open_finished(uri)
    try:
        named = [file["path"] for file in json.loads(store.read("manifest.json"))["files"]]
        names = [name for name in named if re.fullmatch(_KEPT_FILE, name)]
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{store.address('manifest.json')} is no manifest") from None
    if not names:
        raise StorageError(f"the dataset {uri} has no data/*.parquet")
    dataset = store.open_dataset(names)
    records.check_version(dataset.schema, uri)
    return dataset


def _check_fragment(fragment: ds.ParquetFileFragment) -> None:
    tables.check_parquet(fragment.physical_schema, fragment.metadata.metadata, fragment.path)


def _open_s3(uri: str) -> Store:
    base, query = _split_query(uri)
    options = {key: values[-1] for key, values in parse_qs(query.removeprefix("?")).items()}
    unknown = sorted(set(options) - {"endpoint_override", "region", "scheme"})
    if unknown:
        raise StorageError(f"unknown option {unknown[0]!r} in {uri}")
    bucket, _, key = base.removeprefix("s3://").strip("/").partition("/")
    if not bucket:
        raise StorageError(f"{uri} names no bucket")
    if "@" in bucket:
        raise StorageError(
            f"{uri} holds credentials: give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            "by a profile, and write s3://bucket/key"
        )
    root = f"{bucket}/{key}".rstrip("/")
    return Store(base.rstrip("/") + query, root, _connection(options, bucket))


def _connection(options: dict[str, str], bucket: str) -> Connection:
    env, endpoint = os.environ.get, _endpoint(options)
    if endpoint and "@" in urlsplit(endpoint).netloc:
        raise StorageError(
            f"the S3 endpoint {endpoint} holds a user: give the keys by AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY or by a profile"
        )
    region = options.get("region") or env("AWS_REGION") or env("AWS_DEFAULT_REGION")
    if region is None and endpoint:
        region = "us-east-1"  # what S3-compatible stores go by
    return Connection(endpoint, region or _find_region(bucket))


def _endpoint(options: dict[str, str]) -> str | None:
    env = os.environ.get
    endpoint = (
        options.get("endpoint_override") or env("AWS_ENDPOINT_URL_S3") or env("AWS_ENDPOINT_URL")
    )
    if endpoint and "://" not in endpoint:
        return f"{options.get('scheme', 'https')}://{endpoint}"
    return endpoint


def _find_region(bucket: str) -> str | None:
    with _errors("find the bucket", f"s3://{bucket}"):
        return pafs.resolve_s3_region(bucket)


def _scheme(uri: str) -> str:
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", uri)
    return found[1].lower() if found else ""


def _split_query(uri: str) -> tuple[str, str]:
    """(address, "?…"); only S3 addresses have a query, a local name may hold a question mark."""
    if _scheme(uri) != "s3" or "?" not in uri:
        return uri, ""
    base, _, query = uri.partition("?")
    return base, f"?{query}"


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _version(data: bytes) -> Version:
    return Version(data, hashlib.sha256(data).hexdigest())


def _open_local(path: str) -> IO[bytes]:
    return Path(path).open("rb")


@dataclass
class _New:
    """A file that is being written, and where it is to lie when it is whole."""

    file: IO[bytes]
    path: Path


@contextmanager
def _replacing(path: Path) -> Iterator[_New]:
    """A new file beside ``path``, which takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            new = _New(file, path)
            yield new
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(new.path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _errors(action: str, address: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        if action in ("write", "copy"):
            raise StorageError(f"cannot {action} {address}: {_explain(error)}") from None
        raise UnreadableFile(f"not found: {address}") from None
    except (OSError, pa.ArrowException, shutil.Error) as error:
        kind = _kind(error) if action in ("read", "write", "list") else StorageError
        if action != "read" and kind is UnreadableFile:
            kind = StorageError
        raise kind(f"cannot {action} {address}: {_explain(error)}") from None


def _kind(error: Exception) -> type[StorageError]:
    """Whether another try may go well, the file is damaged, or the store refuses."""
    number, said = getattr(error, "errno", None), squeezed(str(error))
    if number in _PASSING_NUMBERS or any(squeezed(code) in said for code in _PASSING):
        return StorageUnavailable
    # Parquet's and Arrow's own complaints have no number; a store's name the library.
    if number is None and "AWSERROR" not in said and not isinstance(error, shutil.Error):
        return UnreadableFile
    return StorageError


def _explain(error: Exception) -> str:
    number = getattr(error, "errno", None)
    if number == errno.ENOSPC:
        return "no space left on the disk"
    text = " ".join(str(error).split())
    said = squeezed(text)
    for code, meaning in _MEANINGS:
        if squeezed(code) in said:
            return meaning
    return os.strerror(number) if number else text
