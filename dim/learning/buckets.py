"""Buckets: an order of samples in which every step has samples of one shape.

Pictures of several shapes cannot share a batch of latents. So each shape has a ``SampleOrder`` of
its own, and a schedule says whose turn it is at a step of an epoch. The schedule, as the order, is
a function of seed and step: it is the same for every worker, for a run that goes on and for the
undisturbed one, and all workers have the same shape before them in all passes of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dim.learning.batch import SampleOrder, Turn, shuffled, times_before

MOST_REPEATS = 4
"""How often a batch may hold a sample. A shape that would need more to fill one is left out.

A row that a mixture has several times in an epoch is as many samples."""

_LEAST = 4  # rows that a slot can take of a shape, or a bad one that is its only one ends a run


class BucketOrder:
    """The order of samples in global batches of ``batch_size`` of one shape each.

    A shape has as many steps in an epoch as its samples fill, see ``steps_of_shapes``; what is
    left over rests, another remainder each epoch. The steps of a shape are spread over the epoch:
    one, at a random moment, in each of as many equal parts of it.

    Args:
        ids: The shape (rows,) of each sample of the data, any numbers from 0.
        batch_size, seed, window, samples, ends: As for ``SampleOrder``. A shape's samples are mixed
            within its share of the window, so that all shapes stay in one neighbourhood. Mixed
            sources are in a shape's batches as they are in its part of ``samples``.

    Attributes:
        shape_ids: Which of ``ids`` each of the order's shapes is; those left out are none of them.
    """

    repeats = True  # a slot can take samples of others

    def __init__(
        self,
        ids: NDArray[np.int16],
        batch_size: int,
        seed: int,
        *,
        window: int | None = None,
        samples: NDArray[np.int64] | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        base = shuffled(len(ids), seed, window) if samples is None else samples
        shape_of = ids[base]
        counts = np.bincount(shape_of)
        steps = steps_of_shapes(counts, batch_size)
        if not steps.any():
            raise ValueError("no shape has samples enough for a batch")
        self.rows = len(ids)
        self.batch_size = batch_size
        self.shape_ids = np.flatnonzero(steps).tolist()
        self.shapes = len(self.shape_ids)
        self.steps_per_epoch = int(steps.sum())
        self._seed = seed
        self._steps = tuple(steps[self.shape_ids].tolist())
        self._orders = [
            SampleOrder(
                len(ids),
                batch_size,
                seed,
                window=window and max(1, round(window * counts[shape] / len(base))),
                samples=base[shape_of == shape],
                ends=ends,
                least=_LEAST,
            )
            for shape in self.shape_ids
        ]

    def shares(self, slots: Sequence[int]) -> list[NDArray[np.int64]]:
        """See ``Order``."""
        return [share for order in self._orders for share in order.shares(slots)]

    def without_samples(self) -> BucketOrder:
        """See ``Order``."""
        light = copy(self)
        light._orders = [order.without_samples() for order in self._orders]
        return light

    def of_shape(self, shape: int) -> SampleOrder:
        """See ``Order``."""
        return self._orders[shape]

    def turn(self, step: int) -> Turn:
        """See ``Order``."""
        epoch, place = divmod(step, self.steps_per_epoch)
        # Slots draw by their numbers in an epoch, and this one is nobody's.
        shapes, steps = _schedule((self._seed, 1 + epoch, self.batch_size), self._steps)
        return Turn(epoch, int(shapes[place]), int(steps[place]))


@lru_cache(2)  # prefetching looks into the next epoch
def _schedule(
    seeds: tuple[int, ...], steps: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of an epoch in which shapes have ``steps``: each step's shape, and which of its steps it is.

    Each step of a shape is at a random moment of its own equal part of the epoch.
    """
    generator = np.random.default_rng(seeds)
    moments = [(np.arange(count) + generator.random(count)) / count for count in steps]
    shapes = np.repeat(np.arange(len(steps)), steps)
    shapes = shapes[np.argsort(np.concatenate(moments), kind="stable")]
    return shapes, times_before(shapes)


def steps_of_shapes(counts: ArrayLike, batch_size: int) -> NDArray[np.int64]:
    """Batches of an epoch that shapes with ``counts`` samples have, a remainder left out.

    A shape with fewer samples than a batch has slots repeats them in one batch. It has none where
    they would have to repeat more than ``MOST_REPEATS`` times: few pictures would be learnt by
    heart.
    """
    counts = np.asarray(counts, np.int64)
    enough = counts * MOST_REPEATS >= batch_size
    return np.where(enough, np.maximum(1, counts // batch_size), 0)
