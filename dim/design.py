"""The contract between who designs an edit and who paints it: a request in, a text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dim.errors import DesignerError

Reply = str | DesignerError
"""One answer text, or why there is none."""


@dataclass(frozen=True)
class DesignRequest:
    """What a designer is given: encoded images, and ``target`` only while data is made."""

    instruction: str
    image: bytes
    target: bytes | None = None


class Designs(Protocol):
    """All that the painter asks of a designer; each of :mod:`dim.designers` does it."""

    def design(self, requests: Sequence[DesignRequest]) -> Sequence[Reply]:
        """One answer text (see :func:`dim.blueprint.parse_answer`) or error per request."""
        ...
