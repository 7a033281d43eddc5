"""Reading training samples: the checks before the first step, and one worker's rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from numpy.typing import NDArray

from dim import records
from dim.errors import InputError
from infra import storage


def open_samples(uris: Sequence[str], columns: Sequence[str]) -> tuple[ds.Dataset, int]:
    """Open the output folders of data jobs and check that they can be trained on.

    Returns the dataset and its number of rows.

    Raises:
        InputError: there is no sample, or a column is missing; the message says where.
        StorageError: a folder cannot be read.
    """
    where = ", ".join(uris)
    dataset = storage.open_dataset(uris)
    if records.kind_of(dataset.schema) in records.FEATURES_OF.values():
        raise InputError(f"{where} holds features, and images are needed here")
    missing = [name for name in columns if name not in dataset.schema.names]
    if missing:
        raise InputError(
            f"the training data in {where} lacks the column {missing[0]!r}; "
            f"it has {', '.join(dataset.schema.names)}"
        )
    rows = dataset.count_rows()
    if rows == 0:
        raise InputError(f"the training data in {where} is empty")
    return dataset, rows


def read_rows(dataset: ds.Dataset, columns: Sequence[str], rows: NDArray[np.int64]) -> pa.Table:
    """Rows by number, in the order asked for (a row may be asked for twice).

    The dataset is streamed once and only the rows asked for are kept. Images stay encoded.

    Raises:
        InputError: a value is missing (null) in one of the rows.
    """
    wanted, inverse = np.unique(rows, return_inverse=True)
    kept: list[pa.RecordBatch] = []
    first = 0
    for batch in dataset.to_batches(columns=list(columns)):
        low, high = np.searchsorted(wanted, [first, first + batch.num_rows])
        if high > low:
            kept.append(batch.take(pa.array(wanted[low:high] - first)))
        first += batch.num_rows
    table = pa.Table.from_batches(kept)
    for name in columns:
        if table.column(name).null_count:
            at = table.column(name).is_null().to_pylist().index(True)
            sample = table.column("id")[at].as_py()
            raise InputError(f"sample {sample!r} has no {name}, which this stage trains on")
    return table.take(pa.array(inverse))


def fingerprint(uris: Sequence[str]) -> str:
    """A hash of what the data folders hold, to tell whether a run goes on with the same data."""
    digest = hashlib.sha256()
    for uri in uris:
        manifest = json.loads(storage.open_store(uri).read("manifest.json"))
        for file in manifest["files"]:
            if not file["path"].startswith("data/"):
                continue  # what the job dropped is not trained on
            digest.update(f"{file['sha256']} {file['rows']}\n".encode())
    return digest.hexdigest()
