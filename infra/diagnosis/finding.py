"""What was found of one thing, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How it stands."""

    OK = "ok"
    WARNING = "warning"
    """It works, and may not when more is asked of it."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """Not looked at: nobody said where, or what it needs has failed."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        check: what was looked at.
        status: how it stands.
        said: what was found.
        advice: what to do; empty where nothing is to be done.
        node: the node's address, where a cluster was looked at.
    """

    check: str
    status: Status
    said: str
    advice: str = ""
    node: str = ""
