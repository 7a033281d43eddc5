"""The loss by source and by noise level: sums on the device, which meet where the losses do."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dim.learning.config import RESERVED_NAME
from dim.model.flow import QUARTILES, quartile_of
from training import parallel

PREFIX = "loss/"
"""How the metrics of parts of the loss begin."""


class Breakdown:
    """Sums of the losses of a worker's samples, by source and by quartile of the noise levels.

    Nothing here waits for the device.

    Args:
        sources: What the sources are called; of a single one there is no loss of its own.
        device: Where the losses are.
    """

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        named = sources if len(sources) > 1 else ()
        self._names = [*named, *(f"{RESERVED_NAME}{number + 1}" for number in range(QUARTILES))]
        self._sources = len(named)
        self._step = torch.zeros(2, len(self._names), device=device)  # sums, and of how many
        self._sum = torch.zeros_like(self._step)

    def add(
        self,
        losses: torch.Tensor,
        counted: torch.Tensor,
        index: torch.Tensor,
        source: torch.Tensor,
    ) -> None:
        """Add the rows of a forward pass to the step.

        Args:
            losses: (B,) float32 on the device, one a row.
            counted: (B,) bool on the device: rows that are no repetitions.
            index: (B,) int64 on the CPU, the place of the row's noise level in the table.
            source: (B,) int64 on the CPU, the number of its source.
        """
        groups = [self._sources + quartile_of(index)]
        if self._sources:
            groups.append(source)
        kept = torch.stack([losses.detach().float() * counted, counted.float()])
        for group in groups:
            self._step.index_add_(1, group.to(self._step.device, non_blocking=True), kept)

    def end_step(self, *, skipped: bool) -> None:
        """Count the step; the losses of a ``skipped`` one are left out, for they may be none."""
        if not skipped:
            self._sum += self._step
        self._step.zero_()

    def read(self) -> dict[str, float]:
        """``loss/NAME`` of all workers since the last reading (a collective); then start anew.

        What had no sample is not there.
        """
        sums, counts = parallel.total(self._sum).tolist()
        self.restart()
        return {
            f"{PREFIX}{name}": total / count
            for name, total, count in zip(self._names, sums, counts, strict=True)
            if count
        }

    def restart(self) -> None:
        """Forget what was added."""
        self._sum.zero_()
        self._step.zero_()
