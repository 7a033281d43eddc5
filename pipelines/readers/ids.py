"""Ids: what a record is called, whatever its id is, and short names of files that stay apart."""

from __future__ import annotations

import datetime
import math
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from dim import records
from dim.errors import InputError
from pipelines.readers.layout import Layout

_PLAIN = (bool, int, uuid.UUID, datetime.date, datetime.time, datetime.timedelta)


def as_text(value: Any) -> str | None:
    """An id or a key as text, or ``None`` where there is none: null, NaN, empty.

    A whole number is one however it was stored, so 101.0 is ``101``. A list or an object with one
    value in it (``{"$oid": …}``) stands for that value.

    Raises:
        InputError: it is several values, or of a type that names nothing.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple | dict):
        return _only(value)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return records.clean_text(value)
    if isinstance(value, _PLAIN):
        return str(value)
    if isinstance(value, float | Decimal):
        return _number(value)
    if isinstance(value, bytes | bytearray | memoryview):
        try:
            return bytes(value).decode() or None
        except UnicodeDecodeError:
            return bytes(value).hex()
    raise InputError(f"an id must be a text or a number, not {type(value).__name__}")


def _only(value: list[Any] | tuple[Any, ...] | dict[str, Any]) -> str | None:
    inner = list(value.values()) if isinstance(value, dict) else list(value)
    known = [item for item in inner if item is not None]
    if len(known) > 1:
        raise InputError(f"an id must be one value, not {type(value).__name__} of {len(known)}")
    return as_text(known[0]) if known else None


def _number(value: float | Decimal) -> str | None:
    if math.isnan(value):
        return None
    if math.isinf(value):
        return str(value)
    if value == int(value):
        return str(int(value))
    return repr(value) if isinstance(value, float) else format(value.normalize(), "f")


def id_of(values: Mapping[str, Any], layout: Layout) -> str | None:
    """What a record's columns call it, if they do.

    Raises:
        InputError: one of them holds what cannot be an id; the message names it.
    """
    parts = []
    for name in layout.id:
        try:
            parts.append(as_text(values.get(name)))
        except InputError as error:
            raise InputError(f"{name!r}: {error}") from None
    known = [part for part in parts if part is not None]
    return "-".join(known) if known and len(known) == len(parts) else None


def apart(names: Sequence[str], short: Callable[[str], str]) -> dict[str, str]:
    """What to call those of ``names`` whose short form is not theirs alone.

    They go by their whole name. All others, which are nearly all, keep ``short(name)``.
    """
    hashes = np.fromiter((hash(short(name)) for name in names), np.int64, len(names))
    values, counts = np.unique(hashes, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return {}
    shared = [name for name, found in zip(names, hashes.tolist(), strict=True) if found in suspects]
    often = Counter(map(short, shared))
    alike = [name for name in shared if often[short(name)] > 1]
    taken: set[str] = set()
    if not set(alike).isdisjoint(map(short, names)):  # cat.jpg beside cat.jpg.png
        taken.update(map(short, names))
    chosen: dict[str, str] = {}
    for name in alike:
        called = name
        while called in taken:
            called += "#"
        taken.add(called)
        chosen[name] = called
    return chosen
