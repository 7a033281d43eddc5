"""Finished outputs of data jobs, written by the sink itself and without a cluster."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
from ray.data.datasource import WriteResult

from dim import records
from infra.storage import Store
from pipelines.outcome import Rejection, fail, reject, to_table
from pipelines.outputs import manifest
from pipelines.outputs.commit import Limits, commit
from pipelines.outputs.manifest import Counts, Manifest
from pipelines.outputs.sink import OutcomeSink
from tests.pipelines.samples import edited, encoded, photo


def edit_rows(count: int, source: str = "photos") -> list[dict[str, Any]]:
    """DIM-Edit records; every fifth rejected, the last one failed."""
    made = []
    for index in range(count):
        image = photo(index)
        row = {
            "id": f"{source}-{index}",
            "index": index,
            "source": source,
            "instruction": f"Add box {index}.",
            "image": encoded(image, "JPEG"),
            "image_target": encoded(edited(image)),
            "answer": " ".join(["word"] * (index + 1)),
        }
        if index == count - 1:
            fail(row, "blueprint", "HTTP 500")
        elif index % 5 == 4:
            reject(row, Rejection("pair.unchanged" if index % 2 else "pair.ssim_low", "no", 0, 1))
        made.append(row)
    return made


def finish(
    store: Store,
    rows: list[dict[str, Any]],
    schema: pa.Schema = records.EDIT,
    *,
    rows_per_file: int = 8,
    **changes: Any,
) -> Manifest:
    """Write ``rows`` as a job's finished output; ``changes`` are fields of its manifest."""
    sink = OutcomeSink(store, schema)
    sink.on_write_complete(WriteResult(0, 0, [sink.write([to_table(rows, schema)], None)]))
    files = commit(store, schema, sink.pieces, Limits(rows_per_file))
    store.delete("staging")
    outcomes = Counter(row.get("outcome", "kept") for row in rows)
    counts = Counts(
        input=len(rows),
        kept=outcomes["kept"],
        rejected=outcomes["rejected"],
        failed=outcomes["failed"],
        by_reason=Counter(row["reason"] for row in rows if row.get("reason")),
    )
    values = {"job": "edit", "config": {}, "input": {}, "counts": counts, "files": tuple(files)}
    done = Manifest(**{**values, **changes})
    manifest.write(store, done)
    return done
