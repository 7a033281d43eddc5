"""Answers that were paid for: kept from the moment they arrive, so that no rerun pays again.

Files are only ever added to. On a local disk every worker appends lines to a file of its own; on an
object store, where nothing can be appended, the answers that arrived during one upload make the
next object. A line also says what the answer cost and which record it was for: together they are
the job's bill.

Answers that hold nothing (cut off, refused, empty) were paid for too. They lie in files of their
own, so that they can be set aside when a job is to try again what failed.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from queue import Empty, SimpleQueue
from typing import Any, TextIO

from dim.designers import Reply
from dim.designers.calls.usage import Answer, Unusable, Usage
from dim.records import sha256_hex
from infra.storage import Store

_FOLDER = "answers"
_USABLE, _UNUSABLE, _SET_ASIDE = ".jsonl", ".unusable", ".set-aside"
_READERS = 16  # an object store answers each in its own time


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


class Answers:
    """The answers of one job, as one worker reads and writes them; safe for many threads.

    Texts wait in a temporary file and not in memory.

    Args:
        store: the job's output folder; answers lie in its ``answers/``.

    Raises:
        StorageError: the folder cannot be read; from :meth:`add`, written.
    """

    def __init__(self, store: Store) -> None:
        self._index = _Index()
        self._index.add(entry for entry in read_entries(store) if entry.reply is not None)
        writer = _LineWriter if store.is_local else _ObjectWriter
        self._writers = {end: writer(store, end) for end in (_USABLE, _UNUSABLE, _SET_ASIDE)}

    def get(self, key: str) -> Reply | None:
        """A stored answer; one that holds nothing is the error that it was."""
        return self._index.get(key)

    def add(self, key: str, reply: str | Unusable, record: str = "") -> None:
        """Store an answer; when this returns, a killed process does not lose it.

        One that holds nothing and might hold something next time is only put on the bill.
        """
        usage = reply.usage if isinstance(reply, Answer | Unusable) else None
        entry = Entry(key, reply, usage, record)
        kind = _USABLE
        if isinstance(reply, Unusable):
            kind = _UNUSABLE if reply.final else _SET_ASIDE
        self._writers[kind].write(_line(entry))
        if kind != _SET_ASIDE:
            self._index.add([entry])


def read_entries(store: Store) -> Iterator[Entry]:
    """Everything that was ever answered to a job, with what it cost.

    Raises:
        StorageError: the folder cannot be read.
    """
    names = [name for name, _ in store.list(_FOLDER)]
    with ThreadPoolExecutor(_READERS) as pool:
        for first in range(0, len(names), _READERS):
            some = names[first : first + _READERS]
            for name, data in zip(some, pool.map(store.read, some), strict=True):
                yield from _entries(data, set_aside=name.endswith(_SET_ASIDE))


def set_unusable_aside(store: Store) -> None:
    """Have asked again what was answered with nothing; it stays on the bill.

    Raises:
        StorageError: the folder cannot be changed.
    """
    for name, _ in store.list(_FOLDER, suffix=_UNUSABLE):
        store.move(name, name.removesuffix(_UNUSABLE) + _SET_ASIDE)


def _line(entry: Entry) -> str:
    content: dict[str, Any] = {"key": entry.key}
    content["error" if isinstance(entry.reply, Unusable) else "answer"] = str(entry.reply)
    if entry.record:
        content["record"] = entry.record
    if entry.usage is not None:
        content["usage"] = asdict(entry.usage)
    return json.dumps(content) + "\n"


def _entries(data: bytes, *, set_aside: bool) -> Iterator[Entry]:
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


class _Index:
    """Replies by key, in a temporary file that goes with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # An empty name is SQLite's own temporary file; it holds a few pages of it in memory.
        self._table = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        self._table.execute(
            "CREATE TABLE replies (key TEXT PRIMARY KEY, usable INTEGER, text TEXT) WITHOUT ROWID"
        )

    def add(self, entries: Iterable[Entry]) -> None:
        """Remember replies; of two with the same key a usable one is kept."""
        rows = ((e.key, not isinstance(e.reply, Unusable), str(e.reply)) for e in entries)
        with self._lock:
            self._table.executemany(
                "INSERT INTO replies VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                "usable = excluded.usable, text = excluded.text WHERE excluded.usable",
                rows,
            )

    def get(self, key: str) -> Reply | None:
        """The reply of a key, if there is one."""
        with self._lock:
            found = self._table.execute(
                "SELECT usable, text FROM replies WHERE key = ?", (key,)
            ).fetchone()
        if found is None:
            return None
        usable, text = found
        return text if usable else Unusable(text, Usage(0, 0, 0.0, 0.0))


class _LineWriter:
    """Appends to one file; a line handed to the operating system outlives the process."""

    def __init__(self, store: Store, suffix: str) -> None:
        self._store = store
        self._suffix = suffix
        self._file: TextIO | None = None
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        with self._lock:
            if self._file is None:
                self._file = self._store.open_append(_new_name(self._suffix))
            self._file.write(line)
            self._file.flush()


class _ObjectWriter:
    """Group commit: whoever comes while an upload runs shares the next one."""

    def __init__(self, store: Store, suffix: str) -> None:
        self._store = store
        self._suffix = suffix
        self._waiting: SimpleQueue[tuple[str, threading.Event]] = SimpleQueue()
        self._uploading = threading.Lock()

    def write(self, line: str) -> None:
        stored = threading.Event()
        self._waiting.put((line, stored))
        while not stored.is_set():
            with self._uploading:
                if not stored.is_set():
                    self._upload(list(self._drain()))

    def _drain(self) -> Iterator[tuple[str, threading.Event]]:
        while True:
            try:
                yield self._waiting.get_nowait()
            except Empty:
                return

    def _upload(self, group: list[tuple[str, threading.Event]]) -> None:
        text = "".join(line for line, _ in group)
        try:
            self._store.write(_new_name(self._suffix), text.encode())
        except Exception:
            for waiting in group:  # each of those who wait tries for itself
                self._waiting.put(waiting)
            raise
        for _, stored in group:
            stored.set()


def _new_name(suffix: str) -> str:
    return f"{_FOLDER}/{uuid.uuid4().hex}{suffix}"
