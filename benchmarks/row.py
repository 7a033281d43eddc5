"""A row of the table that :mod:`benchmarks.data_scale` prints: a figure with its bar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One figure of work at scale.

    Attributes:
        name: by which ``--only`` chooses it.
        what: is measured, with its unit.
        before: the same figure before the code was made for this scale; ``None`` if there was none.
        bar: the figure has to reach.
        better: whether more or less of it is better.
        measure: gives the figure now; several rows may share a measurement that is kept.
    """

    name: str
    what: str
    before: float | None
    bar: float
    better: Literal["more", "less"]
    measure: Callable[[], float]

    def holds(self, figure: float) -> bool:
        """Whether the bar is reached."""
        return figure >= self.bar if self.better == "more" else figure <= self.bar
