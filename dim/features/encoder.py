"""What the frozen parts say about a sample: hidden states of its text and image, and latents.

They never change while the painter learns, so each worker computes them once for its own samples
and keeps them as float16 (``CachedFeatures``). Where they would not fit, ``LiveFeatures`` computes
those of a batch when it is needed. Where ``dim data features`` has computed them before,
``ShardFeatures`` reads them. All answer ``batch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from PIL import Image

from dim.errors import InputError
from dim.features.format import FrozenParts, unpack_bf16, unpack_int8
from dim.features.shards import FeatureShards, Row
from dim.images import decode_image
from dim.model.conditioner import ImageFeatures


@dataclass(frozen=True)
class Features:
    """One batch as the painter sees it.

    ``hidden_states`` (B, N, H) float32, right-padded; ``mask`` (B, N) bool, true for tokens;
    ``latent`` (B, C, h, w) float32, the image to paint; ``source_latent`` the same, or ``None``.
    """

    hidden_states: torch.Tensor
    mask: torch.Tensor
    latent: torch.Tensor
    source_latent: torch.Tensor | None

    def to(self, device: torch.device) -> Features:
        """The same batch on ``device``."""
        source = self.source_latent
        return Features(
            self.hidden_states.to(device, non_blocking=True),
            self.mask.to(device, non_blocking=True),
            self.latent.to(device, non_blocking=True),
            None if source is None else source.to(device, non_blocking=True),
        )


class FeatureSource(Protocol):
    """Batches of features by position in a worker's table."""

    def batch(self, positions: NDArray[np.int64], texts: NDArray[np.int64]) -> Features:
        """Features of rows ``positions`` (B,), each with its text number ``texts`` (B,)."""
        ...


class FrozenEncoder:
    """Runs the frozen parts of a DIM on rows of an edit or text-to-image table.

    Args:
        model: Its conditioner and autoencoder are used, without gradients.
        edits: Whether rows have a source (``image``) and a target (``image_target``).
        resolution: The side of the painted image in pixels.
    """

    def __init__(self, model: FrozenParts, *, edits: bool, resolution: int) -> None:
        self._model = model
        self._edits = edits
        self._resolution = resolution

    @torch.inference_mode()
    def see(self, table: pa.Table) -> ImageFeatures | None:
        """What the vision tower makes of the rows' source images; ``None`` without sources."""
        if not self._edits:
            return None
        return self._model.conditioner.see(self._images(table, "image"))

    @torch.inference_mode()
    def states(
        self, texts: Sequence[str], seen: ImageFeatures | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, N, H) and mask (B, N) of ``texts`` with what was seen."""
        return self._model.conditioner.encode(texts, seen)

    @torch.inference_mode()
    def latents(self, table: pa.Table) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Latents of the images to paint and, for edits, of their sources: (B, C, h, w) each."""
        if not self._edits:
            return self._latent(table, "image"), None
        return self._latent(table, "image_target"), self._latent(table, "image")

    def _images(self, table: pa.Table, column: str) -> list[Image.Image]:
        ids = table.column("id").to_pylist()
        data = table.column(column).to_pylist()
        return [
            decode_image(item, name=f"the {column} of sample {sample}")
            for item, sample in zip(data, ids, strict=True)
        ]

    def _latent(self, table: pa.Table, column: str) -> torch.Tensor:
        autoencoder = self._model.autoencoder
        images = self._images(table, column)
        pixels = torch.stack([autoencoder.prepare(image, self._resolution) for image in images])
        return autoencoder.encode(pixels.to(next(autoencoder.parameters()).device))


