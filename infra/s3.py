"""S3 and the stores that speak like it, as a pyarrow file system that leaves no folder markers.

pyarrow's own S3 file system writes an empty object whose key ends in ``/`` whenever it makes a
folder, deletes something or moves it, to imitate folders. Many stores refuse such keys, and none
needs them: a folder is there as long as there is an object in it. :class:`Files` does the same
work without markers. Reading, writing and listing are pyarrow's; deleting is boto3's.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import IO, Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

ResultT = TypeVar("ResultT")

ATTEMPTS = 8  # a store that is busy or away is asked again with growing pauses: over half a minute
_CONNECT_TIMEOUT_S = 10.0
_REQUEST_TIMEOUT_S = 60.0
_DELETES = 16  # requests at a time

# What a store says to credentials that it does not, or no longer, take. A question that is answered
# without a body (HEAD) says 400 for an expired token and 403 for the rest.
_REFUSALS = (
    "ACCESSDENIED",
    "EXPIREDTOKEN",
    "INVALIDACCESSKEYID",
    "INVALIDCLIENTTOKENID",
    "INVALIDTOKEN",
    "SIGNATUREDOESNOTMATCH",
    "TOKENREFRESHREQUIRED",
    "HTTPSTATUS400",
    "HTTPSTATUS403",
)

# How a store answers where there is no such object, where another than the expected one lies, and
# where it does not know the condition.
_ABSENT = frozenset({"NoSuchKey", "404"})
_CONFLICT = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}) | _ABSENT
_UNKNOWN_CONDITION = frozenset({"NotImplemented", "501"})

# Where boto3 gives up after three seconds; to a SlowDown it leaves its time.
_AWAY = (
    "NETWORKCONNECTION",
    "INTERNALERROR",
    "SERVICEUNAVAILABLE",
    *(f"AWSERROR{code}" for code in (500, 502, 503, 504)),
)


class Keys(NamedTuple):
    """An access key as AWS's variables hold it; with a session token it is one that expires."""

    access_key: str
    secret_key: str
    session_token: str | None


@dataclass(frozen=True)
class Connection:
    """How to reach a store.

    Credentials are not part of it where it was opened: both libraries look them up where AWS's
    tools do (variables, profiles, web identity, the role of the machine) and do so again when they
    expire. Only what lies in the environment of this process, which another process may not have,
    is packed when a connection is sent there: as it is at that moment.
    """

    endpoint: str | None = None
    region: str | None = None
    carried: Keys | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, object]:
        """Pack the credentials of the environment."""
        return {**self.__dict__, "carried": self.carried or _keys_in_environment()}

    def open_files(self) -> pafs.S3FileSystem:
        """pyarrow's client.

        Uploads go part after part and not in the background: pyarrow would hold all of a file that
        is read faster than it is sent, and wait for ever when many files go up at once
        (apache/arrow#32372).
        """
        if self.endpoint:
            # Many S3-compatible stores refuse the chunked uploads that newer clients default to.
            # The library reads the variable when a client is made.
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        keys = self.carried or (None, None, None)
        return pafs.S3FileSystem(
            access_key=keys[0],
            secret_key=keys[1],
            session_token=keys[2],
            endpoint_override=self.endpoint,
            region=self.region,
            connect_timeout=_CONNECT_TIMEOUT_S,
            request_timeout=_REQUEST_TIMEOUT_S,
            background_writes=False,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        )

    def open_objects(self) -> Any:
        """boto3's client."""
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        session = boto3.Session(*(self.carried or ()))
        config = Config(
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_REQUEST_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            max_pool_connections=_DELETES,
            request_checksum_calculation="when_required",
            s3={"addressing_style": "path" if self.endpoint else "auto"},
            # Without credentials as pyarrow does. By itself boto3 signs URLs in the way of 2006,
            # which newer stores refuse.
            signature_version="s3v4" if session.get_credentials() else UNSIGNED,
        )
        return session.client(
            "s3", endpoint_url=self.endpoint, region_name=self.region, config=config
        )


class Clients:
    """Both libraries' clients of one connection, made when they are first used."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @cached_property
    def files(self) -> pafs.S3FileSystem:
        """pyarrow's."""
        return self._connection.open_files()

    @cached_property
    def objects(self) -> Any:
        """boto3's."""
        return self._connection.open_objects()


