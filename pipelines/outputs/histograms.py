"""How what was measured of records is spread: counted where they are written, drawn to look at.

Values are counted by their first two digits, whole numbers below 10,000 by all of theirs (a side of
512 pixels is not one of 510). So counts of any parts of an output can be added, and however many
records there are, a measure takes at most 180 of them for each power of ten that its values cover,
or as many as there are sides of pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import AfterValidator, Field

from pipelines.limits import LIMITS, limits_of

BINS = 40
WIDTH, HEIGHT = 420, 120  # of a drawing, in pixels

COLUMNS = ("measures", "reason", "value", "threshold")
"""The columns that are counted."""

_WHOLE = 10_000
_MOST = 1e100
_LOG_FROM = 100.0  # a measure whose largest value is so many times its smallest is drawn by its log
_KEPT, _BY_THIS, _BY_OTHERS = "kept", "rejected by this filter", "rejected by another"


def _check_number(text: str) -> str:
    """What a manifest of others says is drawn, too."""
    if not abs(float(text)) < _MOST:
        raise ValueError(f"{text!r} is not a number below {_MOST:g}")
    return text


_Number = Annotated[str, AfterValidator(_check_number)]
_Rows = Annotated[int, Field(ge=0)]
Counts = dict[str, dict[str, dict[_Number, _Rows]]]
"""Records by measure (or by the reason code, where only rejected ones have a value), by what became
of them, and by the value, as a decimal number."""

_Values = tuple[str, str, NDArray[np.float64]]
"""A measure, what became of the records, and their values."""


def count(part: pa.Table) -> Counts:
    """Records of an output: kept ones, or rejected ones, which have a ``reason``."""
    part = part.select([name for name in COLUMNS if name in part.schema.names]).combine_chunks()
    names = part.schema.names
    reasons = np.array(part["reason"].to_pylist() if "reason" in names else [""] * part.num_rows)
    counts: Counts = {}
    for name, series, values in [
        *(_measured(part["measures"].chunks, reasons) if "measures" in names else ()),
        *(_unmeasured(part, reasons) if "reason" in names else ()),
    ]:
        own = counts.setdefault(name, {}).setdefault(series, {})
        for value, rows in zip(*np.unique(values, return_counts=True), strict=True):
            text = _text(value)
            own[text] = own.get(text, 0) + int(rows)
    return counts


def _text(value: float) -> str:
    whole = abs(value) < _WHOLE and value == int(value)
    return f"{value:.0f}" if whole else f"{float(f'{value:.2g}'):g}"


def add(total: Counts, more: Counts) -> None:
    """Count ``more`` in ``total`` as well."""
    for name, by_series in more.items():
        for series, counts in by_series.items():
            own = total.setdefault(name, {}).setdefault(series, {})
            for text, rows in counts.items():
                own[text] = own.get(text, 0) + rows


def in_order(counts: Counts) -> Counts:
    """The same in an order that does not tell which part was counted first."""
    return {
        name: {
            series: dict(sorted(own.items(), key=lambda item: float(item[0])))
            for series, own in sorted(by_series.items())
        }
        for name, by_series in sorted(counts.items())
    }


@dataclass(frozen=True)
class Histogram:
    """Values of one measure.

    Attributes:
        name: of the measure, or the reason code where only rejected records have a value.
        edges: (BINS + 1,) bounds of the bars.
        series: records in each bar (BINS,) by what became of them; in parts where values of the
            same two digits belong to several.
        limits: the thresholds, by what they are called.
        log: whether the bars are equally wide in the logarithm.
    """

    name: str
    edges: NDArray[np.float64]
    series: dict[str, NDArray[np.float64]]
    limits: dict[str, float]
    log: bool

    def place(self, value: float) -> float:
        """Where ``value`` lies between the first edge (0) and the last (1)."""
        scale = np.log if self.log else np.asarray
        low, high, here = (float(scale(v)) for v in (self.edges[0], self.edges[-1], value))
        return (here - low) / (high - low)

    def bars(self) -> list[dict[str, Any]]:
        """Rectangles of the drawing, the series one on another."""
        tallest = max(float(np.sum(list(self.series.values()), axis=0).max()), 1.0)
        base = np.zeros(BINS)
        drawn = []
        for name, rows in self.series.items():
            for number in np.flatnonzero(rows):
                height = rows[number] / tallest * HEIGHT
                low, high = self.edges[number], self.edges[number + 1]
                drawn.append(
                    {
                        "series": name,
                        "x": round(number * WIDTH / BINS, 2),
                        "y": round(HEIGHT - base[number] - height, 2),
                        "width": round(WIDTH / BINS - 0.5, 2),
                        "height": round(float(height), 2),
                        "title": f"{low:.3g} to {high:.3g}: about {rows[number]:,.0f} {name}",
                    }
                )
                base[number] += height
        return drawn

    def lines(self) -> list[dict[str, Any]]:
        """The thresholds of the drawing."""
        return [
            {"x": round(self.place(value) * WIDTH, 2), "title": f"{name} = {value:g}"}
            for name, value in self.limits.items()
        ]


def draw(counts: Counts, limits: Mapping[str, Mapping[str, float]]) -> list[Histogram]:
    """A histogram of each measure, in the order of the filters.

    Args:
        counts: what was measured.
        limits: thresholds by measure, each by what it is called.
    """
    places = {limit.measure: number for number, limit in enumerate(LIMITS)}
    measured = (name for name, by_series in counts.items() if any(by_series.values()))
    names = sorted(measured, key=lambda name: (places.get(name, len(places)), name))
    return [_drawn(name, counts[name], dict(limits.get(name, {}))) for name in names]


def _drawn(name: str, by_series: dict[str, dict[str, int]], limits: dict[str, float]) -> Histogram:
    values = np.unique([float(text) for own in by_series.values() for text in own])
    half = _half(values)
    outer = [*limits.values(), *(values - half).tolist(), *(values + half).tolist()]
    low, high = min(outer), max(outer)
    log = low > 0 and high / low >= _LOG_FROM
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
    edges[0], edges[-1] = low, high  # rounding must not leave the outermost values outside
    shares = _shares(values, half, edges)
    series = {}
    for which, own in by_series.items():
        rows = np.zeros(len(values))
        rows[np.searchsorted(values, [float(text) for text in own])] = list(own.values())
        series[which] = rows @ shares
    return Histogram(name, edges, series, limits, log)


def _half(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far numbers may lie from those of two digits that they were rounded to.

    A value without a neighbour of the same size, and whole numbers where a measure has no others,
    such as the sides of pictures, are taken as they are.
    """
    sizes = np.abs(values)
    powers = np.floor(np.log10(sizes, where=sizes > 0, out=np.zeros_like(sizes)))
    half = np.where(sizes > 0, 0.05 * 10**powers, 0)
    gaps = np.concatenate([[np.inf], np.diff(values), [np.inf]])
    half = np.where(np.minimum(gaps[1:], gaps[:-1]) < 3 * half, half, 0)
    return np.where((sizes < _WHOLE) & (values == values.round()).all(), 0, half)


