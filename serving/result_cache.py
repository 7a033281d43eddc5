"""Answers that are given again: a request with a seed has one result, whoever asks for it."""

from __future__ import annotations

from collections import OrderedDict

from serving.background import fingerprint
from serving.protocol import EditFields, PaintRequest
from serving.requests import Design, Edit

HEADER = "X-Cache"


class ResultCache:
    """Answers as JSON, of which those go first that nobody asked for the longest.

    Args:
        most_bytes: of all answers together; 0 keeps none.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, bytes] = OrderedDict()

    def key(self, asked: Edit | PaintRequest | Design, release: str) -> str | None:
        """The name of a request's answer by a model; ``None`` where it is not kept.

        Without a seed each answer is another, a stream tells more than an answer, a URL ends, and
        what may be kept for training has a name of its own.
        """
        if isinstance(asked, Design) or not self._most_bytes:
            return None
        wanted = asked.fields if isinstance(asked, Edit) else asked
        if wanted.seed is None or wanted.stream or wanted.response_format == "url":
            return None
        if isinstance(wanted, EditFields) and wanted.consent:
            return None
        pictures = asked.pictures if isinstance(asked, Edit) else ()
        return f"{release} {type(asked).__name__} {fingerprint(wanted, *pictures)}"

    def get(self, key: str | None) -> bytes | None:
        """The answer that was kept, if it still is."""
        if key is None or key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: str | None, answer: bytes) -> None:
        """Keep an answer, unless it is larger than all of them may be."""
        if key is None or len(answer) > self._most_bytes:
            return
        self._bytes += len(answer) - len(self._kept.pop(key, b""))
        self._kept[key] = answer
        while self._bytes > self._most_bytes:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= len(dropped)
