"""Samples that cannot be used: counted by reason, reported, and too many of them end the run.

Every worker replaces its own without a word to the others. The counts of all come together where
the losses do, every ``log_every`` steps, so all workers end at the same step or none.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import get_args

import torch

from dim.errors import BadSample, DimError, SampleError
from training import parallel
from training.log import RunLog

REASONS: tuple[BadSample, ...] = get_args(BadSample)
_ENOUGH = 1000  # samples; of fewer a share says little, unless they are all there are
_NAMED = 20  # bad samples that a worker names in its own log


class TooManyBadSamples(DimError):
    """More samples than allowed cannot be used. Every worker sees it at the same step."""


class BadSamples:
    """What this worker's part of the run has met since its workers started.

    Args:
        allowed: The share of samples that may be bad.
        rows: Samples of the data.
    """

    def __init__(self, allowed: float, rows: int) -> None:
        self._allowed = allowed
        self._enough = min(_ENOUGH, rows)
        self._used = 0
        self._bad: Counter[BadSample] = Counter()
        self._first: SampleError | None = None
        self._said = 0

    def add(self, used: int, bad: Sequence[SampleError]) -> None:
        """Count the samples of a step, and those that they stand for; name the first few."""
        self._used += used
        for error in bad:
            if self._bad.total() < _NAMED:
                sys.stdout.write(f"replaced by its slot's next sample: {error}\n")
            self._bad[error.reason] += 1
            self._first = self._first or error

    def read(self, log: RunLog, device: torch.device) -> dict[str, float]:
        """The counts of all workers by reason, as metrics (a collective).

        Args:
            log: Is told in a line whenever the number has doubled.
            device: That workers exchange numbers on.

        Raises:
            TooManyBadSamples: on every worker; the message names a sample.
        """
        counts = [self._used, *(self._bad[reason] for reason in REASONS)]
        used, *bad = parallel.total(torch.tensor(counts, device=device)).tolist()
        by_reason = {reason: count for reason, count in zip(REASONS, bad, strict=True) if count}
        total, drawn = sum(bad), used + sum(bad)
        named = ", ".join(f"{count} {reason}" for reason, count in by_reason.items())
        if total > self._allowed * max(drawn, self._enough):
            self._stop(f"{total:,} of {drawn:,} samples cannot be used ({named})")
        if total >= max(1, 2 * self._said):
            self._said = total
            log.say(f"{total:,} of {drawn:,} samples could not be used and were replaced ({named})")
        return {
            "bad_samples": float(total),
            **{f"bad_samples_{reason}": float(count) for reason, count in by_reason.items()},
        }

    def _stop(self, said: str) -> None:
        mine = None
        if self._first is not None:
            mine = TooManyBadSamples(
                f"{said}, more than bad_samples: {self._allowed:g} allows, such as: {self._first}"
            )
        raise parallel.agree(mine) or TooManyBadSamples(said)