def _shares(
    values: NDArray[np.float64], half: NDArray[np.float64], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How much of each value (rows) is in each bar (columns): it covers what is rounded to it."""
    low, high = (values - half)[:, None], (values + half)[:, None]
    shares = np.clip(np.minimum(high, edges[1:]) - np.maximum(low, edges[:-1]), 0, None)
    exact = np.flatnonzero(half == 0)
    bars = np.searchsorted(edges, values[exact], side="right") - 1
    shares[exact, np.minimum(bars, BINS - 1)] = 1
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def _measured(measures: Sequence[pa.Array], reasons: NDArray[np.str_]) -> Iterator[_Values]:
    for chunk in measures:  # there is one, or none where there are no records
        flat = chunk.flatten()
        reason = reasons[pc.list_parent_indices(chunk).to_numpy()]
        names = np.array(flat.field("name").to_pylist(), dtype=np.str_)
        values = flat.field("value").to_numpy(zero_copy_only=False)
        for name in map(str, np.unique(names)):
            here = (names == name) & np.isfinite(values)
            mine = np.isin(reason, [limit.reason for limit in limits_of(name)])
            for series, chosen in (
                (_KEPT, reason == ""),
                (_BY_THIS, mine),
                (_BY_OTHERS, ~mine & (reason != "")),
            ):
                if (here & chosen).any():
                    yield name, series, values[here & chosen]


def _unmeasured(part: pa.Table, reasons: NDArray[np.str_]) -> Iterator[_Values]:
    """Values that only rejected records have, such as the distance of near duplicates."""
    values, thresholds = (part[name].to_numpy() for name in ("value", "threshold"))
    for reason in sorted(set(reasons.tolist()) - {limit.reason for limit in LIMITS}):
        here = (reasons == reason) & np.isfinite(values) & np.isfinite(thresholds)
        if here.any():
            yield reason, _BY_THIS, values[here]
