"""Finished outputs of data jobs, written without a cluster, in files with plain names."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from dim import records
from infra.storage import Store
from pipelines.outcome import KEPT, Rejection, fail, reject, to_table
from pipelines.outputs import manifest
from pipelines.outputs.files import (
    FOLDERS,
    Limits,
    Name,
    by_place,
    schemas_of,
    split,
    write_empty,
    write_files,
)
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
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


def write_output(
    store: Store, schema: pa.Schema, table: pa.Table, limits: Limits
) -> list[FileEntry]:
    """Records with outcomes as the files of an output; kept ones by so many places of the input."""
    parts = dict(split(by_place(table), schemas_of(schema)))
    files: list[FileEntry] = []
    for outcome, columns in schemas_of(schema).items():
        if outcome not in parts:
            files.append(write_empty(store, columns, _name(outcome, 0)))
            continue
        places = parts[outcome]["index"].to_numpy() // (
            limits.rows_per_file if outcome == KEPT else 10**6
        )
        first = 0
        for number in np.unique(places):
            part = parts[outcome].filter(pa.array(places == number))
            made = list(write_files(store, columns, [part], limits, _name(outcome, first)))
            files += made
            first += len(made)
    return sorted(files, key=lambda file: file.path)


def _name(outcome: str, first: int) -> Name:
    return lambda number, sha256: f"{FOLDERS[outcome]}/part-{first + number:05d}.parquet"


def finish(
    store: Store,
    rows: list[dict[str, Any]],
    schema: pa.Schema = records.EDIT,
    *,
    rows_per_file: int = 8,
    **changes: Any,
) -> Manifest:
    """Write ``rows`` as a job's finished output; ``changes`` are fields of its manifest."""
    files = write_output(store, schema, to_table(rows, schema), Limits(rows_per_file))
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
