"""A gauge notes what was measured on one record and holds it against the rules."""

from __future__ import annotations

from pipelines.filters.rules import ImageRules
from pipelines.limits import Limit, limits_of
from pipelines.outcome import Rejection, Row


class Gauge:
    """The measures of one record.

    Args:
        rules: the thresholds.
    """

    def __init__(self, rules: ImageRules) -> None:
        self._rules = rules
        self._values: dict[str, float] = {}

    def wants(self, measure: str) -> bool:
        """Whether the rules have a threshold for ``measure``, so that it is worth its time."""
        return any(self._threshold(limit) is not None for limit in limits_of(measure))

    def check(self, measure: str, value: float, detail: str) -> None:
        """Note ``value``; of the two images of a pair, the one nearer to its limit is noted.

        Raises:
            Rejection: a threshold is missed.
        """
        self._note(measure, float(value))
        for limit in limits_of(measure):
            threshold = self._threshold(limit)
            if threshold is not None and limit.missed(value, threshold):
                raise Rejection(limit.reason, detail, float(value), float(threshold))

    @property
    def measures(self) -> list[Row]:
        """What was noted, as the column ``measures`` holds it."""
        return [{"name": name, "value": value} for name, value in sorted(self._values.items())]

    def _note(self, measure: str, value: float) -> None:
        worse = min if next(limits_of(measure)).is_floor else max
        self._values[measure] = worse(self._values.get(measure, value), value)

    def _threshold(self, limit: Limit) -> float | None:
        return getattr(self._rules, limit.setting, None)
