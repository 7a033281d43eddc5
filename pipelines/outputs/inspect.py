"""Inspect: an output as a page to look at, with samples of every outcome and each filter's values.

The page is one HTML file with its pictures inside. Nothing of the output is held in memory but
the samples and the bars.
"""

from __future__ import annotations

import base64
import heapq
import io
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import typer
from rich.console import Console

from dim.errors import DimError, InputError
from dim.images import decode_image
from dim.records import short_hash
from infra import storage
from infra.storage import Store
from pipelines.limits import LIMITS, limits_of
from pipelines.outcome import FAILED, KEPT, OUTCOMES, REJECTED, Row
from pipelines.outputs import histograms
from pipelines.outputs import manifest as manifests
from pipelines.outputs.files import FOLDERS
from pipelines.outputs.histograms import Histogram
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.pages import render

_IMAGES = {"image": "source", "image_target": "target"}
_THUMBNAIL = 176  # pixels
_ROWS_AT_ONCE = 4096  # without pictures
_PICTURES_AT_ONCE = 16


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
            width=histograms.WIDTH,
            height=histograms.HEIGHT,
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
        histograms=_histograms(store, manifest, rejected),
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
    without: Collection[str] = (),
    only: Collection[str] | None = None,
    chosen: pc.Expression | None = None,
) -> Iterator[pa.RecordBatch]:
    if not paths:
        return
    dataset = store.open_dataset(paths)
    names = dataset.schema.names
    columns = [n for n in names if n not in without and (only is None or n in only)]
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


def _histograms(
    store: Store, manifest: Manifest, rejected: Mapping[str, Sequence[Row]]
) -> list[Histogram]:
    """One per measure, and one per reason that has a value and no measure."""
    measured = manifest.measured
    rules = manifest.config.get("filters")
    limits = {limit.measure: _thresholds(limit.measure, rules) for limit in LIMITS}
    for reason, rows in rejected.items():
        found = rows[0]["threshold"] if rows else None
        if found is not None and math.isfinite(found):
            limits[reason] = {"threshold": found}
    return histograms.draw(_counted(store, manifest) if measured is None else measured, limits)


def _counted(store: Store, manifest: Manifest) -> histograms.Counts:
    """What was measured, from the records; their manifest does not say."""
    counts: histograms.Counts = {}
    for outcome in (KEPT, REJECTED):
        paths = _paths(manifest, outcome)
        for batch in _batches(store, paths, _ROWS_AT_ONCE, only=histograms.COLUMNS):
            histograms.add(counts, histograms.count(pa.Table.from_batches([batch])))
    return counts


def _thresholds(measure: str, rules: Any) -> dict[str, float]:
    """The thresholds that a job had, those of single sources after the common ones; what is none,
    in a manifest of others, is left out."""
    of_sources = _settings(_settings(rules).get("sources"))
    return {
        f"{limit.setting} of {source}" if source else limit.setting: float(found)
        for source, settings in [("", rules), *of_sources.items()]
        for limit in limits_of(measure)
        if isinstance(found := _settings(settings).get(limit.setting), int | float)
        and math.isfinite(found)
    }


def _settings(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


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
