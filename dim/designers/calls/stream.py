"""An answer that a server streams: a completion put together from events as they arrive."""

from __future__ import annotations

import json
from typing import Any

from dim.designers.calls.wire import (
    Completion,
    NotACompletion,
    completion_of,
    says_now,
    shorten,
)

EVENT_STREAM = "text/event-stream"

_END = "[DONE]"
_MOST_BYTES = 16 << 20  # of an answer; a server that writes on for ever is stopped


class StreamedCompletion:
    """What has come so far of one completion, in the events of OpenAI's streams.

    Of the lines of server-sent events only ``data`` counts, as in these streams each is a whole
    JSON object. A message's parts arrive one after the other, texts in pieces.
    """

    def __init__(self) -> None:
        self._line, self._received = b"", 0
        self._message: dict[str, Any] = {}
        self._finished: object = None
        self._usage: object = None
        self._ended = False

    @property
    def text(self) -> str:
        """What the model has said until now."""
        return says_now(self._message)

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the response.

        Raises:
            NotACompletion: they are no such events, or there is no end to them.
            ServerSays: an event is an error.
        """
        self._received += len(data)
        if self._received > _MOST_BYTES:
            raise NotACompletion(f"the answer has more than {_MOST_BYTES:,} bytes")
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._take(line.strip())

    def end(self) -> Completion:
        """The completion, when the response has ended; errors as of ``feed``."""
        self._take(self._line.strip())
        if not self._ended and self._finished is None:
            raise NotACompletion("broke the answer off in the middle of its stream")
        choice = {"message": self._message, "finish_reason": self._finished}
        return completion_of({"choices": [choice], "usage": self._usage})

    def _take(self, line: bytes) -> None:
        if not line.startswith(b"data:"):
            return
        said = line.removeprefix(b"data:").strip()
        if said == _END.encode():
            self._ended = True
            return
        try:
            event = json.loads(said)
        except (ValueError, RecursionError):
            raise NotACompletion(f"the stream cannot be read ({shorten(said)})") from None
        if not isinstance(event, dict):
            raise NotACompletion(f"streams something that is no completion ({shorten(said)})")
        self._usage = event.get("usage") or self._usage
        choices = event.get("choices")
        if event.get("error") and not choices:
            completion_of(event)  # raises what it says
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and not choice.get("index"):
                self._add(choice)

    def _add(self, choice: dict[str, Any]) -> None:
        self._finished = choice.get("finish_reason") or self._finished
        # A server that does not stream this answer after all sends its message whole.
        delta = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        for name, piece in delta.items() if isinstance(delta, dict) else ():
            before: Any = self._message.get(name)
            grows = isinstance(piece, str | list) and type(piece) is type(before)
            if piece is not None:
                self._message[name] = before + piece if grows else piece