class CachedFeatures:
    """Every feature of a worker's rows, in memory.

    Hidden states of all rows and texts lie in one (tokens, H) float16 tensor with offsets, so a
    batch is a single gather.

    Args:
        encoder: The frozen parts.
        table: The worker's rows.
        texts: The text columns; text number ``t`` of ``batch`` is ``texts[t]``.
        encode_batch: Rows per forward pass of the frozen parts.
        progress: Called with (rows done, rows to do).
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        table: pa.Table,
        texts: Sequence[str],
        *,
        encode_batch: int = 64,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._rows = table.num_rows
        states: dict[int, torch.Tensor] = {}
        done = 0
        for chosen in by_length(table, texts, encode_batch):
            part = table.take(pa.array(chosen))
            seen = encoder.see(part)
            for number, column in enumerate(texts):
                hidden, mask = encoder.states(part.column(column).to_pylist(), seen)
                for row, one, tokens in zip(chosen, hidden, mask.sum(1).tolist(), strict=True):
                    states[number * self._rows + int(row)] = one[:tokens].to("cpu", torch.float16)
            done += len(chosen)
            progress(done, self._rows)
        in_order = [states.pop(entry) for entry in range(len(texts) * self._rows)]
        self._states = torch.cat(in_order)
        self._lengths = torch.tensor([len(one) for one in in_order])
        self._offsets = torch.cumsum(self._lengths, 0) - self._lengths
        self._latents, self._sources = _all_latents(encoder, table, encode_batch)

    @property
    def nbytes(self) -> int:
        """Memory the features take."""
        held = [self._states, self._latents, self._sources]
        return sum(item.nbytes for item in held if item is not None)

    def count_cut(self, limit: int) -> int:
        """How many texts reached ``limit`` tokens, so that they may have lost their beginning."""
        return int((self._lengths >= limit).sum())

    def batch(self, positions: NDArray[np.int64], texts: NDArray[np.int64]) -> Features:
        """See ``FeatureSource.batch``."""
        row = torch.from_numpy(positions)
        entry = row + torch.from_numpy(texts) * self._rows
        lengths = self._lengths[entry]
        place = torch.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        tokens = torch.where(mask, self._offsets[entry][:, None] + place, 0)
        hidden = self._states[tokens].float().masked_fill_(~mask[..., None], 0)
        source = None if self._sources is None else self._sources[row].float()
        return Features(hidden, mask, self._latents[row].float(), source)


class LiveFeatures:
    """Features computed when they are needed; only the encoded images are kept in memory."""

    def __init__(self, encoder: FrozenEncoder, table: pa.Table, texts: Sequence[str]) -> None:
        self._encoder = encoder
        self._table = table
        self._texts = list(texts)

    def batch(self, positions: NDArray[np.int64], texts: NDArray[np.int64]) -> Features:
        """See ``FeatureSource.batch``."""
        part = self._table.take(pa.array(positions))
        chosen = [
            part.column(self._texts[text])[at].as_py() for at, text in enumerate(texts.tolist())
        ]
        hidden, mask = self._encoder.states(chosen, self._encoder.see(part))
        latent, source = self._encoder.latents(part)
        # The clones leave inference mode, so that autograd may save them.
        return Features(
            hidden.float().clone(),
            mask.clone(),
            latent.float().clone(),
            None if source is None else source.float().clone(),
        )


class ShardFeatures:
    """Features read from feature shards; the frozen parts are not needed.

    Args:
        shards: The shards.
        rows: The worker's rows of them.
        texts: The text columns; text number ``t`` of ``batch`` is ``texts[t]``.
        in_memory: Read every row once and keep it as it is stored. Otherwise each batch is read
            when it is needed.
    """

    def __init__(
        self,
        shards: FeatureShards,
        rows: NDArray[np.int64],
        texts: Sequence[str],
        *,
        in_memory: bool,
    ) -> None:
        self._shards = shards
        self._rows = rows
        self._texts = list(texts)
        self._held = shards.read(rows, self._columns(self._texts)) if in_memory else None

    @property
    def encoding(self) -> str:
        """How the shards keep hidden states."""
        return self._shards.encoding

    @property
    def in_memory(self) -> bool:
        """Whether all rows are held."""
        return self._held is not None

    @property
    def nbytes(self) -> int:
        """Memory the features take; 0 where they are read when needed."""
        held = self._held or []
        return sum(len(item) for row in held for item in row.values() if isinstance(item, bytes))

    def count_cut(self, limit: int) -> int:
        """How many of the texts held reached ``limit`` tokens, as ``CachedFeatures`` counts."""
        held = self._held or []
        return sum(row[f"{text}_tokens"] >= limit for row in held for text in self._texts)

    def batch(self, positions: NDArray[np.int64], texts: NDArray[np.int64]) -> Features:
        """See ``FeatureSource.batch``.

        Raises:
            InputError: a row is damaged.
            StorageError: a file cannot be read.
        """
        names = [self._texts[text] for text in texts]
        rows = self._read(positions, sorted(set(names)))
        states = [self._states(row, name) for row, name in zip(rows, names, strict=True)]
        lengths = torch.tensor([len(one) for one in states])
        hidden = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        latent = torch.stack([_latent(row, "latent") for row in rows])
        source = None
        if "source_latent" in rows[0]:
            source = torch.stack([_latent(row, "source_latent") for row in rows])
        return Features(hidden, torch.arange(hidden.shape[1]) < lengths[:, None], latent, source)

    def _read(self, positions: NDArray[np.int64], texts: Sequence[str]) -> list[Row]:
        if self._held is not None:
            return [self._held[position] for position in positions]
        return self._shards.read(self._rows[positions], self._columns(texts))

    def _columns(self, texts: Sequence[str]) -> list[str]:
        parts = ["tokens", "states"]
        if self._shards.encoding == "int8":
            parts.append("scales")
        latents = ["latent", "source_latent"] if self._shards.edits else ["latent"]
        of_texts = [f"{text}_{part}" for text in texts for part in parts]
        return [*of_texts, "hidden_size", *latents, "latent_shape"]

    def _states(self, row: Row, text: str) -> torch.Tensor:
        """Hidden states (N, H) float32 of one text of a row."""
        shape = (row[f"{text}_tokens"], row["hidden_size"])
        data = row[f"{text}_states"]
        with _of_sample(row, f"{text}_states"):
            if self._shards.encoding == "int8":
                return unpack_int8(data, row[f"{text}_scales"], shape)
            return unpack_bf16(data, shape).float()


def _latent(row: Row, name: str) -> torch.Tensor:
    with _of_sample(row, name):
        return unpack_bf16(row[name], tuple(row["latent_shape"])).float()


@contextmanager
def _of_sample(row: Row, name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise InputError(f"the {name} of sample {row['id']!r} are damaged: {error}") from None


def by_length(table: pa.Table, texts: Sequence[str], size: int) -> list[NDArray[np.int64]]:
    """Row numbers in groups of ``size`` of similar text length, so that little is padding."""
    lengths = sum(pc.utf8_length(table.column(name)).to_numpy() for name in texts)
    order = np.argsort(lengths, kind="stable")
    return [order[first : first + size] for first in range(0, len(order), size)]


def _all_latents(
    encoder: FrozenEncoder, table: pa.Table, size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    latents, sources = [], []
    for first in range(0, table.num_rows, size):
        latent, source = encoder.latents(table.slice(first, size))
        latents.append(latent.to("cpu", torch.float16))
        if source is not None:
            sources.append(source.to("cpu", torch.float16))
    # Clones of what inference mode made, so that autograd may save them.
    return torch.cat(latents).clone(), torch.cat(sources).clone() if sources else None