class Files(pafs.FileSystemHandler):
    """What ``pyarrow.fs.PyFileSystem`` calls. Paths are ``bucket/key``.

    A refusal is asked about once more with credentials that are looked up anew, on the machine that
    asks: carried ones may have expired where the machine has a role or a profile of its own.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._clients = Clients(connection)

    def __reduce__(self) -> tuple[type[Files], tuple[Connection]]:
        """Leave the clients behind: another process makes its own."""
        return Files, (self._connection,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Files) and self._connection == other._connection

    def __hash__(self) -> int:
        return hash(self._connection)

    def get_type_name(self) -> str:
        """See pyarrow, here and below."""
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self._call(lambda clients: clients.files.get_file_info(paths))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self._call(lambda clients: clients.files.get_file_info(selector))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(PatientFile(self.open_input_file(path)), mode="r")

    def open_input_file(self, path: str) -> pa.NativeFile:
        return self._call(lambda clients: clients.files.open_input_file(path))

    def open_output_stream(self, path: str, metadata: Mapping[str, str]) -> pa.NativeFile:
        return self._call(
            lambda clients: clients.files.open_output_stream(
                path, compression=None, metadata=metadata
            )
        )

    def open_append_stream(self, path: str, metadata: Mapping[str, str]) -> pa.NativeFile:
        raise io.UnsupportedOperation("an object cannot be added to")

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing: a folder begins with its first file."""

    def delete_file(self, path: str) -> None:
        bucket, key = _split(path)
        self._ask(lambda objects: _delete(objects, bucket, [[key]]))

    def delete_dir(self, path: str) -> None:
        """Delete every object below ``path``, and the marker that another program has left."""
        bucket, key = _split(path)
        self._ask(lambda objects: _delete(objects, bucket, _list(objects, bucket, f"{key}/")))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.delete_dir(path)

    def delete_root_dir_contents(self) -> None:
        raise ValueError("that would delete every bucket")

    def copy_file(self, src: str, dest: str) -> None:
        self._call(lambda clients: clients.files.copy_file(src, dest))

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def put(self, path: str, open_body: Callable[[], IO[bytes]]) -> None:
        """Write an object by one request, so that it is there whole or not at all.

        pyarrow sends parts, and completes an upload also when it ends in an error
        (apache/arrow#40502): a short object would take the place of a whole one of its name.

        Args:
            path: of the object.
            open_body: opens what it holds, 5 GiB at most; once for every try.
        """
        bucket, key = _split(path)

        def write(objects: Any) -> None:
            with _told(), open_body() as body:
                objects.put_object(Bucket=bucket, Key=key, Body=body)

        self._ask(write)

    def presign(self, path: str, seconds: int, content_type: str) -> str:
        """A URL at which anybody reads an object for a while; it is signed here, and not asked."""
        bucket, key = _split(path)
        wanted = {"Bucket": bucket, "Key": key, "ResponseContentType": content_type}
        url: str = self._clients.objects.generate_presigned_url(
            "get_object", Params=wanted, ExpiresIn=seconds
        )
        return url

    def read_version(self, path: str) -> tuple[bytes, str] | None:
        """The bytes of an object and its ETag; ``None`` if there is no such object."""
        bucket, key = _split(path)

        def read(objects: Any) -> tuple[bytes, str] | None:
            with _told(unless=_ABSENT) as refused:
                found = objects.get_object(Bucket=bucket, Key=key)
                return found["Body"].read(), found["ETag"]
            assert refused
            return None

        return self._ask(read)

    def write_version(self, path: str, data: bytes, version: str | None) -> str | None:
        """Write an object where that of ETag ``version`` lies, or none at all if it is ``None``.

        Returns:
            The new ETag; ``None`` if something else lies there. A store that does not know such
            conditions writes all the same.
        """
        bucket, key = _split(path)
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}

        def write(objects: Any) -> str | None:
            for more in (condition, {}):
                with _told(unless=_CONFLICT | _UNKNOWN_CONDITION) as refused:
                    made = objects.put_object(Bucket=bucket, Key=key, Body=data, **more)
                    return str(made["ETag"])
                if refused[0] in _CONFLICT:
                    return None
            raise OSError(f"AWS Error {refused[0]}: {path} cannot be written")

        return self._ask(write)

    def _ask(self, action: Callable[[Any], ResultT]) -> ResultT:
        """What boto3's client does, with the patience of pyarrow's for a store that is away."""
        patiently = _patiently(_is_away)
        return self._call(lambda clients: patiently(action, clients.objects))

    def _call(self, action: Callable[[Clients], ResultT]) -> ResultT:
        try:
            return action(self._clients)
        except OSError as error:
            if not _is_refusal(error):
                raise
            refusal = error
        renewed = replace(self._connection, carried=None)
        clients = Clients(renewed)
        try:
            result = action(clients)
        except OSError:
            raise refusal from None
        self._connection, self._clients = renewed, clients
        return result


