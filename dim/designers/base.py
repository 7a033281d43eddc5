"""What every designer and captioner is: many requests in, one answer or error each, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dim.config import StrictModel
from dim.errors import DesignerError

Reply = str | DesignerError
"""One answer text, or why there is none."""

OnAnswer = Callable[[int, str], None]
"""Called with (place of the request, answer text) the moment an answer arrives, from any thread."""


@dataclass(frozen=True)
class DesignRequest:
    """What a designer is given: encoded images, and ``target`` only while data is made."""

    instruction: str
    image: bytes
    target: bytes | None = None


class Designer(Protocol):
    """Writes blueprints."""

    name: str
    """What the records say wrote them."""

    fingerprint: str
    """Name and everything else about this designer that changes its answers."""

    costly: bool
    """Whether an answer is worth keeping, because it costs money."""

    def design(
        self, requests: Sequence[DesignRequest], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        """One answer text (see :func:`dim.blueprint.parse_answer`) or error per request.

        A bad request never raises and never touches its neighbours.
        """
        ...


class Captioner(Protocol):
    """Writes long captions; attributes as of :class:`Designer`."""

    name: str
    fingerprint: str
    costly: bool

    def caption(self, images: Sequence[bytes], *, on_answer: OnAnswer | None = None) -> list[Reply]:
        """One caption text or error per encoded image; never raises for one of them."""
        ...


class CallOptions(StrictModel):
    """How a vision-language model is called over HTTP."""

    in_flight: int = 64
    """Requests open at once, per worker."""
    timeout_s: float = 120.0
    """For one attempt, from sending to the last byte."""
    retries: int = 6
    """Further attempts after 408, 409, 429, 5xx or a broken connection, with growing pauses."""
    max_tokens: int = 2048
    temperature: float = 0.0


def answer_each(
    requests: Sequence[DesignRequest],
    answer: Callable[[DesignRequest], str],
    on_answer: OnAnswer | None,
) -> list[Reply]:
    """Answer requests one by one with a function that may raise; an error stays with its own."""
    replies: list[Reply] = []
    for place, request in enumerate(requests):
        try:
            reply: Reply = answer(request)
        except DesignerError as error:
            reply = error
        except Exception as error:  # whatever one record does, its neighbours must get answers
            reply = DesignerError(" ".join(str(error).split()) or type(error).__name__)
        if on_answer is not None and isinstance(reply, str):
            on_answer(place, reply)
        replies.append(reply)
    return replies
