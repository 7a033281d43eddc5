"""Which samples make up which batch: a pure function of seed and step.

A global batch has ``batch_size`` slots. Each slot owns a fixed share of the samples and walks
through it in a new order every epoch. So a worker that owns a set of slots sees only its own
samples (and can keep their features in memory), while the content of every global batch depends
neither on the number of workers nor on where the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class SampleOrder:
    """The order of ``rows`` samples in global batches of ``batch_size``.

    An epoch is ``rows // batch_size`` batches; the remainder rests, another one each epoch. With
    fewer rows than slots, rows repeat so that every slot has one.
    """

    def __init__(self, rows: int, batch_size: int, seed: int) -> None:
        if rows < 1:
            raise ValueError("there is no sample to order")
        self.batch_size = batch_size
        self.steps_per_epoch = max(1, rows // batch_size)
        self._seed = seed
        shuffled = np.random.default_rng([seed, rows]).permutation(rows)
        # Slots must not be residues of the row number: neighbouring rows may be of one kind.
        self._base = np.resize(shuffled, max(rows, batch_size))

    def epoch(self, step: int) -> int:
        """The epoch (from 0) that ``step`` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def slot_rows(self, slot: int) -> NDArray[np.int64]:
        """The row numbers that ``slot`` owns."""
        return self._base[slot :: self.batch_size]

    def position(self, slot: int, epoch: int) -> NDArray[np.int64]:
        """The order in which ``slot`` walks its own rows in ``epoch``, as indices into them."""
        order = np.random.default_rng([self._seed, 1 + epoch, slot])
        return order.permutation(len(self.slot_rows(slot)))[: self.steps_per_epoch]


class WorkerOrder:
    """One worker's part of a ``SampleOrder``: slots ``rank``, ``rank + world_size``, …

    ``rows`` (int64) are the dataset rows this worker needs, slot after slot, so that ``batch``
    can answer with positions into them.
    """

    def __init__(self, order: SampleOrder, rank: int, world_size: int) -> None:
        self.slots: Sequence[int] = range(rank, order.batch_size, world_size)
        shares = [order.slot_rows(slot) for slot in self.slots]
        self.rows = np.concatenate(shares)
        self._starts = np.cumsum([0] + [len(share) for share in shares[:-1]])
        self._order = order
        self._epoch = -1
        self._walk = np.empty((0, 0), dtype=np.int64)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Positions into ``rows`` of this worker's part of the global batch of ``step``."""
        epoch = self._order.epoch(step)
        if epoch != self._epoch:
            self._walk = np.stack(
                [
                    start + self._order.position(slot, epoch)
                    for slot, start in zip(self.slots, self._starts, strict=True)
                ]
            )
            self._epoch = epoch
        return self._walk[:, step - epoch * self._order.steps_per_epoch]
