"""Run the frozen parts on shards: hidden states of every text, latents of source and target.

The input comes as row groups of the shards' files. Each is worked on by one process from beginning
to end, in groups of similar length that depend on nothing else, so the same row group gives the
same features whatever the parallelism. What it gave lies in the output folder until the job ends: a
job that was killed goes on with the next one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pyarrow as pa
import torch
from torch import Tensor

from dim import records
from dim.config import StrictModel, dump_config
from dim.errors import InputError
from dim.features.encoder import FrozenEncoder, by_length
from dim.features.format import (
    Encoding,
    Preparation,
    pack_bf16,
    pack_int8,
    preparation_of,
    relative_error,
    unpack_int8,
)
from dim.records import TextName
from infra.models import FrozenModel, load_frozen
from infra.storage import Store
from pipelines.attempts import given_up, is_given_up, limited, stop_after_restarts
from pipelines.outcome import Rejection, Row, fail, failed, reject, to_table, travelling

ENCODED = "encoded"
"""Folder in the output with the row groups that are done while the job is not."""

ROW_GROUP = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
    ]
)
"""A row group of a file of the input, and the file's hash."""

TIMEOUT_S = 14_400.0
"""Seconds that a row group may take unless a job says otherwise; it may be 256 pictures."""

_STAGE = "features"


class EncodeOptions(StrictModel):
    """What decides the features of a record, besides the record and the frozen parts."""

    kind: Literal["edit", "t2i"]
    texts: tuple[TextName, ...]
    encoding: Encoding
    precision: Literal["fp32", "bf16"]
    encode_batch: int


