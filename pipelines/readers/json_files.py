"""JSON files: whether one holds a record a line, a list of them, or records over many lines."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping

from dim.errors import InputError
from infra.storage import Store
from pipelines.readers import compression
from pipelines.readers.bounds import READ_AHEAD
from pipelines.readers.compression import Layers
from pipelines.readers.json_values import Member, Walk
from pipelines.readers.layout import Layout
from pipelines.readers.names import shown

_BOM = b"\xef\xbb\xbf"
_LONGEST_LINE = 256 << 20  # bytes; whatever is longer is no line
_HEAD = 1 << 20  # bytes that are searched for a line that is an object


Text = tuple[int | None, int, int, bytes]
"""One record of a JSON file: its number (of a line, or ``None``), where it lies, where the next one
may begin, and what it says."""


class JsonFile:
    """A JSON file, read once from its beginning to its end.

    Args:
        store: the file's folder.
        name: the file.
        layers: what it has to be put through, if it is compressed.
        layout: which columns hold what; tells one record from an object around a list of them.

    Attributes:
        in_lines: whether each line is a record.
        digest: of what was read so far.

    Raises:
        InputError: it is no JSON, or several things at once; the message says what to do.
    """

    def __init__(self, store: Store, name: str, layers: Layers, layout: Layout) -> None:
        self._store, self._name, self._layers = store, name, layers
        self.where = store.address(name)
        self.digest = hashlib.sha256()
        self._wrapped = False
        try:
            begin = self._begin(layout)
        except OSError as error:
            raise InputError(f"{self.where} is damaged: {error}") from None
        self.in_lines, self._start = begin is None, begin or 0

    def records(self) -> Iterator[Text]:
        """Its records, or what stands in their places, in order.

        Raises:
            InputError: the file is damaged, or a list in it is.
        """
        try:
            with self._open() as file:
                yield from self._lines(file) if self.in_lines else self._values(file)
        except OSError as error:
            raise InputError(f"{self.where} is damaged: {error}") from None

    def _open(self) -> io.BufferedReader:
        raw = compression.open_input(self._store, self._name, self._layers)
        return io.BufferedReader(raw, READ_AHEAD)

    def _lines(self, file: io.BufferedReader) -> Iterator[Text]:
        start = 0
        for number, line in enumerate(file, start=1):
            self.digest.update(line)
            if line.strip():
                yield number, start, start + len(line), line
            start += len(line)

    def _values(self, file: io.BufferedReader) -> Iterator[Text]:
        def read(size: int) -> bytes:
            data = file.read(size)
            self.digest.update(data)
            return data

        walk = Walk(read)
        walk.skip(self._start)
        try:
            for start, text, _ in walk.items():
                yield None, start, walk.offset, text.encode("latin-1")
            if not self._wrapped and walk.peek():
                raise InputError(f"not JSON: more than its list, from byte {walk.offset} on")
        except InputError as error:
            raise InputError(f"{self.where} is {error}") from None
        while read(READ_AHEAD):
            pass

    def _begin(self, layout: Layout) -> int | None:
        """Where the values begin that are the records; ``None`` if each line is one."""
        with self._open() as file:
            start, line, whole = _first_line(file)
            follows = _next_sign(file) if whole else b""
            sign = line[:1]
            if not sign:
                raise InputError(f"{self.where} is empty")
            if sign == b"[":
                in_lines = follows in (b"{", b"[") and whole and _is_json(line)
                return None if in_lines else start
            if sign != b"{":
                if follows == b"{" or (whole and _has_object_line(file)):
                    return None
                beginning = line[:200].decode("utf-8", "replace").strip()
                raise InputError(
                    f"{self.where} is no JSON: it begins with {shown(beginning)!r}; write a "
                    "JSON object a line, or a list of them"
                )
            in_line = whole and _is_json(line)
            if in_line and follows not in (b"", b","):
                return None
        begin = self._object(start, layout)
        return None if in_line and not follows and begin == start else begin

    def _object(self, start: int, layout: Layout) -> int | None:
        """The same of a file whose first line is not all of its first object, or all of it."""
        with self._open() as file:
            walk = Walk(file.read)
            walk.skip(start)
            try:
                members = list(walk.members())
            except InputError as error:
                return self._broken(start, error)
            if walk.peek():
                return start  # several objects, over any lines
        found = {member.key: member for member in members}
        if all(any(name in found for name in names) for names in layout.required):
            self._check_rows(found, layout)
            return start
        lists = [member for member in members if member.objects]
        if len(lists) > 1:
            names = ", ".join(shown(member.key) for member in lists[:5])
            raise InputError(
                f"{self.where} is one object with several lists of records, {names}: write the one "
                f"that is meant as a file of its own (jq -c '.{shown(lists[0].key)}[]')"
            )
        if lists:
            self._wrapped = True
            return lists[0].offset
        if len(members) > 1 and all(isinstance(member.value, dict) for member in members):
            raise InputError(
                f"{self.where} is one object with {len(members):,} objects in it: write them one a "
                "line (jq -c '.[]')"
            )
        return start

    def _broken(self, start: int, error: InputError) -> int | None:
        """A broken first record is one among lines if there are others, or it is all there is."""
        with self._open() as file:
            file.seek(start)
            file.readline(_LONGEST_LINE)
            if not _next_sign(file) or _has_object_line(file):
                return None
        raise InputError(f"{self.where} is {error}")

    def _check_rows(self, found: Mapping[str, Member], layout: Layout) -> None:
        """Refuse a table that is written by columns."""
        chosen = [next(found[name] for name in names if name in found) for names in layout.required]
        if all(member.items is not None and member.items != 1 for member in chosen) or any(
            isinstance(member.value, dict) and all(key.isdigit() for key in member.value)
            for member in chosen
            if member.value
        ):
            raise InputError(
                f"{self.where} is a table by columns: write an object a line "
                "(to_json(orient='records', lines=True) of pandas)"
            )


def _first_line(file: io.BufferedReader) -> tuple[int, bytes, bool]:
    """The first line that is not blank: where it begins, its text, and whether that is all."""
    start = 0
    while True:
        line = file.readline(_LONGEST_LINE)
        text = line.removeprefix(_BOM) if not start else line
        sign = len(line) - len(text.lstrip())
        if text.strip() or not line:
            return start + sign, line[sign:], len(line) < _LONGEST_LINE
        start += len(line)


def _next_sign(file: io.BufferedReader) -> bytes:
    """The next byte that is not space, without going past it; b"" at the end."""
    while True:
        ahead = file.peek(1)
        if not ahead or ahead.lstrip():
            file.read(len(ahead) - len(ahead.lstrip()))
            return ahead.lstrip()[:1]
        file.read(len(ahead))


def _has_object_line(file: io.BufferedReader) -> bool:
    """Whether one of the next lines is an object by itself."""
    lines = file.read(_HEAD).split(b"\n")
    return any(line.lstrip().startswith(b"{") and _is_json(line) for line in lines)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
