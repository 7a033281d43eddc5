"""Inspect: an output as a page to look at, with samples of every outcome and each filter's values.

The page is one HTML file with its pictures inside. Nothing of the output is held in memory but
the samples and the bars.
"""

from __future__ import annotations

import base64
import heapq
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
from numpy.typing import NDArray
from rich.console import Console

from dim.errors import DimError, InputError
from dim.images import decode_image
from dim.records import short_hash
from infra import storage
from infra.storage import Store
from pipelines.limits import LIMITS, Limit
from pipelines.outcome import FAILED, KEPT, OUTCOMES, REJECTED, Row
from pipelines.outputs import manifest as manifests
from pipelines.outputs.files import FOLDERS
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.pages import render

BINS = 40

_IMAGES = {"image": "source", "image_target": "target"}
_TEXTS = ("instruction", "caption", "blueprint")
_THUMBNAIL = 176  # pixels
_ROWS_AT_ONCE = 4096  # without pictures
_PICTURES_AT_ONCE = 16
_LOG_FROM = 100.0  # a measure whose largest value is so many times its smallest is drawn by its log
_WIDTH, _HEIGHT = 420, 120  # of a histogram, in pixels

_Values = tuple[str, NDArray[np.float64], str, dict[str, float]]
"""A measure, values of it, what became of their records, and its thresholds."""


@dataclass(frozen=True)
class Histogram:
    """Values of one measure.

    Attributes:
        name: of the measure, or the reason code where only rejected records have a value.
        edges: (BINS + 1,) bounds of the bars.
        series: counts (BINS,) by what became of the records: kept, this filter, other filters.
        limits: the thresholds, by what they are called.
        log: whether the bars are equally wide in the logarithm.
    """

    name: str
    edges: NDArray[np.float64]
    series: dict[str, NDArray[np.int64]]
    limits: dict[str, float]
    log: bool

    def place(self, value: float) -> float:
        """Where ``value`` lies between the first edge (0) and the last (1)."""
        scale = np.log if self.log else np.asarray
        low, high, here = (float(scale(v)) for v in (self.edges[0], self.edges[-1], value))
        return (here - low) / (high - low)

    def bars(self) -> list[dict[str, Any]]:
        """Rectangles of the drawing, the series one on another."""
        tallest = max(int(sum(self.series.values()).max()), 1)  # type: ignore[union-attr]
        base = np.zeros(BINS)
        drawn = []
        for name, counts in self.series.items():
            for number in np.flatnonzero(counts):
                height = counts[number] / tallest * _HEIGHT
                low, high = self.edges[number], self.edges[number + 1]
                drawn.append(
                    {
                        "series": name,
                        "x": round(number * _WIDTH / BINS, 2),
                        "y": round(_HEIGHT - base[number] - height, 2),
                        "width": round(_WIDTH / BINS - 0.5, 2),
                        "height": round(float(height), 2),
                        "title": f"{low:.4g} to {high:.4g}: {counts[number]:,} {name}",
                    }
                )
                base[number] += height
        return drawn

    def lines(self) -> list[dict[str, Any]]:
        """The thresholds of the drawing."""
        return [
            {"x": round(self.place(value) * _WIDTH, 2), "title": f"{name} = {value:g}"}
            for name, value in self.limits.items()
        ]


@dataclass(frozen=True)
class Inspection:
    """What the page tells of an output."""

    uri: str
    manifest: Manifest
    kept: list[Row]
    rejected: dict[str, list[Row]]
    failed: list[Row]
    histograms: list[Histogram]
    no_pictures: str
    """Why rejected records are shown without their pictures; empty where they are shown."""

    def render(self) -> str:
        """The page as HTML, with nothing that it would have to fetch."""
        return render(
            "pipelines.outputs",
            "inspect.html.j2",
            page=self,
            counts=self.manifest.counts,
            width=_WIDTH,
            height=_HEIGHT,
        )


def inspect(uri: str, samples: int = 12) -> Inspection:
    """Look through a finished output.

    Args:
        uri: its address.
        samples: records shown of each outcome and reason.

    Raises:
        InputError: it does not exist or is not finished.
        DimError: its files do not hold what its manifest says.
        StorageError: it cannot be read.
    """
    store, manifest = manifests.open_finished(uri)
    chosen = _choose(store, manifest, samples)
    kept, failed = chosen[KEPT][""], chosen[FAILED][""]
    rejected = dict(sorted(chosen[REJECTED].items()))
    _add_pictures(store, _paths(manifest, KEPT), kept)
    return Inspection(
        uri=uri,
        manifest=manifest,
        kept=kept,
        rejected=rejected,
        failed=failed,
        histograms=_histograms(store, manifest),
        no_pictures=_add_input_pictures(store, manifest, [*chain(*rejected.values()), *failed]),
    )


