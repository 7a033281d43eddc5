"""Files that attack whoever reads them. The payload leaves a file behind where it has run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data  # noqa: F401  (makes the extension type known, as it is in every job)
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

from dim import records


class Payload:
    """Runs where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self._marker, "w")


def pickled(marker: Path, rows: int = 1) -> pa.Array:
    """A column whose values leave ``marker`` behind when they are made Python's."""
    data = pa.array([pickle.dumps(Payload(marker))] * rows, pa.large_binary())
    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), data)


def nested(column: pa.Array) -> dict[str, pa.Array]:
    """The column within every kind of type that has others in it, by name."""
    rows = len(column)
    offsets = pa.array(range(rows + 1), pa.int32())
    places, ones = pa.array(range(rows), pa.int32()), pa.array([1] * rows, pa.int32())
    struct = pa.StructArray.from_arrays([column], ["x"])
    keys = pa.array([str(row) for row in range(rows)])
    return {
        "plain": column,
        "struct": struct,
        "list": pa.ListArray.from_arrays(offsets, column),
        "large_list": pa.LargeListArray.from_arrays(offsets.cast(pa.int64()), column),
        "fixed_size_list": pa.FixedSizeListArray.from_arrays(column, 1),
        "list_view": pa.ListViewArray.from_arrays(places, ones, column),
        "map": pa.MapArray.from_arrays(offsets, keys, column),
        "list_of_struct": pa.ListArray.from_arrays(offsets, struct),
        "dictionary": pa.DictionaryArray.from_arrays(places, column),
        "run_end_encoded": pa.RunEndEncodedArray.from_arrays(
            pa.array(range(1, rows + 1), pa.int32()), column
        ),
        "sparse_union": pa.UnionArray.from_sparse(pa.array([0] * rows, pa.int8()), [column]),
        "dense_union": pa.UnionArray.from_dense(pa.array([0] * rows, pa.int8()), places, [column]),
    }


NOT_IN_PARQUET = {"dictionary", "run_end_encoded", "sparse_union", "dense_union"}


def write(path: Path, columns: dict[str, Any]) -> Path:
    """Columns as a Parquet or Arrow file, by the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return path


def poison(out: Path, column: str, marker: Path, file: int = 0) -> str:
    """Put a column with the payload into a file of a finished output, in the place of its own.

    The manifest is made to fit, as somebody would who hands such an output on. Returns the file's
    name in the output.
    """
    manifest = json.loads((out / "manifest.json").read_text())
    entry = [each for each in manifest["files"] if each["path"].startswith("data/")][file]
    path = out / entry["path"]
    table = pq.ParquetFile(path).read()
    payload = pickled(marker, table.num_rows)
    if column in table.column_names:
        table = table.set_column(table.column_names.index(column), column, payload)
    else:
        table = table.append_column(column, payload)
    pq.write_table(table, path)
    data = path.read_bytes()
    entry |= {"bytes": len(data), "sha256": records.sha256_hex(data)}
    (out / "manifest.json").write_text(json.dumps(manifest))
    return str(entry["path"])