class PatientFile(io.RawIOBase):
    """A file in an object store whose reads are tried again when the store is busy.

    The library does that too, except where the body of the refusal is longer than the part of the
    file that was asked for: it has no room for it, and reports an internal failure at once.
    """

    def __init__(self, file: pa.NativeFile) -> None:
        self._file = file

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a position; returns it."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The position."""
        return int(self._file.tell())

    def read(self, size: int = -1) -> bytes:
        """The next ``size`` bytes, or all that are left."""
        start = self._file.tell()
        patiently = _patiently(_is_busy)
        return patiently(self._read_from, start, None if size is None or size < 0 else size)

    def _read_from(self, start: int, size: int | None) -> bytes:
        self._file.seek(start)
        return bytes(self._file.read(size))

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def _patiently(when: Callable[[BaseException], bool]) -> Retrying:
    return Retrying(
        retry=retry_if_exception(when),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(0.5, max=20),
        reraise=True,
    )


def _keys_in_environment() -> Keys | None:
    env = os.environ.get
    access_key, secret_key = env("AWS_ACCESS_KEY_ID"), env("AWS_SECRET_ACCESS_KEY")
    if not access_key or not secret_key:
        return None
    return Keys(access_key, secret_key, env("AWS_SESSION_TOKEN") or None)


def _split(path: str) -> tuple[str, str]:
    """(bucket, key). What concerns a whole bucket is refused: it is never ours alone."""
    bucket, _, key = path.strip("/").partition("/")
    if not key:
        raise ValueError(f"{path} is a bucket and no folder in one")
    return bucket, key


def _list(objects: Any, bucket: str, prefix: str) -> Iterator[list[str]]:
    """The keys that begin with ``prefix``, a page at a time."""
    with _told():
        for page in objects.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            yield [found["Key"] for found in page.get("Contents", ())]


def _delete(objects: Any, bucket: str, pages: Iterable[list[str]]) -> None:
    """Delete objects one by one, many at a time.

    The request that deletes a thousand at once wants a checksum, of a kind on which stores do not
    agree.
    """

    def delete(key: str) -> None:
        with _told():
            objects.delete_object(Bucket=bucket, Key=key)

    with ThreadPoolExecutor(_DELETES) as threads:
        for keys in pages:
            list(threads.map(delete, keys))


@contextmanager
def _told(unless: frozenset[str] = frozenset()) -> Iterator[list[str]]:
    """boto3's errors in the words of pyarrow's; a code of ``unless`` goes into the list instead."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        HTTPClientError,
        SSLError,
    )

    refused: list[str] = []
    try:
        yield refused
    except ClientError as error:
        said = error.response.get("Error", {})
        code = said.get("Code", "UNKNOWN")
        if code in unless:
            refused.append(code)
            return
        raise OSError(f"AWS Error {code}: {said.get('Message') or error}") from None
    except BotoCoreError as error:
        away = isinstance(error, HTTPClientError | ConnectionError)
        code = "AWS Error NETWORK_CONNECTION: " if away and not isinstance(error, SSLError) else ""
        raise OSError(f"{code}{error}") from None


def _is_busy(error: BaseException) -> bool:
    return isinstance(error, OSError) and "INTERNAL_FAILURE" in str(error)


def _is_away(error: BaseException) -> bool:
    said = squeezed(str(error))
    return isinstance(error, OSError) and any(sign in said for sign in _AWAY)


def _is_refusal(error: OSError) -> bool:
    said = squeezed(str(error))
    return any(sign in said for sign in _REFUSALS)


def squeezed(text: str) -> str:
    """In capitals, without what pyarrow, boto3 and the stores write between the words of a code."""
    return text.upper().replace("_", "").replace(" ", "")
