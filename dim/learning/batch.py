"""A batch: which samples, texts, noise levels and noise make up a step.

All of it is a pure function of seed, step and slot, and of a salt for a run that went back and must
not meet the same noise again. Nothing is drawn from a running generator, so
there is no generator state to save: an interrupted run, a run with another number of workers and
the undisturbed run have the same batches.

A global batch has ``batch_size`` slots. Each slot owns a fixed share of the samples and walks
through it in a new order every epoch. So a worker that owns a set of slots sees only its own
samples (and can keep their features in memory), while the content of every global batch depends
neither on the number of workers nor on where the run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dim.model.flow import noise_levels

BLOCK = 256  # neighbouring rows: as many as data jobs put into a row group at most


class SampleOrder:
    """The order of ``rows`` samples in global batches of ``batch_size``.

    An epoch is ``steps_per_epoch`` batches; the remainder rests, another one each epoch. With
    fewer rows than slots, rows repeat so that every slot has one.

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
            ``None``: every row once.
        ends: How many rows there are up to the end of each source, if a slot that has samples of
            several is to walk them side by side, in even proportions.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        *,
        window: int | None = None,
        samples: NDArray[np.int64] | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        count = rows if samples is None else len(samples)
        if count < 1:
            raise ValueError("there is no sample to order")
        self.rows = rows
        self.batch_size = batch_size
        self.samples = samples
        self.steps_per_epoch = steps_per_epoch(count, batch_size)
        self._seed = seed
        self._window = window
        self._ends = np.array(ends, np.int64)

    def shares(self, slots: Sequence[int]) -> list[NDArray[np.int64]]:
        """The row numbers that each of ``slots`` owns (8 bytes a row of the data meanwhile)."""
        if self.samples is not None:
            few = len(self.samples) < self.batch_size
            base = np.resize(self.samples, self.batch_size) if few else self.samples
            return self._cut(base, slots)
        generator = np.random.default_rng([self._seed, self.rows])
        size = max(self.rows, self.batch_size)
        if self._window is None:
            # Slots must not be residues of the row number: neighbours may be of one kind.
            base = np.resize(generator.permutation(self.rows), size)
            return [base[slot :: self.batch_size].copy() for slot in slots]
        blocks = np.array_split(np.arange(self.rows), range(BLOCK, self.rows, BLOCK))
        order = generator.permutation(len(blocks))
        base = np.resize(np.concatenate([blocks[number] for number in order]), size)
        return self._cut(base, slots)

    def _cut(self, base: NDArray[np.int64], slots: Sequence[int]) -> list[NDArray[np.int64]]:
        """Each slot's neighbours of ``base``."""
        cuts = np.arange(self.batch_size + 1) * len(base) // self.batch_size
        return [base[cuts[slot] : cuts[slot + 1]].copy() for slot in slots]

    def walk(self, slot: int, epoch: int, share: NDArray[np.int64]) -> NDArray[np.int64]:
        """The order in which ``slot`` walks its ``share`` in ``epoch``, as indices into it.

        The first ``steps_per_epoch`` are the epoch's; what is left over rests.
        """
        generator = np.random.default_rng([self._seed, 1 + epoch, slot])
        walk = self._mixed(generator, share)
        if not len(self._ends):
            return walk
        return walk[_evenly(np.searchsorted(self._ends, share[walk], side="right"))]

    def without_samples(self) -> SampleOrder:
        """The same for who knows the shares already: it does not hold the array."""
        light = copy(self)
        light.samples = None
        return light

    def _mixed(self, generator: np.random.Generator, share: NDArray[np.int64]) -> NDArray[np.int64]:
        if self._window is None:
            return generator.permutation(len(share))
        run = np.cumsum(np.diff(share // BLOCK, prepend=share[0] // BLOCK) != 0)
        in_runs = np.argsort(generator.permutation(run[-1] + 1)[run], kind="stable")
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

    ``walks``: for each slot, all positions (into the worker's rows) that it owns, in this epoch's
    order; ``step``: of the epoch.
    """

    walks: Sequence[NDArray[np.int64]]
    step: int

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
    """One worker's part of a ``SampleOrder``: slots ``rank``, ``rank + world_size``, …

    ``rows`` (int64) are the dataset rows this worker needs, so that ``batch`` can answer with
    positions into them: slot after slot, or of samples that repeat, each row once and in order.
    ``total`` is how many the dataset has.
    """

    def __init__(self, order: SampleOrder, rank: int, world_size: int) -> None:
        self.total = order.rows
        self.slots = range(rank, order.batch_size, world_size)
        shares = order.shares(self.slots)
        owned = np.concatenate(shares)
        self._starts = np.cumsum([0] + [len(share) for share in shares[:-1]])
        self._shares = np.split(owned, self._starts[1:])  # views: a share may be millions
        self.rows, self._positions = owned, None
        if order.samples is not None:
            self.rows, self._positions = np.unique(owned, return_inverse=True)
        self._order = order.without_samples()
        self._epoch = -1
        self._walks: list[NDArray[np.int64]] = []

    def batch(self, step: int) -> NDArray[np.int64]:
        """Positions into ``rows`` of this worker's part of the global batch of ``step``."""
        return self.at(step).positions()

    def at(self, step: int) -> Place:
        """Where this worker's slots stand at ``step`` (from 0)."""
        epoch, place = divmod(step, self._order.steps_per_epoch)
        if epoch != self._epoch:
            walks = [
                start + self._order.walk(slot, epoch, share)
                for slot, share, start in zip(self.slots, self._shares, self._starts, strict=True)
            ]
            positions = self._positions
            self._walks = walks if positions is None else [positions[walk] for walk in walks]
            self._epoch = epoch
        return Place(self._walks, place)

    def passes(self, micro_batch: int | None) -> Passes:
        """How this worker's slots are cut into forward passes of at most ``micro_batch`` rows."""
        world_size = self.slots.step
        most = math.ceil(self._order.batch_size / world_size)
        return Passes(len(self.slots), most, micro_batch)


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


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Batches in which every one of ``rows`` samples is seen once, a remainder left out."""
    return max(1, rows // batch_size)


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
