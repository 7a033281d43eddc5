"""Feature shards made by the job's own stage, without a cluster."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dim import records
from dim.features.format import Preparation, pack_bf16, preparation_of, unpack_bf16
from infra import storage
from infra.models import load_frozen
from infra.storage import Store
from pipelines.outcome import travelling
from pipelines.outputs import manifest
from pipelines.outputs.files import Limits
from pipelines.outputs.manifest import Counts, Manifest
from pipelines.ranges import Piece
from pipelines.stages.encode import EncodeFeatures, EncodeOptions, schema_of
from tests.pipelines.finished import write_output


def prepare(model: str | Path, *, edits: bool = True, **cutting: Any) -> Preparation:
    """The preparation of a model folder or YAML; ``cutting`` are ``buckets`` and ``vlm_view``."""
    frozen = load_frozen(str(model))
    resolution = frozen.config.sampling.resolution
    return preparation_of(frozen, edits=edits, resolution=resolution, **cutting)


def pieces_in(store: Store) -> list[Piece]:
    """Every row group of the kept records in a folder."""
    found = []
    for name, _ in store.list("data"):
        with store.open_parquet(name) as parquet:
            groups = parquet.metadata.num_row_groups
        found += [Piece(name, group, groups) for group in range(groups)]
    return found


def encoder(
    plain: str,
    model: str | Path,
    *,
    cutting: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[EncodeFeatures, Preparation]:
    """The stage of the job, and what it prepares samples by."""
    values = {
        "kind": "edit",
        "texts": ("blueprint", "instruction"),
        "encoding": "bf16",
        "precision": "fp32",
        "encode_batch": 4,
    }
    chosen = EncodeOptions.model_validate(values | options)
    preparation = prepare(model, edits=chosen.kind == "edit", **(cutting or {}))
    source = storage.open_store(plain)
    stage = EncodeFeatures(str(model), chosen, preparation, source, False, 1)
    return stage, preparation


def write_features(
    plain: str, out: str | Path, model: str | Path, *, group_bytes: int = 1, **options: Any
) -> str:
    """The features of the records in the folder ``plain``, as a finished output; its address.

    With the usual ``group_bytes`` every record has a row group, and there are several files.
    """
    stage, preparation = encoder(plain, model, **options)
    pieces = pieces_in(storage.open_store(plain))
    tables = [table for piece in pieces for table in stage(piece)]
    store = storage.open_store(str(out))
    schema = schema_of(stage.options, preparation)
    limits = Limits(8, group_bytes=group_bytes)
    table = pa.concat_tables([travelling(schema).empty_table(), *tables])
    files = write_output(store, schema, table, limits)
    rows = Counter(row["outcome"] for table in tables for row in table.to_pylist())
    counts = Counts(
        input=rows.total(),
        kept=rows["kept"],
        rejected=rows["rejected"],
        failed=rows["failed"],
        by_reason={"features.text_missing": rows["rejected"]} if rows["rejected"] else {},
    )
    done = Manifest(job="features", config={}, input={}, counts=counts, files=tuple(files))
    manifest.write(store, done)
    return str(out)


def cut_latents(
    features: str, out: str | Path, cells: Sequence[tuple[int, int]], *, cell: int = 16
) -> str:
    """A copy of an output of features whose latents have, by row, ``cells`` (h, w).

    They are cut, or repeated where they were smaller. It says that they were made with buckets of a
    model that paints in cells of ``cell`` pixels.
    """
    source, target = storage.open_store(features), storage.open_store(str(out))
    sizes = iter(cells)
    files = []
    for file in manifest.read(source).files:
        if not file.path.startswith("data/"):
            continue
        with source.open_parquet(file.path) as parquet:
            table = parquet.read()
        rows = [_cut(row, *next(sizes)) for row in table.to_pylist()]
        told = dict(table.schema.metadata)
        prepared = json.loads(told[records.PREPARATION_KEY]) | {"cell": cell}
        told[records.PREPARATION_KEY] = json.dumps(prepared).encode()
        sink = pa.BufferOutputStream()
        cut = pa.Table.from_pylist(rows, table.schema.with_metadata(told))
        pq.write_table(cut, sink, row_group_size=1)
        data = sink.getvalue().to_pybytes()
        target.write(file.path, data)
        digest = records.sha256_hex(data)
        files.append(file.model_copy(update={"bytes": len(data), "sha256": digest}))
    done = manifest.read(source).model_copy(update={"files": tuple(files)})
    manifest.write(target, done)
    return str(out)


def _cut(row: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    shape = tuple(row["latent_shape"])
    for name in ("latent", "source_latent"):
        if row.get(name) is not None:
            latent = unpack_bf16(row[name], shape)
            down, across = torch.arange(height) % shape[1], torch.arange(width) % shape[2]
            row[name] = pack_bf16(latent[:, down[:, None], across])
    return row | {"latent_shape": [shape[0], height, width]}
