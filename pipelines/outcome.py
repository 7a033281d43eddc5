"""Every record travels with its outcome, so that one pass yields kept, rejected and failed.

A stage works on the records that are still kept, and marks the others instead of dropping them.
Marked records lose their images on the spot: only what is needed to account for them flows on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pyarrow as pa

from dim import records
from dim.redaction import redact
from infra.logs import log

KEPT, REJECTED, FAILED = "kept", "rejected", "failed"
OUTCOMES = (KEPT, REJECTED, FAILED)

Row = dict[str, Any]
ResultT = TypeVar("ResultT")

IMAGES = ("image", "image_target")
"""The columns that hold pictures."""

_LONGEST = 2_000  # characters of an error or a detail

_VERDICT = pa.schema(
    [
        pa.field("outcome", pa.string()),
        *(records.REJECT.field(name) for name in ("detail", "value", "threshold")),
        pa.field("reason", pa.string()),
        pa.field("stage", pa.string()),
        pa.field("error", pa.string()),
        records.REJECT.field("measures"),
    ]
)


class Rejection(Exception):
    """Raised by a rule to drop a record.

    Args:
        reason: the code, such as ``pair.ssim_low``.
        detail: one sentence for a person.
        value: what was measured, where the rule has a number.
        threshold: the limit it misses.
    """

    def __init__(
        self, reason: str, detail: str, value: float | None = None, threshold: float | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.value = value
        self.threshold = threshold


def travelling(schema: pa.Schema) -> pa.Schema:
    """``schema`` with the columns that carry a record's outcome, none of them required."""
    fields = [field.with_nullable(True) for field in schema]
    return pa.schema([*fields, *(field for field in _VERDICT if field.name not in schema.names)])


def to_table(rows: Iterable[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table of ``travelling(schema)``; a row without an outcome is kept."""
    rows = [{"outcome": KEPT, **row} for row in rows]
    return pa.Table.from_pylist(rows, schema=travelling(schema))


def to_rows(table: pa.Table) -> list[Row]:
    """The records of a batch; fresh from a file they are all kept."""
    return [{"outcome": KEPT, **row} for row in table.to_pylist()]


def kept(rows: Iterable[Row]) -> list[Row]:
    """Those that no earlier stage took out."""
    return [row for row in rows if row["outcome"] == KEPT]


def reject(row: Row, rejection: Rejection) -> None:
    """Mark ``row`` as dropped by a rule."""
    _take_out(row, REJECTED)
    row.update(
        reason=rejection.reason,
        detail=_short(redact(rejection.detail)),
        value=rejection.value,
        threshold=rejection.threshold,
    )


def fail(row: Row, stage: str, error: BaseException | str) -> None:
    """Mark ``row`` as one on which ``stage`` could not do its work."""
    _take_out(row, FAILED)
    text = " ".join(str(error).split()) or type(error).__name__
    row.update(stage=stage, error=_short(records.clean_text(redact(text))))
    log("record failed", stage=stage, record=row.get("id"), error=row["error"])


def failed(table: pa.Table, stage: str, error: BaseException | str) -> list[Row]:
    """Records of which none could be worked on."""
    rows = to_rows(table)
    for row in kept(rows):
        fail(row, stage, error)
    return rows


def work_on(rows: Iterable[Row], stage: str, work: Callable[[Row], Row | None]) -> None:
    """Do ``work`` on every kept row; what it returns is added to the row.

    A :class:`Rejection` it raises drops that row; anything else it raises fails that row.
    """
    for row in kept(rows):
        try:
            row.update(work(row) or {})
        except Rejection as rejection:
            reject(row, rejection)
        except Exception as error:  # one record must not end a job of millions
            fail(row, stage, error)


def settle(
    rows: Iterable[Row],
    stage: str,
    results: Iterable[ResultT | Exception],
    take: Callable[[Row, ResultT], Row | None],
) -> None:
    """The same with a result for every kept row, in order; one that is an error is raised.

    Args:
        take: what to add to a row, from the row and its result.
    """
    waiting = iter(results)

    def work(row: Row) -> Row | None:
        result = next(waiting)
        if isinstance(result, Exception):
            raise result
        return take(row, result)

    work_on(rows, stage, work)


def _short(text: str) -> str:
    """A sentence that quotes what a record holds, whatever that is, is not stored in full."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def _take_out(row: Row, outcome: str) -> None:
    row["outcome"] = outcome
    for name in IMAGES:
        if name in row:
            row[name] = None
