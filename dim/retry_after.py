"""When a busy server wants to be asked again: the header ``Retry-After``, whoever sent it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

LONGEST_S = 366 * 86_400.0
"""Longer pauses count as this one: a number that can be added to a clock."""

_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*", re.ASCII)


def retry_after_s(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds until a server wants to be asked again, at most ``LONGEST_S``; None if it says none.

    Args:
        headers: of its answer: ``Retry-After`` in seconds or as a date (RFC 9110, 10.2.3), or
            ``Retry-After-Ms``, as OpenAI sends it. A date that has passed is 0. What is neither,
            a negative number too, says nothing.
        now: seconds since 1970, what a date is compared with; None: this machine's clock.
    """
    milliseconds = _number(headers.get("Retry-After-Ms"))
    if milliseconds is not None:
        return min(milliseconds / 1000, LONGEST_S)
    value = headers.get("Retry-After")
    seconds = _number(value)
    if seconds is None and value is not None:
        seconds = _until(value, time.time() if now is None else now)
    return None if seconds is None else min(seconds, LONGEST_S)


def _number(text: str | None) -> float | None:
    found = _NUMBER.fullmatch(text or "")
    return float(found[1]) if found else None  # of too many digits it is infinity


def _until(date: str, now: float) -> float | None:
    try:
        found = parsedate_to_datetime(date)
        # Dates of HTTP are GMT, also in the form that does not say so.
        moment = found if found.tzinfo else found.replace(tzinfo=UTC)
        return max(0.0, moment.timestamp() - now)
    except (ValueError, OverflowError):
        return None
