"""JSON values one after another: where each lies in a file, which is never in memory as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dim.errors import InputError

_SPACE = re.compile(r"[ \t\n\r\x1e]*")
_AT_ONCE = 1 << 20
_LONGEST = 256 << 20  # bytes of one value
_NEAR = 16  # characters; an error so near to the end may be that of a value cut short


class Member(NamedTuple):
    """A key of an object, and its value: where it begins, and the value itself unless it is a list.

    ``items`` is the number of things in a list, ``objects`` whether all of them are objects.
    """

    key: str
    offset: int
    value: Any
    items: int | None = None
    objects: bool = False


class Walk:
    """A walk over the values in a text.

    The text is read as Latin-1, in which a character is a byte and JSON's signs are its own, also
    in UTF-8: so places are those of bytes. The values' texts have to be decoded for themselves.

    Args:
        read: gives the next bytes, at most so many, and none at the end.
    """

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._text, self._at, self._base = "", 0, 0
        self._ended = False
        self._decoder = json.JSONDecoder()

    @property
    def offset(self) -> int:
        """The byte where the walk stands."""
        return self._base + self._at

    def skip(self, offset: int) -> None:
        """Go forward to a byte."""
        while self.offset < offset and (self._at < len(self._text) or self._more()):
            self._at = min(offset - self._base, len(self._text))

    def peek(self) -> str:
        """The next sign that is not space; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self._at = found.end() if found else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, sign: str) -> bool:
        """Step over the next sign if it is this one."""
        if self.peek() != sign:
            return False
        self._at += 1
        return True

    def value(self) -> tuple[int, str, Any]:
        """The next value: its offset, its text in Latin-1, and what it says (texts in Latin-1).

        Raises:
            InputError: there is none.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:
                    offset, text = self.offset, self._text[self._at : end]
                    self._at = end
                    return offset, text, value
            except json.JSONDecodeError as error:
                if self._ended or not _may_go_on(error):
                    place = self._base + error.pos
                    raise InputError(f"not JSON ({error.msg}: byte {place})") from None
            except (ValueError, RecursionError) as error:
                raise InputError(f"not JSON ({error})") from None
            if len(self._text) - self._at > _LONGEST:
                raise InputError(f"not JSON: a value of over {_LONGEST:,} bytes")
            self._more()

    def members(self) -> Iterator[Member]:
        """The keys of the object that begins here.

        Raises:
            InputError: it is no JSON.
        """
        self.take("{")
        while not self.take("}"):
            _, _, key = self.value()
            if not isinstance(key, str) or not self.take(":"):
                raise InputError(f"not JSON (byte {self.offset})")
            yield self._member(key.encode("latin-1", "replace").decode("utf-8", "replace"))
            if not self.take(",") and self.peek() != "}":
                raise InputError(f"not JSON (byte {self.offset})")

    def _member(self, key: str) -> Member:
        if self.peek() != "[":
            offset, _, value = self.value()
            return Member(key, offset, value)
        offset, count, objects = self.offset, 0, True
        for _, _, value in self.items():
            count += 1
            objects = objects and isinstance(value, dict)
        return Member(key, offset, None, count, objects and count > 0)

    def items(self) -> Iterator[tuple[int, str, Any]]:
        """The values of the list that begins here; or all to the end, where none does.

        Raises:
            InputError: one of them is no JSON, or the list does not end.
        """
        if not self.take("["):
            yield from self.values()
            return
        while not self.take("]"):
            if not self.peek():
                raise InputError("not JSON: its list does not end")
            yield self.value()
            if not self.take(",") and self.peek() not in ("]", ""):
                raise InputError(f"not JSON: no comma at byte {self.offset}")

    def values(self) -> Iterator[tuple[int, str, Any]]:
        """All values to the end, with commas between them or without.

        Raises:
            InputError: one of them is no JSON.
        """
        while self.peek():
            yield self.value()
            self.take(",")

    def _more(self) -> bool:
        """Read on; what was passed is forgotten."""
        rest = self._text[self._at :]
        data = self._read(max(_AT_ONCE, len(rest)))
        self._base += self._at
        self._text, self._at = rest + data.decode("latin-1"), 0
        self._ended = not data
        return bool(data)


def _may_go_on(error: json.JSONDecodeError) -> bool:
    """Whether a text that is cut short can raise this."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - _NEAR