class EncodeFeatures:
    """A worker that holds the frozen parts.

    Args:
        model: address of the DIM folder or model YAML with the frozen parts.
        options: what to compute of each record.
        preparation: what the frozen parts must be; a worker on another machine may find others.
        source: folder of the shards.
        target: the job's output folder.
        use_gpu: compute on the GPU.
        threads: of the processor, for one worker.
        timeout_s: a row group may take; what takes longer ends the process, and in the end fails.

    Raises:
        InputError: the frozen parts are not those of ``preparation``.
    """

    def __init__(
        self,
        model: str,
        options: EncodeOptions,
        preparation: Preparation,
        source: Store,
        target: Store,
        use_gpu: bool,
        threads: int,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        stop_after_restarts()
        self._timeout_s = timeout_s
        torch.set_num_threads(threads)
        frozen = load_frozen(model)
        edits = options.kind == "edit"
        cutting: Any = {
            "resolution": preparation.resolution,
            "buckets": preparation.cell is not None,
            "vlm_view": preparation.vlm_view,
        }
        found = preparation_of(frozen, edits=edits, **cutting)
        if differing := found.differences(preparation):
            raise InputError(f"{model} is not the same on every machine: {'; '.join(differing)}")
        _place(frozen, use_gpu, options.precision)
        self._encoder = FrozenEncoder(frozen, edits=edits, **cutting)
        self.options = options
        self._schema = schema_of(options, preparation)
        self._source, self._target = source, target
        self._images = ("image", "image_target") if edits else ("image",)

    def __call__(self, row_groups: pa.Table) -> Iterator[pa.Table]:
        """``ROW_GROUP`` rows in; records of ``travelling(schema_of(...))`` out, a few at a time."""
        for row_group in row_groups.to_pylist():
            name = f"{ENCODED}/{self._key(row_group)}.arrow"
            if self._target.is_file(name):
                yield from _read_back(self._target, name)
            elif is_given_up():
                yield self._lost(row_group)
            else:
                yield from limited(self._write_down(name, row_group), self._timeout_s)

    def encode(self, table: pa.Table) -> Iterator[pa.Table]:
        """Features of the records of one row group, in groups of similar length."""
        rows, whole = [], []
        for number, row in enumerate(table.select(self._traced(table.schema)).to_pylist()):
            rows.append(row)
            missing = next((text for text in self.options.texts if not row[text]), None)
            if missing:
                reject(row, Rejection("features.text_missing", f"the record has no {missing}"))
            else:
                whole.append(number)
        unusable = [row for row in rows if "outcome" in row]
        if unusable:
            yield to_table(unusable, self._schema)
        usable = table.take(pa.array(whole, pa.int64()))
        texts = [rows[number] for number in whole]
        for chosen in by_length(texts, self.options.texts, self.options.encode_batch):
            group = [texts[number] for number in chosen]
            self._add(group, usable.take(pa.array(chosen)))
            yield to_table(group, self._schema)

    def _add(self, group: Sequence[Row], table: pa.Table) -> None:
        """Put features into the rows; if one cannot be done, the others of its group still are."""
        try:
            features = self._features(table)
        except Exception as error:  # one record must not end a job of millions
            if len(group) == 1:
                fail(group[0], _STAGE, error)
                return
            for number, row in enumerate(group):
                self._add([row], table.slice(number, 1))
            return
        for row, values in zip(group, features, strict=True):
            row.update(values)

    def _features(self, table: pa.Table) -> list[Row]:
        shown = table.select(["id", *self._images]).to_pylist()
        pictures = [self._encoder.prepare(row) for row in shown]
        seen = self._encoder.see(pictures)
        latent, source = self._encoder.latents(pictures)
        found: list[Row] = [{"latent_shape": list(one.shape)} for one in latent]
        for name, latents in (("latent", latent), ("source_latent", source)):
            if latents is None:
                continue
            for row, one in zip(found, latents, strict=True):
                row[name] = pack_bf16(_finite(one, name))
        for text in self.options.texts:
            hidden, mask = self._encoder.states(table[text].to_pylist(), seen)
            for row, one, tokens in zip(found, hidden, mask.sum(1).tolist(), strict=True):
                states = _finite(one[:tokens], "hidden states")
                row["hidden_size"] = states.shape[1]
                row |= {f"{text}_tokens": tokens, **self._packed(text, states)}
        return found

    def _packed(self, text: str, states: Tensor) -> Row:
        if self.options.encoding == "bf16":
            return {f"{text}_states": pack_bf16(states)}
        numbers, scales = pack_int8(states)
        kept = unpack_int8(numbers, scales, (states.shape[0], states.shape[1]))
        return {
            f"{text}_states": numbers,
            f"{text}_scales": scales,
            f"{text}_error": relative_error(states, kept),
        }

    def _write_down(self, name: str, row_group: dict[str, Any]) -> Iterator[pa.Table]:
        with self._source.open_parquet(row_group["file"]) as parquet:
            table = parquet.read_row_group(row_group["row_group"])
        schema = travelling(self._schema)
        with self._target.open_output(name) as file, pa.ipc.new_stream(file, schema) as writer:
            for part in self.encode(table):
                writer.write_table(part)
                yield part

    def _lost(self, row_group: dict[str, Any]) -> pa.Table:
        """The records of a row group that ends the process that works on it, as failed ones."""
        with self._source.open_parquet(row_group["file"]) as parquet:
            names = self._traced(parquet.schema_arrow)
            table = parquet.read_row_group(row_group["row_group"], columns=names)
        return to_table(failed(table, _STAGE, given_up()), self._schema)

    def _key(self, row_group: dict[str, Any]) -> str:
        return records.sha256_hex(
            json.dumps([row_group, dump_config(self.options), str(self._schema.metadata)]).encode()
        )

    def _traced(self, schema: pa.Schema) -> list[str]:
        """The columns that a record keeps: what it is, where it came from, and its texts."""
        names = ["id", "index", "source", "content_hash", "provenance", *self.options.texts]
        return [name for name in names if name in schema.names]


def schema_of(options: EncodeOptions, preparation: Preparation) -> pa.Schema:
    """The columns of the features."""
    return records.features_schema(
        options.kind,
        options.texts,
        encoding=options.encoding,
        preparation=preparation.model_dump_json(),
    )


def _place(frozen: FrozenModel, use_gpu: bool, precision: str) -> None:
    """Onto the device, in the precision that training would give the frozen parts there."""
    for part in (frozen.conditioner, frozen.autoencoder):
        part.to("cuda" if use_gpu else "cpu")
        if precision == "bf16" and use_gpu:
            part.bfloat16()


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not bool(tensor.isfinite().all()):
        raise InputError(f"its {name} are not finite numbers")
    return tensor


def _read_back(store: Store, name: str) -> Iterator[pa.Table]:
    with store.open_arrow(name) as (_, batches):
        for batch in batches:
            yield pa.Table.from_batches([batch])
