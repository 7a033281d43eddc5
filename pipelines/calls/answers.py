"""Answers that were paid for: kept from the moment they arrive, so that no rerun pays again.

Those about the records of a range lie in a folder of their own, so that a worker reads no others.
Files are only ever added to. On a local disk every worker appends lines to a file of its own; on an
object store, where nothing can be appended, the answers of about a second make the next object. A
line also says what the answer cost and which record it was for: together they are the job's bill.

Answers that hold nothing (cut off, refused, empty) were paid for too. They lie in files of their
own, so that they can be set aside when a job is to try again what failed.

An input that is cut otherwise than it was, or by an older version, leaves answers in folders of no
range. They are brought together once, in one file with an index.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self, TextIO

import numpy as np
from numpy.typing import NDArray

from dim.designers import Reply
from dim.designers.calls.usage import Answer, Unusable, Usage
from dim.records import sha256_hex, short_hash
from infra.storage import Output, Store

_FOLDER = "answers"
_USABLE, _UNUSABLE, _SET_ASIDE = ".jsonl", ".unusable", ".set-aside"
_EARLIER, _LINES, _INDEX = "earlier-", ".lines", ".index"
_PLACE = np.dtype([("key", "<u8"), ("start", "<u8"), ("size", "<u4")])  # of a line, 20 bytes
_NEAR = 1 << 16  # bytes between lines that are read rather than asked around
_READERS = 16  # an object store answers each in its own time
_EVERY_S = 0.8  # which leaves the upload the rest of a second


@dataclass(frozen=True)
class Entry:
    """One answer as it is kept: ``reply`` is ``None`` for one that was set aside.

    ``record`` is the id of the record that it was first asked for.
    """

    key: str
    reply: str | Unusable | None
    usage: Usage | None
    record: str


def answer_key(*parts: str | None) -> str:
    """The key of an answer: a hash over exactly what changes it (designer, prompt, images, …)."""
    return sha256_hex(json.dumps(parts).encode())


def name_of(pieces: Sequence[Mapping[str, Any]]) -> str:
    """What a range is called by what is in it, wherever it comes among others."""
    return sha256_hex(json.dumps(list(pieces), sort_keys=True).encode())[:16]


class Answers:
    """The answers about one range of a job, as one worker reads and writes them.

    Safe for many threads. Whoever adds something closes it, or leaves its ``with``.

    Args:
        store: the job's output folder; answers lie in its ``answers/``.
        name: of the range.
        earlier: answers that may be about it too.

    Raises:
        StorageError: the folder cannot be read; from :meth:`add` and :meth:`close`, written.
    """

    def __init__(self, store: Store, name: str, earlier: Earlier | None = None) -> None:
        folder = f"{_FOLDER}/{name}"
        self._known: dict[str, Reply] = {}
        self._earlier = earlier
        for entry in _read(store, [found for found, _ in store.list(folder)]):
            self._learn(entry.key, entry.reply)
        self._writer = (_LineWriter if store.is_local else _ObjectWriter)(store, folder)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """See :meth:`close`."""
        self.close()

    def close(self) -> None:
        """Let everything be stored that was added."""
        self._writer.close()

    def get(self, key: str) -> Reply | None:
        """A stored answer; one that holds nothing is the error that it was."""
        return self.find([key]).get(key)

    def find(self, keys: Sequence[str]) -> dict[str, Reply]:
        """The stored answers of several keys, as far as there are any."""
        if self._earlier is not None:
            for entry in self._earlier.find([key for key in keys if key not in self._known]):
                self._learn(entry.key, entry.reply)
        return {key: self._known[key] for key in keys if key in self._known}

    def add(self, key: str, reply: str | Unusable, record: str = "") -> None:
        """Store an answer; a process that is killed a second later does not lose it.

        On a local disk not even one that is killed at once does. An answer that holds nothing and
        might hold something next time is only put on the bill.
        """
        usage = reply.usage if isinstance(reply, Answer | Unusable) else None
        kind = _USABLE
        if isinstance(reply, Unusable):
            kind = _UNUSABLE if reply.final else _SET_ASIDE
        if kind != _SET_ASIDE:
            self._learn(key, reply)
        self._writer.write(kind, _line(Entry(key, reply, usage, record)))

    def _learn(self, key: str, reply: Reply | None) -> None:
        """Of two with the same key a usable one is kept."""
        if reply is not None and not isinstance(self._known.get(key), str):
            self._known[key] = reply


@dataclass(frozen=True)
class Earlier:
    """Answers that lie in no folder of a range: a file of their lines, and where in it each is.

    Attributes:
        store: the job's output folder.
        name: of the file and of its index, without what tells them apart.
    """

    store: Store
    name: str

    @cached_property
    def _places(self) -> tuple[NDArray[np.uint64], NDArray[Any]]:
        """The hashes of all keys, sorted, and where the line of each is."""
        places = np.frombuffer(self.store.read(f"{self.name}{_INDEX}"), _PLACE)
        return np.ascontiguousarray(places["key"]), places

    def find(self, keys: Sequence[str]) -> list[Entry]:
        """What lies under some keys.

        Raises:
            StorageError: it cannot be read.
        """
        asked, (hashes, places) = set(keys), self._places
        wanted = np.array([_hash(key) for key in keys], np.uint64)
        first, end = (np.searchsorted(hashes, wanted, side) for side in ("left", "right"))
        rows = [row for span in zip(first, end, strict=True) for row in range(*span)]
        with ThreadPoolExecutor(_READERS) as pool:
            read = pool.map(self._read, _together(np.sort(places[rows], order="start")))
            found = [entry for lines in read for entry in _entries(lines)]
        return [entry for entry in found if entry.key in asked]

    def _read(self, span: tuple[int, int]) -> bytes:
        return self.store.read_part(f"{self.name}{_LINES}", span[0], span[1] - span[0])


def _together(places: NDArray[Any]) -> list[tuple[int, int]]:
    """Where to read lines: in one go those that are near to one another, as those of a range are.

    Other lines may be between them.
    """
    spans: list[tuple[int, int]] = []
    for start, size in zip(places["start"].tolist(), places["size"].tolist(), strict=True):
        if spans and start - spans[-1][1] <= _NEAR:
            spans[-1] = (spans[-1][0], start + size)
        else:
            spans.append((start, start + size))
    return spans


def gather_earlier(store: Store, ranges: Collection[str]) -> Earlier | None:
    """What lies among the answers of a job and in no folder of ``ranges``, if there is anything.

    It is copied together where that has not been done; nothing is moved or deleted.

    Raises:
        StorageError: it cannot be read or written.
    """
    own = {f"{_FOLDER}/{name}/" for name in ranges}
    strange = [name for name, _ in store.children(_FOLDER) if name not in own]
    names = [
        name
        for child in strange
        for name in ([found for found, _ in store.list(child)] if child[-1] == "/" else [child])
        if name.endswith((_USABLE, _UNUSABLE))
    ]
    if not names:
        return None
    earlier = Earlier(store, f"{_FOLDER}/{_EARLIER}{sha256_hex(repr(names).encode())[:16]}")
    if not store.is_file(f"{earlier.name}{_INDEX}"):
        with store.open_output(f"{earlier.name}{_LINES}") as file:
            places = np.fromiter(_copied(_read(store, names), file), _PLACE)
        places = places[np.argsort(places["key"], kind="stable")]
        store.write(f"{earlier.name}{_INDEX}", places.tobytes())
    return earlier


def _copied(entries: Iterable[Entry], file: Output) -> Iterator[tuple[int, int, int]]:
    """The place of each line, which is written there."""
    for entry in entries:
        start = file.size
        size = file.write(_line(entry).encode())
        yield _hash(entry.key), start, size


def read_entries(store: Store, names: Iterable[str] | None = None) -> Iterator[Entry]:
    """Everything that was ever answered to a job, or what is in some files, with what it cost.

    Raises:
        StorageError: it cannot be read.
    """
    return _read(store, [name for name, _ in answer_files(store)] if names is None else names)


def answer_files(store: Store, name: str = "") -> list[tuple[str, int]]:
    """The files of all answers, or of those about a range, in order, each with its bytes.

    Raises:
        StorageError: the folder cannot be read.
    """
    return store.list(f"{_FOLDER}/{name}" if name else _FOLDER)


def set_unusable_aside(store: Store) -> None:
    """Have asked again what was answered with nothing; it stays on the bill.

    Raises:
        StorageError: the folder cannot be changed.
    """
    for name, _ in store.list(_FOLDER, suffix=_UNUSABLE):
        store.move(name, name.removesuffix(_UNUSABLE) + _SET_ASIDE)


def _read(store: Store, names: Iterable[str]) -> Iterator[Entry]:
    """The answers in some files, in order."""
    names = [name for name in names if name.endswith((_USABLE, _UNUSABLE, _SET_ASIDE))]
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(names), _READERS):
            some = names[first : first + _READERS]
            for name, data in zip(some, pool.map(store.read, some), strict=True):
                yield from _entries(data, set_aside=name.endswith(_SET_ASIDE))


def _hash(key: str) -> int:
    return int.from_bytes(short_hash(key))


def _line(entry: Entry) -> str:
    content: dict[str, Any] = {"key": entry.key}
    content["error" if isinstance(entry.reply, Unusable) else "answer"] = str(entry.reply)
    if entry.record:
        content["record"] = entry.record
    if entry.usage is not None:
        content["usage"] = asdict(entry.usage)
    return json.dumps(content) + "\n"


def _entries(data: bytes, *, set_aside: bool = False) -> Iterator[Entry]:
    for line in data.decode("utf-8", "replace").split("\n"):
        try:
            content = json.loads(line)
            usage = Usage(**content["usage"]) if "usage" in content else None
            reply = _reply(content, usage)
            yield Entry(
                content["key"], None if set_aside else reply, usage, content.get("record", "")
            )
        except (ValueError, KeyError, TypeError):
            continue  # the line that a killed worker was writing


def _reply(content: dict[str, Any], usage: Usage | None) -> str | Unusable:
    if "error" in content:
        return Unusable(content["error"], usage or Usage(0, 0, 0.0, 0.0))
    return content["answer"]


class _LineWriter:
    """Appends to a file a kind; a line handed to the operating system outlives the process."""

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self._folder = folder
        self._files: dict[str, TextIO] = {}
        self._lock = threading.Lock()

    def write(self, kind: str, line: str) -> None:
        with self._lock:
            if kind not in self._files:
                self._files[kind] = self._store.open_append(_new_name(self._folder, kind))
            self._files[kind].write(line)
            self._files[kind].flush()

    def close(self) -> None:
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()


class _ObjectWriter:
    """What came within a second of the first line that waits is an object of its own.

    Nobody waits for it. If it cannot be written, the next who writes or closes hears of it, and the
    lines wait for the next upload.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self._store = store
        self._folder = folder
        self._waiting: defaultdict[str, list[str]] = defaultdict(list)
        self._timer: threading.Timer | None = None
        self._failure: Exception | None = None
        self._lock = threading.Lock()
        self._uploading = threading.Lock()

    def write(self, kind: str, line: str) -> None:
        with self._lock:
            self._waiting[kind].append(line)
            failure, self._failure = self._failure, None
            if self._timer is None:
                self._timer = threading.Timer(_EVERY_S, self._upload_in_time)
                self._timer.daemon = True
                self._timer.start()
        if failure is not None:
            raise failure

    def close(self) -> None:
        with self._lock:
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        self._upload()

    def _upload_in_time(self) -> None:
        with self._lock:
            self._timer = None
        try:
            self._upload()
        except Exception as failure:
            with self._lock:
                self._failure = failure

    def _upload(self) -> None:
        with self._uploading:
            for kind in (_USABLE, _UNUSABLE, _SET_ASIDE):
                with self._lock:
                    lines = self._waiting.pop(kind, [])
                if not lines:
                    continue
                try:
                    self._store.write(_new_name(self._folder, kind), "".join(lines).encode())
                except BaseException:
                    with self._lock:
                        self._waiting[kind] = lines + self._waiting[kind]
                    raise


def _new_name(folder: str, suffix: str) -> str:
    return f"{folder}/{uuid.uuid4().hex}{suffix}"
