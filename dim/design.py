"""The contract between who designs an edit and who paints it: a request in, a text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dim.errors import DesignerError

Reply = str | DesignerError
"""One answer text, or why there is none."""


@dataclass(frozen=True)
class DesignRequest:
    """What a designer is given: encoded images, and ``target`` only while data is made."""

    instruction: str
    image: bytes
    target: bytes | None = None


@dataclass(frozen=True)
class ReviewRequest:
    """What a reviewer is given: the wish, the plan that was painted from, and encoded images."""

    instruction: str
    plan: str
    image: bytes
    painted: bytes


class Designs(Protocol):
    """All that the painter asks of a designer; each of :mod:`dim.designers` does it."""

    def design(self, requests: Sequence[DesignRequest]) -> Sequence[Reply]:
        """One answer text (see :func:`dim.blueprint.parse_answer`) or error per request."""
        ...


@runtime_checkable
class Reviews(Protocol):
    """A designer that also looks at what was painted."""

    def review(self, requests: Sequence[ReviewRequest]) -> Sequence[Reply]:
        """One answer text (see :func:`dim.review.parse`) or error per request."""
        ...