def _choose(
    store: Store, manifest: Manifest, samples: int
) -> dict[str, defaultdict[str, list[Row]]]:
    """The records to show, by outcome and reason, without pictures; the manifest's counts are
    checked on the way.

    They are chosen evenly by a hash of their id, so that the same output shows the same.
    """
    chosen: dict[str, defaultdict[str, list[Row]]] = {}
    counted: dict[str, Counter[str]] = {}
    for outcome in OUTCOMES:
        best = chosen[outcome] = defaultdict(list)
        counts = counted[outcome] = Counter()
        paths = _paths(manifest, outcome)
        for batch in _batches(store, paths, _ROWS_AT_ONCE, without=(*_IMAGES, "measures")):
            found: dict[str, list[Row]] = defaultdict(list)
            for row in batch.to_pylist():
                found[row.get("reason") or ""].append(row)
            for reason, rows in found.items():
                counts[reason] += len(rows)
                best[reason] = heapq.nsmallest(samples, [*best[reason], *rows], key=_by_hash)
        for rows in best.values():
            rows.sort(key=itemgetter("index"))
            for row in rows:
                row["pictures"] = []
    _check_counts(store, manifest, counted)
    return chosen


def _by_hash(row: Row) -> tuple[bytes, int]:
    return short_hash(row["id"]), row["index"]


def _check_counts(store: Store, manifest: Manifest, counted: dict[str, Counter[str]]) -> None:
    found = tuple(counted[outcome].total() for outcome in OUTCOMES)
    counts = manifest.counts
    said = (counts.kept, counts.rejected, counts.failed)
    if found != said or counted[REJECTED] != Counter(counts.by_reason) or not counts.add_up():
        raise DimError(
            f"{store.uri} holds {found} kept, rejected and failed records and its manifest says "
            f"{said} of {counts.input}"
        )


def _batches(
    store: Store,
    paths: Sequence[str],
    rows: int,
    *,
    without: Iterable[str] = (),
    chosen: pc.Expression | None = None,
) -> Iterator[pa.RecordBatch]:
    if not paths:
        return
    dataset = store.open_dataset(paths)
    columns = [name for name in dataset.schema.names if name not in set(without)]
    yield from dataset.to_batches(
        columns=columns, filter=chosen, batch_size=rows, fragment_readahead=1, batch_readahead=1
    )


def _paths(manifest: Manifest, outcome: str) -> list[str]:
    folder = FOLDERS[outcome]
    return [file.path for file in manifest.files if file.path.startswith(f"{folder}/")]


def _add_pictures(store: Store, paths: Sequence[str], rows: Sequence[Row]) -> None:
    """Give each row its pictures as :class:`list` of ``(role, data URL or None, note)``."""
    if not rows:
        return
    by_index = {row["index"]: row for row in rows}
    wanted = pc.field("index").isin(sorted(by_index))
    for batch in _batches(store, paths, _PICTURES_AT_ONCE, without=("measures",), chosen=wanted):
        for found in batch.to_pylist():
            by_index[found["index"]]["pictures"] = [
                picture(role, found[name])
                for name, role in _IMAGES.items()
                if found.get(name) is not None
            ]


def _add_input_pictures(own: Store, manifest: Manifest, rows: Sequence[Row]) -> str:
    """Pictures from the job's input, which is where those of left-out records still are."""
    uri = manifest.config.get("raw")
    if not isinstance(uri, str) or not uri:
        return "This job's input has no pictures of its own to show."
    try:
        store = storage.open_store(uri)
        if not storage.is_known_server(store, own):
            return f"The pictures are in {uri}, on a server that only this output's manifest names."
        raw = manifests.read(store)
        if raw is None:
            return f"The pictures were in {uri}, which is not there any more."
        _add_pictures(store, _paths(raw, KEPT), rows)
    except (DimError, OSError, pa.ArrowException) as error:
        return f"The pictures are in {uri}, which cannot be read: {error}"
    return ""


def picture(role: str, image: bytes) -> dict[str, str | None]:
    """A thumbnail: ``role``, ``url`` (a data URL or ``None``) and why there is none."""
    try:
        small = decode_image(image, name=f"the {role}")
    except InputError as error:
        return {"role": role, "url": None, "note": str(error)}
    size = f"{small.width} x {small.height}"
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    text = base64.b64encode(buffer.getvalue()).decode()
    return {"role": role, "url": f"data:image/jpeg;base64,{text}", "note": size}


