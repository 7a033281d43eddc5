"""Answers that were paid for: kept from the moment they arrive, so that no rerun pays again.

Files are only ever added to. On a local disk every worker appends lines to a file of its own; on an
object store, where nothing can be appended, the answers that arrived during one upload make the
next object.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import TextIO

from dim.records import sha256_hex
from infra.storage import Store

_FOLDER = "answers"


def answer_key(*parts: str | None) -> str:
    """The key of an answer: a hash over exactly what changes it (designer, prompt, images, …)."""
    return sha256_hex(json.dumps(parts).encode())


class Answers:
    """The answers of one job, as one worker reads and writes them.

    Args:
        store: the job's output folder; answers lie in its ``answers/``.

    Raises:
        StorageError: the folder cannot be read; from :meth:`add`, written.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known = dict(_read_all(store))
        self._writer = _LineWriter(store) if store.is_local else _ObjectWriter(store)

    def get(self, key: str) -> str | None:
        """A stored answer."""
        return self._known.get(key)

    def add(self, key: str, answer: str) -> None:
        """Store an answer; when this returns, a killed process does not lose it."""
        self._known[key] = answer
        self._writer.write(json.dumps({"key": key, "answer": answer}) + "\n")


def _read_all(store: Store) -> Iterator[tuple[str, str]]:
    for name, _ in store.list(_FOLDER, suffix=".jsonl"):
        for line in store.read(name).decode("utf-8", "replace").splitlines():
            try:
                entry = json.loads(line)
                yield entry["key"], entry["answer"]
            except (ValueError, KeyError, TypeError):
                continue  # the line that a killed worker was writing


def _new_name() -> str:
    return f"{_FOLDER}/{uuid.uuid4().hex}.jsonl"


class _LineWriter:
    """Appends to one file; a line handed to the operating system outlives the process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._file: TextIO | None = None
        self._lock = threading.Lock()

    def write(self, line: str) -> None:
        with self._lock:
            if self._file is None:
                self._file = self._store.open_append(_new_name())
            self._file.write(line)
            self._file.flush()


class _ObjectWriter:
    """Group commit: whoever comes while an upload runs shares the next one."""

    def __init__(self, store: Store) -> None:
        self._store = store
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
        self._store.write(_new_name(), "".join(line for line, _ in group).encode())
        for _, stored in group:
            stored.set()
