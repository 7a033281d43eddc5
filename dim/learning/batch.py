"""A batch: which samples, texts, noise levels and noise make up a step.

All of it is a pure function of seed, step and slot, and of a salt for a run that went back and must
not meet the same noise again. Nothing is drawn from a running generator, so
there is no generator state to save: an interrupted run, a run with another number of workers and
the undisturbed run have the same batches.

A global batch has ``batch_size`` slots. Each slot owns a fixed share of the samples and walks
through it in a new order every epoch. So a worker that owns a set of slots sees only its own
samples (and can keep their features in memory), while the content of every global batch depends
neither on the number of workers nor on where the run was interrupted. Where samples have several
shapes (``dim.learning.buckets``) a batch holds one of these, and a slot a share of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dim.model.flow import noise_levels

BLOCK = 256  # neighbouring rows: as many as data jobs put into a row group at most
_GOLDEN = 0.618034  # between copies of a block: multiples of it lie far apart in [0, 1)


class Turn(NamedTuple):
    """Whose turn it is at a step: the epoch, and step ``step`` of that epoch of ``shape``."""

    epoch: int
    shape: int
    step: int


class Order(Protocol):
    """The order of samples in steps of one shape each, with ``shapes`` of these.

    A ``SampleOrder`` knows of one; a ``dim.learning.buckets.BucketOrder`` of many. ``repeats``:
    whether a row may be there several times, in one slot's share or in several.
    """

    rows: int
    batch_size: int
    steps_per_epoch: int
    shapes: int
    repeats: bool

    def shares(self, slots: Sequence[int]) -> list[NDArray[np.int64]]:
        """The row numbers that each of ``slots`` can take of each shape, shape after shape."""
        ...

    def without_samples(self) -> Order:
        """The same for who knows the shares already: it holds nothing of the data's size."""
        ...

    def of_shape(self, shape: int) -> SampleOrder:
        """By which a slot walks its share of a shape."""
        ...

    def turn(self, step: int) -> Turn:
        """Whose turn it is at ``step`` (from 0)."""
        ...


