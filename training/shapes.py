"""Which shape each sample has: found by the driver once, kept in the stage's output for all.

Workers read a file of two bytes a sample, or less, instead of a column of all data; a run that goes
on reads it too and so has the order with which it began.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dim.config import StrictModel
from dim.errors import InputError, UnreadableFile
from dim.features.shapes import shape_ids, sizes
from dim.learning.buckets import MOST_REPEATS, steps_of_shapes
from dim.model.config import ModelConfig
from dim.model.sizes import Size
from infra import storage
from infra.models import read_config
from infra.samples import fingerprint, holds_features, open_features, open_images
from training.mixture import count_sources, epoch_samples, mixed_samples
from training.stage import StageConfig

SHAPES_FILE = "shapes.parquet"
_COLUMN = "shape"
_MADE_OF = b"dim.shapes"  # of which data and for which sizes they were found
_PUBLISHED_CELL = 32  # pixels, of models whose description leaves it to their weights


class Shapes(StrictModel):
    """What the plan says of shapes: how many samples an epoch could have of each, and a hash.

    ``sizes`` are (width, height) in pixels; ``sources`` are the numbers of samples (a row that
    comes several times is as many) of each of the stage's data, by shape; ``sha256`` is of the
    shapes of all rows.
    """

    sizes: list[Size]
    sources: list[list[int]]
    sha256: str

    @property
    def counts(self) -> list[int]:
        """Samples by shape, of all data together."""
        return [sum(some) for some in zip(*self.sources, strict=True)]

    def shares(self, batch_size: int) -> list[float]:
        """Of each of the stage's data, its part of the samples that an epoch really has.

        Without what rests or is left out, and with what comes several times to fill a batch.
        """
        counts = np.array(self.counts)
        taken = steps_of_shapes(counts, batch_size) * batch_size / np.maximum(1, counts)
        parts = np.array(self.sources) @ taken
        return (parts / max(1, parts.sum())).tolist()

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches of an epoch."""
        return int(steps_of_shapes(self.counts, batch_size).sum())

    def announcement(self, batch_size: int, names: Sequence[str] = ()) -> list[str]:
        """How many shapes take part, and which samples do not or come more than once.

        ``names`` are those of the stage's data, of which the shares are told where there are many.
        """
        steps = steps_of_shapes(self.counts, batch_size)
        every = list(zip(self.sizes, self.counts, steps.tolist(), strict=True))
        used = [(size, count) for size, count, its in every if its]
        size, most = max(used, key=lambda found: found[1])
        resting = sum(max(0, count - its * batch_size) for _, count, its in every if its)
        lines = [
            f"each batch is of one of {len(used)} shapes, {_named(*size)} the most frequent with "
            f"{most} samples; {resting} samples rest in an epoch, others in the next"
        ]
        few = [(size, count) for size, count in used if count < batch_size]
        if few:
            lines.append(f"repeated to fill a batch of {batch_size}: the samples of {_listed(few)}")
        out = [(size, count) for size, count, its in every if count and not its]
        if out:
            lines.append(
                f"left out: {sum(count for _, count in out)} samples of shapes that have fewer "
                f"than a batch of {batch_size} with {MOST_REPEATS} of each: {_listed(out)}"
            )
        if len(names) > 1:
            lines.append(self.describe_mixture(batch_size, names))
        return lines

    def describe_mixture(self, batch_size: int, names: Sequence[str]) -> str:
        """The shares of an epoch that the stage's data, which are called ``names``, really have."""
        shares = zip(self.shares(batch_size), names, strict=True)
        return "in batches of one shape it has " + ", ".join(
            f"{s:.1%} {name}" for s, name in shares
        )


@dataclass(frozen=True)
class RowShapes:
    """The shape ``ids`` (rows,) of all samples, as places in ``sizes``.

    ``data`` is a hash of what they were found in; ``sources`` as in ``Shapes``.
    """

    ids: NDArray[np.int16]
    sizes: list[Size]
    data: str
    sources: list[list[int]] = field(default_factory=list)

    @property
    def sha256(self) -> str:
        """A hash of sizes and ids."""
        return hashlib.sha256(json.dumps(self.sizes).encode() + self.ids.tobytes()).hexdigest()

    def told(self) -> Shapes:
        """What the workers are told, who read the rest."""
        return Shapes(sizes=self.sizes, sources=self.sources, sha256=self.sha256)

    def write(self, out: str) -> None:
        """Keep them in ``out``, atomically."""
        made_of = json.dumps({"sizes": self.sizes, "data": self.data})
        schema = pa.schema([pa.field(_COLUMN, pa.int16())], {_MADE_OF: made_of.encode()})
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table([pa.array(self.ids)], schema), sink)
        storage.open_store(out).write(SHAPES_FILE, sink.getvalue())


