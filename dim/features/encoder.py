"""What the frozen parts say about a sample: hidden states of its text and image, and latents.

They never change while the painter learns, so each worker computes them once for its own samples
and keeps them as float16 (``CachedFeatures``). Where they would not fit, ``LiveFeatures`` computes
those of a batch when it is needed. Where ``dim data features`` has computed them before,
``ShardFeatures`` reads them.

All work in two parts. ``fetch`` reads and decodes, sample by sample, and may run in any thread
while the step before is computed; what is wrong with a sample takes its place. ``collate`` makes a
batch of what was fetched, on the worker's device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from dim.errors import InputError, SampleError
from dim.features.format import FrozenParts, unpack_bf16, unpack_int8
from dim.features.row_groups import Row, whole
from dim.features.shards import FeatureShards, Samples
from dim.images import decode_image
from dim.model.conditioner import ImageFeatures, Patches
from dim.model.config import VlmView
from dim.model.framing import centre_box, centre_crop
from dim.model.pixels import from_bytes, to_bytes
from dim.model.sizes import Size, check_size, nearest_shape

FetchedT = TypeVar("FetchedT")

_READ_AT_ONCE = 4  # forward passes of the frozen parts whose encoded images are held


@dataclass(frozen=True)
class Features:
    """One batch as the painter sees it.

    ``hidden_states`` (B, N, H), right-padded, float32, or float16 where they are kept so (the
    connector widens them, on its device); ``mask`` (B, N) bool, true for tokens; ``latent``
    (B, C, h, w) float32, the image to paint; ``source_latent`` the same, or ``None``.
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


class FeatureSource(Protocol[FetchedT]):
    """Batches of features by position among a worker's samples."""

    def fetch(
        self, positions: NDArray[np.int64], texts: NDArray[np.int64]
    ) -> list[FetchedT | SampleError]:
        """Samples ``positions`` (B,), each with its text number ``texts`` (B,).

        Raises:
            InputError: the data are not what they must be.
            StorageError: the store does not answer, or refuses.
        """
        ...

    def collate(self, fetched: Sequence[FetchedT]) -> Features:
        """The features of fetched samples, in that order."""
        ...

    def batch(self, positions: NDArray[np.int64], texts: NDArray[np.int64]) -> Features:
        """Both at once.

        Raises:
            SampleError: a sample cannot be used.
        """
        ...


@dataclass(frozen=True)
class Pictures:
    """A sample's images, decoded and cut to its shape, each once.

    ``target``: uint8 (height, width, 3), the image to paint; ``source`` the same, and ``patches``
    what the vision tower takes of it, or ``None`` without a source.
    """

    target: torch.Tensor
    source: torch.Tensor | None
    patches: Patches | None