class SampleOrder:
    """The order of samples in global batches of ``batch_size``.

    An epoch is ``steps_per_epoch`` batches; the remainder rests, another one each epoch. With
    fewer samples than slots, they repeat so that every slot has one.

    Args:
        rows: Samples of the data.
        batch_size: Slots of a batch.
        seed: Another one gives another order.
        window: How far samples are mixed. ``None``: any sample may follow any other. A number: a
            slot's samples are runs of ``BLOCK`` neighbours, the runs in random order, and in that
            sequence each sample moves by up to ``window`` places. So what a slot needs next lies
            in a few row groups, each of which has to be read once.
        samples: The row numbers (int64) that an epoch walks; a row may be there several times. Each
            slot owns neighbours of the array, so its order says what comes together in a batch.
            Within a window, orders of the same seed and data pass a block of rows at about the
            same time. ``None``: every row once.
        ends: How many rows there are up to the end of each source, if a slot that has samples of
            several is to walk them side by side, in even proportions.
        least: Rows that a slot can take, if there are so many. Those beyond its own are other
            slots', and taken only in place of ones that cannot be used.
    """

    shapes = 1

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        *,
        window: int | None = None,
        samples: NDArray[np.int64] | None = None,
        ends: Sequence[int] = (),
        least: int = 1,
    ) -> None:
        self._count = rows if samples is None else len(samples)
        if self._count < 1:
            raise ValueError("there is no sample to order")
        self.rows = rows
        self.batch_size = batch_size
        self.samples = samples
        self.repeats = samples is not None
        self.steps_per_epoch = steps_per_epoch(self._count, batch_size)
        self._seed = seed
        self._window = window
        self._ends = np.array(ends, np.int64)
        self._every_row = samples is None
        self._least = least

    def without_samples(self) -> SampleOrder:
        """See ``Order``."""
        light = copy(self)
        light.samples = None
        return light

    def of_shape(self, shape: int) -> SampleOrder:
        """See ``Order``: there is one."""
        return self

    def turn(self, step: int) -> Turn:
        """See ``Order``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return Turn(epoch, 0, place)

    def shares(self, slots: Sequence[int]) -> list[NDArray[np.int64]]:
        """The row numbers of each of ``slots`` (8 bytes a row of the data meanwhile)."""
        base = self.samples
        if base is None:
            base = shuffled(self.rows, self._seed, self._window)
        filled = np.resize(base, self.batch_size) if self._count < self.batch_size else base
        owned = [filled[self._owned(slot)].copy() for slot in slots]
        return self._filled_up(owned, base, slots) if self._least > 1 else owned

    def walk(self, slot: int, epoch: int, share: NDArray[np.int64]) -> NDArray[np.int64]:
        """The order in which ``slot`` walks its ``share`` in ``epoch``, as indices into it.

        The first ``steps_per_epoch`` are the epoch's; what is left over rests.
        """
        generator = np.random.default_rng([self._seed, 1 + epoch, slot])
        owned = self._owned(slot)
        own = len(range(owned.start, owned.stop, owned.step))
        walk = self._mixed(generator, share[:own])
        if len(self._ends):
            walk = walk[_evenly(np.searchsorted(self._ends, share[walk], side="right"))]
        return np.concatenate([walk, np.arange(own, len(share))])

    def _owned(self, slot: int) -> slice:
        """Which part of the sequence of all samples ``slot`` owns."""
        size, slots = max(self._count, self.batch_size), self.batch_size
        if self._every_row and self._window is None:
            return slice(slot, size, slots)
        return slice(slot * size // slots, (slot + 1) * size // slots, 1)

    def _filled_up(
        self, owned: list[NDArray[np.int64]], base: NDArray[np.int64], slots: Sequence[int]
    ) -> list[NDArray[np.int64]]:
        """What ``slots`` own, and of others' so many rows that each has ``least`` of them."""
        own = [len(np.unique(mine)) for mine in owned]
        if min(own) >= self._least:
            return owned
        distinct = base[np.sort(np.unique(base, return_index=True)[1])]
        found = []
        for mine, slot, count in zip(owned, slots, own, strict=True):
            near = np.arange(slot, slot + min(2 * self._least, len(distinct))) % len(distinct)
            others = distinct[near][~np.isin(distinct[near], mine)]
            found.append(np.concatenate([mine, others[: max(0, self._least - count)]]))
        return found

    def _mixed(self, generator: np.random.Generator, share: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._window is None:
            return generator.permutation(len(share))
        run = np.cumsum(np.diff(share // BLOCK, prepend=share[0] // BLOCK) != 0)
        if self._every_row:
            key = generator.permutation(run[-1] + 1)
        else:
            block = share[np.flatnonzero(np.diff(run, prepend=-1))] // BLOCK
            keys = generator.random(math.ceil(self.rows / BLOCK))[block]
            key = (keys + _GOLDEN * times_before(block)) % 1
        in_runs = np.argsort(key[run], kind="stable")
        moved = np.arange(len(share)) + self._window * generator.random(len(share))
        return in_runs[np.argsort(moved, kind="stable")]


def _evenly(kinds: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order in which things of several kinds alternate, those of a kind in their own order."""
    counts = np.bincount(kinds)
    if counts.max() == len(kinds):
        return np.arange(len(kinds))
    by_kind = np.argsort(kinds, kind="stable")
    within = np.arange(len(kinds)) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_kind[np.argsort((within + 0.5) / np.repeat(counts, counts), kind="stable")]


@dataclass(frozen=True)
class Place:
    """Where each of a worker's slots stands at a step.

    ``walks``: for each slot, all positions (into the worker's rows) that it can take, in this
    epoch's order; ``step``: how far they have come; ``shape``: that the samples have.
    """

    walks: Sequence[NDArray[np.int64]]
    step: int
    shape: int = 0

    def positions(self) -> NDArray[np.int64]:
        """The samples of the step, one a slot."""
        return np.array([walk[self.step] for walk in self.walks], np.int64)

    def instead(self, slot: int, tries: int) -> NDArray[np.int64] | None:
        """(1,): what ``slot`` takes where its sample and ``tries`` - 1 after it cannot be used.

        It is the next one of its walk, which begins anew at its end; ``None`` when it has seen all.
        So it depends on seed, step and which samples cannot be used, and on no other slot.
        """
        walk = self.walks[slot]
        if tries >= len(walk):
            return None
        return walk[[(self.step + tries) % len(walk)]]


class WorkerOrder:
    """One worker's part of an ``Order``: slots ``rank``, ``rank + world_size``, …

    ``rows`` (int64) are the dataset rows this worker needs, so that ``batch`` can answer with
    positions into them: slot after slot, or of samples that repeat, each row once and in order.
    ``total`` is how many the dataset has, ``shapes`` how many shapes its steps have.
    """

    def __init__(self, order: Order, rank: int, world_size: int) -> None:
        self.total = order.rows
        self.shapes = order.shapes
        self.slots = range(rank, order.batch_size, world_size)
        shares = order.shares(self.slots)
        owned = np.concatenate(shares)
        self._starts = np.cumsum([0] + [len(share) for share in shares[:-1]])
        self._shares = np.split(owned, self._starts[1:])  # views: a share may be millions
        self.rows, self._positions = owned, None
        if order.repeats:
            self.rows, self._positions = np.unique(owned, return_inverse=True)
        self._order = order.without_samples()
        self._walks: dict[int, tuple[int, list[NDArray[np.int64]]]] = {}  # by shape, of an epoch

    def batch(self, step: int) -> NDArray[np.int64]:
        """Positions into ``rows`` of this worker's part of the global batch of ``step``."""
        return self.at(step).positions()

    def at(self, step: int) -> Place:
        """Where this worker's slots stand at ``step`` (from 0)."""
        return self._place(self._order.turn(step))

    def beginning(self, shape: int) -> Place:
        """Where this worker's slots stand at the very first step of ``shape``."""
        return self._place(Turn(0, shape, 0))

    def passes(self, micro_batch: int | None) -> Passes:
        """How this worker's slots are cut into forward passes of at most ``micro_batch`` rows."""
        world_size = self.slots.step
        most = math.ceil(self._order.batch_size / world_size)
        return Passes(len(self.slots), most, micro_batch)

    def _place(self, turn: Turn) -> Place:
        epoch, walks = self._walks.get(turn.shape, (None, []))
        if epoch != turn.epoch:
            walks = self._walked(turn.shape, turn.epoch)
            self._walks[turn.shape] = turn.epoch, walks
        return Place(walks, turn.step, turn.shape)

    def _walked(self, shape: int, epoch: int) -> list[NDArray[np.int64]]:
        order, first = self._order.of_shape(shape), shape * len(self.slots)
        walks = [
            self._starts[first + place] + order.walk(slot, epoch, self._shares[first + place])
            for place, slot in enumerate(self.slots)
        ]
        positions = self._positions
        return walks if positions is None else [positions[walk] for walk in walks]


class Passes:
    """The forward passes in which a worker goes through its slots in one step.

    All workers make ``count`` passes of ``rows`` rows each, whatever they own: one that made fewer
    would leave the others waiting, and rows that vary would be new shapes. A worker with less to
    do repeats some of its slots. A repeated row counts nothing.

    Args:
        own: Slots of this worker.
        most: Slots of the worker that has most.
        micro_batch: Rows of a pass at most; ``None`` for all in one pass.
    """

    def __init__(self, own: int, most: int, micro_batch: int | None) -> None:
        self.count = math.ceil(most / min(micro_batch or most, most))
        self.rows = math.ceil(most / self.count)
        every = np.arange(self.count * self.rows).reshape(self.count, self.rows)
        self._places = every % own
        self._counted = torch.from_numpy(every < own)

    def places(self, number: int) -> NDArray[np.int64]:
        """The rows (``rows``,) of pass ``number``, as places among the worker's slots."""
        return self._places[number]

    def counted(self, number: int) -> torch.Tensor:
        """Which rows (``rows``,) of pass ``number`` are no repetitions, bool."""
        return self._counted[number]


def shuffled(rows: int, seed: int, window: int | None) -> NDArray[np.int64]:
    """All rows in random order; where they are mixed within a window, in blocks of neighbours."""
    generator = np.random.default_rng([seed, rows])
    if window is None:
        # Slots must not be residues of the row number: neighbours may be of one kind.
        return generator.permutation(rows)
    blocks = np.array_split(np.arange(rows), range(BLOCK, rows, BLOCK))
    order = generator.permutation(len(blocks))
    return np.concatenate([blocks[number] for number in order])


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches in which every one of ``rows`` samples is seen once, a remainder left out."""
    return max(1, rows // batch_size)


def times_before(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each of ``values`` (N,) stands before its place."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    before = np.empty(len(values), np.int64)
    before[order] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return before


@dataclass(frozen=True)
class Draws:
    """What one step draws for ``B`` rows.

    ``noise`` (B, C, h, w) float32 from N(0, 1); ``index`` (B,) int64, the place in the table of
    sigmas; ``dropped`` (B,) bool, rows whose condition is replaced by the null condition;
    ``choice`` (B,) float64 in [0, 1), which of the mixed texts.
    """

    noise: torch.Tensor
    index: torch.Tensor
    dropped: torch.Tensor
    choice: NDArray[np.float64]

    def take(self, rows: Sequence[int]) -> Draws:
        """The same for some of the rows."""
        part = list(rows)
        return Draws(self.noise[part], self.index[part], self.dropped[part], self.choice[part])


def draw(
    seed: int,
    step: int,
    slots: Sequence[int],
    shape: tuple[int, int, int],
    *,
    dropout: float,
    salt: int = 0,
) -> Draws:
    """Draw for the rows of one worker; ``shape`` (C, h, w) is that of a row's noise.

    ``salt`` is 0 for the draws of an ordinary run, and any other number for other draws.
    """
    generator = torch.Generator()
    noise, scalars = [], []
    for slot in slots:
        numbers = [seed, step, slot, salt] if salt else [seed, step, slot]
        entropy = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(entropy >> np.uint64(1)))
        noise.append(torch.randn(shape, generator=generator))
        scalars.append(
            torch.cat([torch.randn(1, generator=generator), torch.rand(2, generator=generator)])
        )
    level, drop, choice = torch.stack(scalars).unbind(1)
    return Draws(torch.stack(noise), noise_levels(level), drop < dropout, choice.double().numpy())


def choose_texts(choice: NDArray[np.float64], shares: Sequence[float]) -> NDArray[np.int64]:
    """Text numbers (B,) for draws ``choice`` (B,) in [0, 1), according to ``shares``."""
    edges = np.cumsum(shares)[:-1]
    return np.searchsorted(edges, choice, side="right").astype(np.int64)
