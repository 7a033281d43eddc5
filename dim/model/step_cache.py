"""Steps that go through the painter's first block alone.

From one step to the next a latent changes little, and what the later blocks add to it less still.
So the first block is computed at every step; where its contribution is nearly that of the last
whole step, what the later blocks added then is added again (first-block caching, as ParaAttention
and Cache-DiT do it). The numbers change: see ``docs/results.md`` for how much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dim.model.attention import Attended, KeysAndValues


class StepCache:
    """What the blocks last added to one latent's states; empty before its first step.

    ``threshold``: up to which share of itself the first block's contribution may have changed since
    the last whole step. ``whole`` and ``short``: how many steps were of either kind.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.whole = self.short = 0
        self._first: Tensor | None = None
        self._later: Tensor | None = None

    def change(self, first: Tensor) -> Tensor:
        """How far ``first`` (branches, L, F) is from that of the last whole step; infinite: all."""
        if self._first is None:
            return first.new_full((), torch.inf, dtype=torch.float32)
        before = self._first.float()
        return (first.float() - before).abs().mean() / before.abs().mean()

    def keep(self, first: Tensor, later: Tensor) -> None:
        """Note what the first block and the later ones added in a whole step."""
        self._first, self._later = first, later
        self.whole += 1

    def later(self) -> Tensor:
        """What the later blocks added in the last whole step."""
        assert self._later is not None
        self.short += 1
        return self._later


def through(
    caches: Sequence[StepCache],
    rows: Sequence[Tensor],
    before: Tensor,
    states: Tensor,
    later_blocks: Callable[[Tensor, Tensor | None], Tensor],
) -> Tensor:
    """The states behind the last block; a latent does not depend on its neighbours.

    Args:
        caches: one a latent.
        rows: (branches,) int64 a latent, which rows of the states are its own.
        before: (R, L, F), what went into the first block.
        states: (R, L, F), what came out of it.
        later_blocks: ``later_blocks(states, chosen)`` goes through the other blocks with the rows
            ``chosen`` (int64), all where it is None.
    """
    first = states - before
    changes = torch.stack(
        [cache.change(first[own]) for cache, own in zip(caches, rows, strict=True)]
    ).tolist()
    due = [place for place, cache in enumerate(caches) if not changes[place] < cache.threshold]
    if len(due) == len(caches):
        behind = later_blocks(states, None)
    else:
        behind = torch.empty_like(states)
        if due:
            chosen = torch.cat([rows[place] for place in due])
            behind[chosen] = later_blocks(states[chosen], chosen)
    for place, (cache, own) in enumerate(zip(caches, rows, strict=True)):
        if place in due:
            cache.keep(first[own], behind[own] - states[own])
        else:
            behind[own] = states[own] + cache.later()
    return behind


def rows_of(latents: int, spread: Tensor | None, like: Tensor) -> list[Tensor]:
    """Which rows of states belong to each latent, see ``PreparedCondition.spread``."""
    if spread is None:
        return list(torch.arange(latents, device=like.device).split(1))
    return [(spread == latent).nonzero()[:, 0] for latent in range(latents)]


def chosen_rows(ready: Attended, chosen: Tensor) -> Attended:
    """Keys and values of the rows ``chosen``, in this order."""
    if isinstance(ready, KeysAndValues):
        bias = None if ready.bias is None else ready.bias[chosen]
        return KeysAndValues(ready.keys[chosen], ready.values[chosen], bias)
    starts, wanted = 0, set(chosen.tolist())
    pieces = []
    for one in ready:
        if starts in wanted:  # a piece is one latent's: all of its rows or none
            pieces.append(one)
        starts += len(one.keys)
    return tuple(pieces)