class FrozenEncoder:
    """Runs the frozen parts of a DIM on samples of an edit or text-to-image table.

    Args:
        model: Its conditioner and autoencoder are used, without gradients.
        edits: Whether samples have a source (``image``) and a target (``image_target``).
        resolution: The side of the painted image in pixels.
        buckets: Cut each sample to that of SANA's shapes in which ``DIM.edit`` paints its source
            (or, without one, its image), instead of a square. The target of an edit has its
            source's shape, whatever its own is.
        vlm_view: Whether the vision tower sees the ``whole`` source, or the ``region`` of it that
            is left when it is cut.

    Raises:
        InputError: the autoencoder cannot work at ``resolution``.
    """

    def __init__(
        self,
        model: FrozenParts,
        *,
        edits: bool,
        resolution: int,
        buckets: bool = False,
        vlm_view: VlmView = "whole",
    ) -> None:
        check_size((resolution, resolution), model.autoencoder.factor)
        self._model = model
        self._edits = edits
        self._resolution = resolution
        self._cell = model.cell if buckets else None
        self._vlm_view = vlm_view

    @property
    def device(self) -> torch.device:
        """Where the frozen parts are."""
        return next(self._model.autoencoder.parameters()).device

    def prepare(self, row: Row) -> Pictures:
        """Decode and cut the images of a sample; needs no device, and may run in any thread.

        For a GPU they come in pinned memory, from where a copy does not hold up the step.

        Raises:
            SampleError: one cannot be decoded, or has another shape than the row's ``width`` and
                ``height`` say, if it has them.
        """
        image = _decoded(row, "image")
        shape = self._shape(image, row)
        if not self._edits:
            return Pictures(self._bytes(centre_crop(image, shape)), None, None)
        region = centre_box(image.size, shape) if self._vlm_view == "region" else None
        patches = self._model.conditioner.patches(image, region)
        return Pictures(
            self._bytes(centre_crop(_decoded(row, "image_target"), shape)),
            self._bytes(centre_crop(image, shape)),
            Patches(self._pinned(patches.pixels), patches.grid, patches.key),
        )

    def cut(self, row: Row) -> tuple[Image.Image, Image.Image | None]:
        """The image to paint and, of an edit, its source, as ``prepare`` cuts them.

        Raises:
            SampleError: as for ``prepare``.
        """
        image = _decoded(row, "image")
        shape = self._shape(image, row)
        if not self._edits:
            return centre_crop(image, shape), None
        target = _decoded(row, "image_target")
        return centre_crop(target, shape), centre_crop(image, shape)

    @torch.inference_mode()
    def see(self, pictures: Sequence[Pictures]) -> ImageFeatures | None:
        """What the vision tower makes of the samples' source images; ``None`` without sources."""
        if not self._edits:
            return None
        return self._model.conditioner.see([one.patches for one in pictures])

    @torch.inference_mode()
    def states(
        self, texts: Sequence[str], seen: ImageFeatures | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (B, N, H) and mask (B, N) of ``texts`` with what was seen."""
        return self._model.conditioner.encode(texts, seen)

    @torch.inference_mode()
    def latents(
        self, pictures: Sequence[Pictures]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Latents (C, h, w) of the images to paint and, for edits, of their sources.

        Those of one shape pass the autoencoder together.
        """
        latents = self._latents([one.target for one in pictures])
        sources = [one.source for one in pictures if one.source is not None]
        return latents, self._latents(sources) if sources else None

    def _latents(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        for places in by_shape(images):
            moved = [images[place].to(self.device, non_blocking=True) for place in places]
            encoded = self._model.autoencoder.encode(from_bytes(torch.stack(moved)))
            found |= zip(places, encoded, strict=True)
        return [found[place] for place in range(len(images))]

    def _shape(self, image: Image.Image, row: Row) -> Size:
        if self._cell is None:
            return self._resolution, self._resolution
        shape = nearest_shape(image.size, self._resolution, self._cell)
        width, height = row.get("width"), row.get("height")
        if not (isinstance(width, int) and isinstance(height, int) and min(width, height) > 0):
            return shape
        # Its place in a batch of one shape was given to it for what its record says.
        if nearest_shape((width, height), self._resolution, self._cell) != shape:
            raise SampleError(
                f"the image of sample {row['id']} is {image.width}x{image.height}, and its record "
                f"says {width}x{height}, which is another shape",
                "wrong_size",
            )
        return shape

    def _bytes(self, image: Image.Image) -> torch.Tensor:
        return self._pinned(to_bytes(image))

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return pinned(tensor, self.device)


@dataclass(frozen=True)
class _Encoded:
    """One sample: hidden states (N, H) of each text, and latents, all float16 on the CPU."""

    states: list[torch.Tensor]
    latent: torch.Tensor
    source: torch.Tensor | None


class _Stacks:
    """Tensors of several shapes; those of one shape lie in one tensor.

    ``rows``: which of them lie in each.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.rows = by_shape(tensors)
        # Clones of what inference mode made, so that autograd may save them.
        self._stacks = [torch.stack([tensors[row] for row in rows]).clone() for rows in self.rows]
        self._stack = torch.empty(len(tensors), dtype=torch.int64)
        self._place = torch.empty(len(tensors), dtype=torch.int64)
        for number, rows in enumerate(self.rows):
            self._stack[rows] = number
            self._place[rows] = torch.arange(len(rows))

    @property
    def nbytes(self) -> int:
        """Memory they take."""
        return sum(stack.nbytes for stack in self._stacks)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Some of them, which have one shape, in one tensor."""
        stacks = [self._stacks[number] for number in self._stack[rows].unique().tolist()]
        _one_shape([stack[0] for stack in stacks])
        return stacks[0][self._place[rows]]


class CachedFeatures:
    """Every feature of a worker's samples, in memory.

    Hidden states of all samples and texts lie in one (tokens, H) float16 tensor with offsets, so a
    batch is a single gather. Encoded images are read in the order in which they lie, and no more
    of them are held than a few forward passes take.

    Args:
        encoder: The frozen parts.
        samples: The worker's samples.
        texts: The text columns; text number ``t`` of ``batch`` is ``texts[t]``.
        encode_batch: Samples per forward pass of the frozen parts.
        threads: That decode images.
        progress: Called with (samples done, samples to do).

    Attributes:
        bad: What is wrong with samples that cannot be used, by position.

    Raises:
        SampleError: none of the samples can be used.
        InputError: the data are not what they must be.
        StorageError: the store does not answer, or refuses.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        samples: Samples,
        texts: Sequence[str],
        *,
        encode_batch: int = 64,
        threads: int = 1,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.bad: dict[int, SampleError] = {}
        good: dict[int, _Encoded] = {}
        done = 0
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            for places, rows in _groups(samples, texts, encode_batch):
                pictures = list(pool.map(partial(_attempt, encoder.prepare), rows))
                for place, found in _encode(encoder, places, rows, pictures, texts).items():
                    if isinstance(found, SampleError):
                        self.bad[place] = found
                    else:
                        good[place] = found
                done += len(rows)
                progress(done, len(samples))
        if not good:
            raise next(iter(self.bad.values()))
        places = sorted(good)
        self._rows = len(places)
        self._row_of = torch.full((len(samples),), -1)
        self._row_of[places] = torch.arange(self._rows)
        parts = [good[place] for place in places]
        self._latents = _Stacks([one.latent for one in parts])
        sources = [one.source for one in parts if one.source is not None]
        self._sources = _Stacks(sources) if sources else None
        in_order = [one.states[text] for text in range(len(texts)) for one in parts]
        self._states = torch.cat(in_order)
        self._lengths = torch.tensor([len(one) for one in in_order])
        self._offsets = torch.cumsum(self._lengths, 0) - self._lengths

    @property
    def nbytes(self) -> int:
        """Memory the features take."""
        held = (self._states, self._latents, self._sources)
        return sum(item.nbytes for item in held if item is not None)

    def by_shape(self) -> list[list[int]]:
        """Positions of the samples that can be used, those of one shape together."""
        (positions,) = np.nonzero(self._row_of.numpy() >= 0)
        return [positions[rows].tolist() for rows in self._latents.rows]

    def count_cut(self, limit: int) -> int:
        """How many texts reached ``limit`` tokens, so that they may have lost their beginning."""
        return int((self._lengths >= limit).sum())

    def fetch(
        self, positions: NDArray[np.int64], texts: NDArray[np.int64]
    ) -> list[tuple[int, int] | SampleError]:
        """See ``FeatureSource.fetch``; there is nothing to read."""
        pairs = zip(positions.tolist(), texts.tolist(), strict=True)
        return [self.bad.get(position, (position, text)) for position, text in pairs]

    def collate(self, fetched: Sequence[tuple[int, int]]) -> Features:
        """See ``FeatureSource.collate``."""
        row = self._row_of[[position for position, _ in fetched]]
        entry = row + torch.tensor([text for _, text in fetched]) * self._rows
        lengths = self._lengths[entry]
        place = torch.arange(int(lengths.max()))
        mask = place < lengths[:, None]
        tokens = torch.where(mask, self._offsets[entry][:, None] + place, 0)
        hidden = self._states[tokens].masked_fill_(~mask[..., None], 0)
        source = None if self._sources is None else self._sources.take(row).float()
        return Features(hidden, mask, self._latents.take(row).float(), source)

    def batch(self, positions: NDArray[np.int64], texts: NDArray[np.int64]) -> Features:
        """See ``FeatureSource.batch``."""
        return self.collate(whole(self.fetch(positions, texts)))


@dataclass(frozen=True)
class Decoded:
    """A sample before the frozen parts: its text and its images."""

    text: str
    pictures: Pictures


class LiveFeatures:
    """Features computed when they are needed; nothing is held.

    Args:
        encoder: The frozen parts.
        samples: The worker's samples.
        texts: The text columns; text number ``t`` of ``batch`` is ``texts[t]``.
        threads: That decode images.
    """

    def __init__(
        self, encoder: FrozenEncoder, samples: Samples, texts: Sequence[str], *, threads: int = 1
    ) -> None:
        self._encoder = encoder
        self._samples = samples
        self._texts = list(texts)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def fetch(
        self, positions: NDArray[np.int64], texts: NDArray[np.int64]
    ) -> list[Decoded | SampleError]:
        """See ``FeatureSource.fetch``: reads and decodes."""
        rows = self._samples.fetch(positions)
        columns = [self._texts[text] for text in texts.tolist()]
        return list(self._pool.map(self._decode, rows, columns))

    def collate(self, fetched: Sequence[Decoded]) -> Features:
        """See ``FeatureSource.collate``: runs the frozen parts."""
        pictures = [one.pictures for one in fetched]
        _one_shape([one.target for one in pictures])
        seen = self._encoder.see(pictures)
        hidden, mask = self._encoder.states([one.text for one in fetched], seen)
        latents, sources = self._encoder.latents(pictures)
        # The clones leave inference mode, so that autograd may save them; so does a stack.
        return Features(
            hidden.float().clone(),
            mask.clone(),
            torch.stack(latents).float(),
            None if sources is None else torch.stack(sources).float(),
        )

    def batch(self, positions: NDArray[np.int64], texts: NDArray[np.int64]) -> Features:
        """See ``FeatureSource.batch``."""
        return self.collate(whole(self.fetch(positions, texts)))

    def _decode(self, row: Row | SampleError, column: str) -> Decoded | SampleError:
        return _attempt(lambda good: Decoded(good[column], self._encoder.prepare(good)), row)


@dataclass(frozen=True)
class Stored:
    """A sample's features as they were kept: states (N, H), latents (C, h, w), float32 or less."""

    states: torch.Tensor
    latent: torch.Tensor
    source_latent: torch.Tensor | None


class ShardFeatures:
    """Features read from feature shards; the frozen parts are not needed.

    Args:
        shards: The shards.
        rows: The worker's rows of them.
        texts: The text columns; text number ``t`` of ``batch`` is ``texts[t]``.
        in_memory: Read every row once and keep it as it is stored. Otherwise each batch is read
            when it is needed.
        device: Where batches are put together.
    """

    def __init__(
        self,
        shards: FeatureShards,
        rows: NDArray[np.int64],
        texts: Sequence[str],
        *,
        in_memory: bool,
        device: torch.device | None = None,
    ) -> None:
        self._shards = shards
        self._rows = rows
        self._texts = list(texts)
        self._device = device or torch.device("cpu")
        self._held = shards.fetch(rows, self._columns(self._texts)) if in_memory else None

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
        return sum(
            len(item) for row in self._good() for item in row.values() if isinstance(item, bytes)
        )

    def count_cut(self, limit: int) -> int:
        """How many of the texts held reached ``limit`` tokens, as ``CachedFeatures`` counts."""
        return sum(row[f"{text}_tokens"] >= limit for row in self._good() for text in self._texts)

    def fetch(
        self, positions: NDArray[np.int64], texts: NDArray[np.int64]
    ) -> list[Stored | SampleError]:
        """See ``FeatureSource.fetch``: reads, where they are not held."""
        found: list[Stored | SampleError | None] = [None] * len(positions)
        for text in np.unique(texts).tolist():
            (chosen,) = np.nonzero(texts == text)
            name = self._texts[text]
            unpack = partial(_attempt, partial(self._unpack, name))
            for place, row in zip(chosen, self._read(positions[chosen], name), strict=True):
                found[place] = unpack(row)
        return [item for item in found if item is not None]

    def collate(self, fetched: Sequence[Stored]) -> Features:
        """See ``FeatureSource.collate``."""
        states = [self._moved(one.states).float() for one in fetched]
        lengths = torch.tensor([len(one) for one in states], device=self._device)
        hidden = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        mask = torch.arange(hidden.shape[1], device=self._device) < lengths[:, None]
        _one_shape([one.latent for one in fetched])
        latent = torch.stack([self._moved(one.latent) for one in fetched]).float()
        sources = [one.source_latent for one in fetched if one.source_latent is not None]
        source = torch.stack([self._moved(one) for one in sources]).float() if sources else None
        return Features(hidden, mask, latent, source)

    def batch(self, positions: NDArray[np.int64], texts: NDArray[np.int64]) -> Features:
        """See ``FeatureSource.batch``."""
        return self.collate(whole(self.fetch(positions, texts)))

    def _good(self) -> Iterator[Row]:
        return (row for row in self._held or [] if not isinstance(row, SampleError))

    def _read(self, positions: NDArray[np.int64], text: str) -> list[Row | SampleError]:
        if self._held is not None:
            return [self._held[position] for position in positions]
        return self._shards.fetch(self._rows[positions], self._columns([text]))

    def _columns(self, texts: Sequence[str]) -> list[str]:
        parts = ["states", "scales"] if self._shards.encoding == "int8" else ["states"]
        latents = ["latent", "source_latent"] if self._shards.edits else ["latent"]
        of_texts = [f"{text}_{part}" for text in texts for part in parts]
        # Of the other texts the lengths, so that a sample without one is none whichever is drawn.
        lengths = [f"{text}_tokens" for text in self._texts]
        return [*of_texts, *lengths, "hidden_size", *latents, "latent_shape"]

    def _unpack(self, text: str, row: Row) -> Stored:
        source = self._latent(row, "source_latent") if self._shards.edits else None
        return Stored(self._states(row, text), self._latent(row, "latent"), source)

    def _states(self, row: Row, text: str) -> torch.Tensor:
        """Hidden states (N, H) of one text of a row."""
        shape = (row[f"{text}_tokens"], row["hidden_size"])
        data = row[f"{text}_states"]
        with _of_sample(row, f"{text}_states"):
            if self._shards.encoding == "int8":
                return pinned(unpack_int8(data, row[f"{text}_scales"], shape), self._device)
            return pinned(unpack_bf16(data, shape), self._device)

    def _latent(self, row: Row, name: str) -> torch.Tensor:
        with _of_sample(row, name):
            return pinned(unpack_bf16(row[name], tuple(row["latent_shape"])), self._device)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` where a copy to ``device`` does not hold up what runs there."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def by_length(rows: Sequence[Row], texts: Sequence[str], size: int) -> list[NDArray[np.int64]]:
    """Row numbers in groups of ``size`` of similar text length, so that little is padding."""
    lengths = [sum(len(row[name]) for name in texts) for row in rows]
    order = np.argsort(lengths, kind="stable")
    return [order[first : first + size] for first in range(0, len(order), size)]


def by_shape(tensors: Sequence[torch.Tensor]) -> list[list[int]]:
    """Places of the tensors, those of one shape together."""
    groups: dict[torch.Size, list[int]] = {}
    for place, tensor in enumerate(tensors):
        groups.setdefault(tensor.shape, []).append(place)
    return list(groups.values())


def _one_shape(tensors: Sequence[torch.Tensor]) -> None:
    """Refuse what cannot be one batch.

    Raises:
        InputError: the tensors have several shapes.
    """
    found = dict.fromkeys(tuple(tensor.shape) for tensor in tensors)
    if len(found) > 1:
        shapes = " and ".join("x".join(map(str, shape)) for shape in found)
        raise InputError(f"a batch has samples of several shapes ({shapes}): it must have one")


def _groups(
    samples: Samples, texts: Sequence[str], size: int
) -> Iterator[tuple[list[int], list[Row | SampleError]]]:
    """All samples with their positions, ``size`` at a time; the next ones are read meanwhile."""
    order = samples.stored_order()
    parts = np.split(order, range(_READ_AT_ONCE * size, len(order), _READ_AT_ONCE * size))
    with ThreadPoolExecutor(1, thread_name_prefix="read") as thread:
        reading = thread.submit(samples.fetch, parts[0])
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            found = reading.result()
            if following is not None:
                reading = thread.submit(samples.fetch, following)
            places = part.tolist()
            bad = [number for number, row in enumerate(found) if isinstance(row, SampleError)]
            if bad:
                yield [places[number] for number in bad], [found[number] for number in bad]
            good = [number for number in range(len(found)) if number not in set(bad)]
            for chosen in by_length(whole([found[number] for number in good]), texts, size):
                numbers = [good[place] for place in chosen]
                yield [places[number] for number in numbers], [found[number] for number in numbers]


def _encode(
    encoder: FrozenEncoder,
    places: Sequence[int],
    rows: Sequence[Row | SampleError],
    pictures: Sequence[Pictures | SampleError],
    texts: Sequence[str],
) -> dict[int, _Encoded | SampleError]:
    """A group of samples after one forward pass, by position, or what is wrong with them."""
    found: dict[int, _Encoded | SampleError] = {
        place: one
        for place, one in zip(places, pictures, strict=True)
        if isinstance(one, SampleError)
    }
    usable = [
        (place, row, one)
        for place, row, one in zip(places, rows, pictures, strict=True)
        if not isinstance(row, SampleError) and not isinstance(one, SampleError)
    ]
    if not usable:
        return found
    shown = [one for _, _, one in usable]
    seen = encoder.see(shown)
    states: list[list[torch.Tensor]] = [[] for _ in usable]
    for column in texts:
        hidden, mask = encoder.states([row[column] for _, row, _ in usable], seen)
        for kept, one, tokens in zip(states, hidden, mask.sum(1).tolist(), strict=True):
            kept.append(one[:tokens].to("cpu", torch.float16))
    latents, sources = encoder.latents(shown)
    for number, (place, row, _) in enumerate(usable):
        source = None if sources is None else sources[number].to("cpu", torch.float16)
        one = _Encoded(states[number], latents[number].to("cpu", torch.float16), source)
        found[place] = _attempt(partial(_check_finite, one), row)
    return found


def _check_finite(encoded: _Encoded, row: Row) -> _Encoded:
    """What is kept of a sample.

    Raises:
        SampleError: a number of it is none in float16.
    """
    tensors = [*encoded.states, encoded.latent, encoded.source]
    if all(bool(one.isfinite().all()) for one in tensors if one is not None):
        return encoded
    raise SampleError(
        f"features of sample {row['id']} cannot be kept as float16, which ends at 65,504: "
        "cache_features: false takes them as they are",
        "damaged_features",
    )


def _attempt(action: Callable[[Row], FetchedT], row: Row | SampleError) -> FetchedT | SampleError:
    """``action`` on a row, or what is wrong with it."""
    if isinstance(row, SampleError):
        return row
    try:
        return action(row)
    except SampleError as error:
        return error


def _decoded(row: Row, column: str) -> Image.Image:
    try:
        return decode_image(row[column], name=f"the {column} of sample {row['id']}")
    except InputError as error:
        raise SampleError(str(error), "undecodable") from None


@contextmanager
def _of_sample(row: Row, name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        said = f"the {name} of sample {row['id']!r} are damaged: {error}"
        raise SampleError(said, "damaged_features") from None
