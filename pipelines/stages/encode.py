"""Run the frozen parts on shards: hidden states of every text, latents of source and target.

The input comes in ranges, and each piece of one, about a row group, is worked on by one process
from beginning to end, in groups of similar length that depend on nothing else. So the same range
gives the same features whatever the parallelism. Groups are made of some hundred records that
follow one another, whose features are in memory until all of them are there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from dim import records
from dim.config import StrictModel
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
from pipelines.outcome import Rejection, Row, fail, failed, reject, to_table
from pipelines.outputs.receipts import RangeOutput
from pipelines.ranges import Piece

TIMEOUT_S = 14_400.0
"""Seconds that a piece may take unless a job says otherwise; it may be 256 pictures."""

_STAGE = "features"
_ROWS_AT_ONCE = 256
_GROUPS_TOGETHER = 8  # of similar length, made of as many records


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
        use_gpu: compute on the GPU.
        threads: of the processor, for one worker.
        timeout_s: a piece may take; what takes longer ends the process, and in the end fails.

    Raises:
        InputError: the frozen parts are not those of ``preparation``.
    """

    def __init__(
        self,
        model: str,
        options: EncodeOptions,
        preparation: Preparation,
        source: Store,
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
        self.source = source
        self._images = ("image", "image_target") if edits else ("image",)

    def __call__(self, piece: Piece) -> Iterator[pa.Table]:
        """The features of the records of a piece, with outcomes, by place in the input."""
        table = self._read(piece)
        if is_given_up():
            traced = table.select(self._traced(table.schema))
            yield to_table(failed(traced, _STAGE, given_up()), self._schema)
            return
        yield from limited(self._in_order(table), self._timeout_s)

    def _in_order(self, table: pa.Table) -> Iterator[pa.Table]:
        size = _GROUPS_TOGETHER * self.options.encode_batch
        for first in range(0, table.num_rows, size):
            features = pa.concat_tables(self.encode(table.slice(first, size)))
            # Slices, for taking rows would first join all of the chunks.
            order = np.argsort(features["index"].to_numpy(), kind="stable").tolist()
            yield pa.concat_tables([features.slice(at, 1) for at in order])

    def encode(self, table: pa.Table) -> Iterator[pa.Table]:
        """Features of records that follow one another, in groups of similar length."""
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
            else:
                for number, row in enumerate(group):
                    self._add([row], table.slice(number, 1))
        else:
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

    def _read(self, piece: Piece) -> pa.Table:
        return pa.concat_tables(piece.batches(self.source, _ROWS_AT_ONCE))

    def _traced(self, schema: pa.Schema) -> list[str]:
        """The columns that a record keeps: what it is, where it came from, and its texts."""
        names = ["id", "index", "source", "content_hash", "provenance", *self.options.texts]
        return [name for name in names if name in schema.names]


class EncodeRanges:
    """The same for whole ranges: encodes their records, and writes what comes of it.

    Args:
        output: where they go.
        stage: what :class:`EncodeFeatures` takes.
    """

    def __init__(self, output: RangeOutput, *stage: Any) -> None:
        self._stage = EncodeFeatures(*stage)
        self._output = output

    def __call__(self, ranges: pa.Table) -> Iterator[pa.Table]:
        """Ranges in, receipts out."""
        for each in ranges.to_pylist():
            pieces = [Piece(**piece) for piece in each["pieces"]]
            rows = sum(piece.size(self._stage.source) for piece in pieces)
            features = chain.from_iterable(map(self._stage, pieces))
            yield self._output.done(each["number"], rows, features)


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
