"""Sources mixed: which samples of which data set an epoch has, and how often.

An epoch's samples are row numbers of all data, source after source, and ``SampleOrder`` gives each
slot neighbours of that sequence. So a slot has samples of one source, or of a few that follow one
another, and every batch has the sources in their proportions, to a slot or so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dim.errors import InputError
from dim.learning.batch import BLOCK
from dim.learning.config import Source

MOST = 200_000_000
"""Samples of a weighted epoch: every worker holds 16 bytes for each while it makes the order."""

_FINE = 50  # samples of a source in a weighted epoch at least, or rounding would be above 1 %


def samples_of(
    sources: Sequence[Source], names: Sequence[str], rows: Sequence[int], batch_size: int
) -> list[int]:
    """How many samples of each source an epoch has.

    With weights an epoch is as short as it can be while it has every sample of every source, and a
    whole number of batches; so no remainder rests and the shares are those of the weights to 1 %.

    Args:
        sources: What is mixed, and how.
        names: What to call them in a message.
        rows: How many samples each has.
        batch_size: Slots of a batch.

    Raises:
        InputError: a source has no part, or so little weight that the epoch would not end.
    """
    if not any(source.changes_the_mixture for source in sources):
        return list(rows)
    if 0 in rows:
        raise InputError(f"{names[list(rows).index(0)]} has no sample to mix with those of others")
    used = [min(count, source.cap or count) for source, count in zip(sources, rows, strict=True)]
    weights = [source.weight for source in sources]
    if weights[0] is None:
        found = [
            round(count * (source.repeats or 1))
            for source, count in zip(sources, used, strict=True)
        ]
        if 0 in found:
            none = found.index(0)
            raise InputError(
                f"repeats: {sources[none].repeats:g} of the {used[none]} samples of {names[none]} "
                "is none at all"
            )
        return found
    shares = np.array(weights, np.float64) / sum(filter(None, weights))
    lengths = np.maximum(used, _FINE) / shares
    longest = int(np.argmax(lengths))
    total = math.ceil(lengths[longest] / batch_size) * batch_size
    if total > MOST:
        raise InputError(
            f"{names[longest]} has {used[longest]:,} samples and {shares[longest]:.2g} of the "
            f"weight, so that an epoch with all of them has {total:,}, and {MOST:,} are allowed: "
            "give it a cap or more weight"
        )
    exact = shares * total
    found = np.floor(exact).astype(np.int64)
    largest = np.argsort(found - exact, kind="stable")[: total - int(found.sum())]
    found[largest] += 1
    return [int(count) for count in found]


def mixed(
    sources: Sequence[Source],
    rows: Sequence[int],
    counts: Sequence[int],
    seed: int,
    *,
    window: int | None = None,
) -> NDArray[np.int64] | None:
    """The row numbers of an epoch (int64, one a sample), as ``SampleOrder`` takes them.

    ``None`` where each row is there once, as is usual. Which rows a cap leaves, and which a
    fraction takes once more, follows from the seed, for all epochs alike. Without a window the
    repetitions of a row are neighbours: one worker needs its features. With one they are passes
    through the source one after the other, for neighbours would come soon after one another.

    Args:
        sources: What is mixed.
        rows: How many samples each has; the rows of one follow those of the one before.
        counts: How many samples of each an epoch has, see ``samples_of``.
        seed: Of the stage.
        window: As for ``SampleOrder``.
    """
    if not any(source.changes_the_mixture for source in sources):
        return None
    parts = []
    begin = 0
    for number, (source, available, count) in enumerate(zip(sources, rows, counts, strict=True)):
        generator = np.random.default_rng([seed, 0, number, available])
        used = min(available, source.cap or available)
        take = _repeated if window is None else _in_passes
        parts.append(begin + take(generator, available, used, count))
        begin += available
    return np.concatenate(parts)


def _repeated(
    generator: np.random.Generator, available: int, used: int, count: int
) -> NDArray[np.int64]:
    """``count`` times one of ``used`` rows, in any order, the repetitions beside one another."""
    chosen = generator.permutation(available)[:used]
    whole, more = divmod(count, used)
    return np.repeat(chosen, np.where(np.arange(used) < more, whole + 1, whole))


def _in_passes(
    generator: np.random.Generator, available: int, used: int, count: int
) -> NDArray[np.int64]:
    """The same, as runs of ``BLOCK`` neighbours in any order, each row once in a pass."""
    blocks = np.array_split(np.arange(available), range(BLOCK, available, BLOCK))
    chosen = _cut([blocks[place] for place in generator.permutation(len(blocks))], used)
    passes: list[NDArray[np.int64]] = []
    left = count
    while left:
        order = [chosen[place] for place in generator.permutation(len(chosen))]
        passes += _cut(order, min(left, used))
        left -= min(left, used)
    return np.concatenate(passes)


def _cut(blocks: Sequence[NDArray[np.int64]], count: int) -> list[NDArray[np.int64]]:
    """The first ``count`` rows of ``blocks``."""
    kept = []
    for block in blocks:
        if count <= 0:
            break
        kept.append(block[:count])
        count -= len(kept[-1])
    return kept