def _histograms(store: Store, manifest: Manifest) -> list[Histogram]:
    """One per measure, and one per reason that has a value and no measure; in two passes."""
    limits: dict[str, dict[str, float]] = defaultdict(dict)
    ends: dict[str, tuple[float, float]] = {}
    for name, values, _, own in _values(store, manifest):
        limits[name] |= own
        outer = [*ends.get(name, ()), *own.values(), float(values.min()), float(values.max())]
        ends[name] = min(outer), max(outer)
    drawn = {name: _empty(name, *ends[name], limits[name]) for name in ends}
    for name, values, series, _ in _values(store, manifest):
        histogram = drawn[name]
        counts = np.histogram(values, histogram.edges)[0]
        histogram.series[series] = histogram.series.get(series, np.zeros(BINS, np.int64)) + counts
    order = [limit.measure for limit in LIMITS]
    return sorted(
        drawn.values(), key=lambda h: (order.index(h.name) if h.name in order else 99, h.name)
    )


def _empty(name: str, low: float, high: float, limits: dict[str, float]) -> Histogram:
    log = low > 0 and high / low >= _LOG_FROM
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.geomspace(low, high, BINS + 1) if log else np.linspace(low, high, BINS + 1)
    edges[0], edges[-1] = low, high  # rounding must not leave the outermost values outside
    return Histogram(name, edges, {}, limits, log)


def _values(store: Store, manifest: Manifest) -> Iterator[_Values]:
    """The values of every measure, a few thousand records at a time."""
    rules = manifest.config.get("filters") or {}
    for outcome in (KEPT, REJECTED):
        without = (*_IMAGES, *_TEXTS, "answer", "detail", "provenance")
        for batch in _batches(store, _paths(manifest, outcome), _ROWS_AT_ONCE, without=without):
            reasons = np.array(
                batch["reason"].to_pylist() if outcome == REJECTED else [""] * batch.num_rows
            )
            yield from _measured(batch, reasons, rules)
            if outcome == REJECTED:
                yield from _unmeasured(batch, reasons)


def _measured(
    batch: pa.RecordBatch, reasons: NDArray[np.str_], rules: dict[str, Any]
) -> Iterator[_Values]:
    if "measures" not in batch.schema.names:
        return
    flat = batch["measures"].flatten()
    owners = pc.list_parent_indices(batch["measures"]).to_numpy()
    names = np.array(flat.field("name").to_pylist(), dtype=np.str_)
    values = flat.field("value").to_numpy(zero_copy_only=False)
    for name in np.unique(names):
        here = (names == name) & np.isfinite(values)
        own = [limit for limit in LIMITS if limit.measure == name]
        limits = _thresholds(own, rules)
        reason = reasons[owners]
        mine = np.isin(reason, [limit.reason for limit in own])
        for series, chosen in (
            ("kept", reason == ""),
            ("rejected by this filter", mine),
            ("rejected by another", ~mine & (reason != "")),
        ):
            if (here & chosen).any():
                yield str(name), values[here & chosen], series, limits


def _unmeasured(batch: pa.RecordBatch, reasons: NDArray[np.str_]) -> Iterator[_Values]:
    """Values that only rejected records have, such as the distance of near duplicates."""
    values = batch["value"].to_numpy(zero_copy_only=False)
    thresholds = batch["threshold"].to_numpy(zero_copy_only=False)
    for reason in set(reasons.tolist()) - {limit.reason for limit in LIMITS}:
        here = (reasons == reason) & np.isfinite(values) & np.isfinite(thresholds)
        if here.any():
            limits = {"threshold": float(thresholds[here][0])}
            yield reason, values[here], "rejected by this filter", limits


def _thresholds(limits: Sequence[Limit], rules: dict[str, Any]) -> dict[str, float]:
    """The thresholds that a job had, those of single sources after the common ones."""
    return {
        f"{limit.setting} of {source}" if source else limit.setting: float(settings[limit.setting])
        for source, settings in [("", rules), *(rules.get("sources") or {}).items()]
        for limit in limits
        if settings.get(limit.setting) is not None
    }


def main(
    data: Annotated[str, typer.Argument(help="Output of a data job.", metavar="OUT")],
    page: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("inspect.html"),
    samples: Annotated[
        int, typer.Option(min=0, help="Records to show of each outcome and reason.")
    ] = 12,
) -> None:
    """A page to look at: samples kept and rejected by reason, failures, and filters' histograms."""
    inspection = inspect(data, samples)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(inspection.render(), encoding="utf-8")
    console = Console(soft_wrap=True, highlight=False)
    console.print(inspection.manifest.counts.in_words())
    console.print(f"page: {page}", markup=False)


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