def find_shapes(
    config: StageConfig, model: ModelConfig | None = None, *, fresh: bool = False
) -> RowShapes | None:
    """The shapes of a stage's samples; ``None`` where it makes no difference between them.

    They are read from ``out`` if they were found before, for the same data and sizes. Otherwise
    one small column of all data is read, see ``dim.features.shapes``.

    Args:
        config: The stage.
        model: That it starts from, if it is not yet at ``init``.
        fresh: Look for them anew.

    Raises:
        InputError: a sample has a shape that the stage cannot paint, or no shape has enough for a
            batch, or none of which a source that is mixed has samples.
        CheckpointError, StorageError: model or data are not there.
    """
    if not config.buckets:
        return None
    model = model or read_config(config.init)
    resolution, cell = model.sampling.resolution, _cell(model)
    data, table = fingerprint(config.uris), list(sizes(resolution, cell))
    found = None if fresh else _kept(config.out)
    if found is None or (found.data, found.sizes) != (data, table):
        shards = (
            open_features(config.uris, config.texts, edits=config.edits, every_file=False)
            if holds_features(config.uris)
            else open_images(config.uris, config.columns, every_file=False)
        )
        found = RowShapes(shape_ids(shards, resolution, cell), table, data)
    found = replace(found, sources=_by_source(config, found.ids, len(table)))
    _check_enough(config, found.told())
    return found


def _by_source(config: StageConfig, ids: NDArray[np.int16], shapes: int) -> list[list[int]]:
    """How many samples of an epoch each of the stage's data has, by shape."""
    rows = count_sources(config)
    samples = mixed_samples(config, rows)
    ends = np.cumsum(epoch_samples(config, rows))[:-1]
    parts = np.split(ids if samples is None else ids[samples], ends)
    return [np.bincount(part, minlength=shapes).tolist() for part in parts]


def _check_enough(config: StageConfig, told: Shapes) -> None:
    if not told.steps_per_epoch(config.batch_size):
        raise InputError(
            f"buckets: no shape has samples enough for a batch of {config.batch_size} with "
            f"{MOST_REPEATS} of each; the most, {max(told.counts)}, has "
            f"{_named(*told.sizes[int(np.argmax(told.counts))])}: take a smaller batch_size, or "
            "no buckets"
        )
    if not any(source.changes_the_mixture for source in config.data):
        return
    shares = told.shares(config.batch_size)
    if 0 in shares:
        raise InputError(
            f"buckets: no shape of which {config.source_names[shares.index(0)]} has samples has "
            f"enough for a batch of {config.batch_size} with {MOST_REPEATS} of each: leave it out, "
            "give it more weight, or take a smaller batch_size"
        )


def read_shapes(out: str, told: Shapes) -> NDArray[np.int16]:
    """The shape ids (rows,) that the driver has kept in ``out``.

    Raises:
        InputError: they are others than it found.
        StorageError: they cannot be read.
    """
    found = _read(out)
    if found.sha256 != told.sha256:
        where = storage.open_store(out).address(SHAPES_FILE)
        raise InputError(f"{where} is not what was found when this run began")
    return found.ids


def _kept(out: str) -> RowShapes | None:
    if not storage.open_store(out).exists(SHAPES_FILE):
        return None
    try:
        return _read(out)
    except UnreadableFile:
        return None  # it is made of the data


def _read(out: str) -> RowShapes:
    store = storage.open_store(out)
    with store.open_parquet(SHAPES_FILE) as parquet:
        table = parquet.read([_COLUMN])
    made_of = json.loads((table.schema.metadata or {}).get(_MADE_OF, b"{}"))
    known = [(width, height) for width, height in made_of.get("sizes", [])]
    return RowShapes(table[_COLUMN].to_numpy(), known, made_of.get("data", ""))


def _cell(model: ModelConfig) -> int:
    """Pixels along each side of the painter's smallest piece, as ``DIM.cell``."""
    stages = model.autoencoder.architecture.get("encoder_block_out_channels")
    patch = model.painter.architecture.get("patch_size", 1)
    return (2 ** (len(stages) - 1) if stages else _PUBLISHED_CELL) * patch


def _named(width: int, height: int) -> str:
    return f"{width}x{height}"


def _listed(shapes: list[tuple[Size, int]]) -> str:
    return ", ".join(f"{_named(*size)} ({count})" for size, count in shapes)
