"""Who may call next: requests and tokens per minute, and a budget, for all who share a meter.

A meter hands out times and not waiting: whoever wants to call is told how long to wait for its
turn, and comes back only with what the call cost. One exchange settles any number of calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BURST_S = 0.1  # what was left unused for so long may be caught up with
_MINUTE = 60.0
_LATER_S = 0.1


@dataclass(frozen=True)
class Limits:
    """What all calls together must keep to; ``None``: no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    budget: float | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to keep to."""
        return self != Limits()


@dataclass(frozen=True)
class Want:
    """A call somebody wants to make.

    Args:
        call: its name, different for every call.
        tokens: how many it probably takes.
        usd: what it costs at most.
        lifetime_s: after so long without being settled it is taken for lost with its worker.
    """

    call: str
    tokens: float
    usd: float
    lifetime_s: float


@dataclass(frozen=True)
class Settled:
    """What became of a call: the tokens it took and what it cost."""

    call: str
    tokens: float
    usd: float


@dataclass(frozen=True)
class Grant:
    """The answer to a want.

    Args:
        wait_s: seconds until it may be made, or, if it is not ``granted``, asked for again.
        granted: whether it may.
        spent: there is no money left for it: what to tell.
    """

    wait_s: float
    granted: bool = True
    spent: str | None = None


@dataclass(frozen=True)
class _Reserved:
    tokens: float
    usd: float
    until: float


class Meter:
    """Keeps calls to limits. All times are seconds of one monotonic clock.

    Calls are paced evenly, so that no stretch of time, wherever it begins, holds more of them than
    the limit allows, but for a tenth of a second's worth.

    Args:
        limits: what to keep to.
        now: the time.
        spent: US dollars of the budget that were spent before.
    """

    def __init__(self, limits: Limits, now: float, spent: float = 0.0) -> None:
        self._limits = limits
        self._requests = _Pace(limits.requests_per_minute, now)
        self._tokens = _Pace(limits.tokens_per_minute, now)
        self._spent = spent
        self._reserved: dict[str, _Reserved] = {}

    def exchange(
        self, settled: Sequence[Settled], wants: Sequence[Want], now: float, hold_s: float = 0.0
    ) -> list[Grant]:
        """Account for calls that were made, and say when others may be.

        Args:
            settled: calls that are over.
            wants: calls to make, in the order in which they should be.
            now: the time.
            hold_s: the server asked to be left alone for so long.

        Returns:
            One grant per want.
        """
        if hold_s > 0:
            self._requests.hold(now + hold_s)
            self._tokens.hold(now + hold_s)
        for one in settled:
            self._settle(one)
        self._forget_lost(now)
        return [self._grant(want, now) for want in wants]

    def _settle(self, settled: Settled) -> None:
        reserved = self._reserved.pop(settled.call, None)
        self._tokens.correct(settled.tokens - (reserved.tokens if reserved else 0.0))
        self._spent += settled.usd

    def _forget_lost(self, now: float) -> None:
        lost = [call for call, reserved in self._reserved.items() if reserved.until < now]
        for call in lost:
            del self._reserved[call]

    def _grant(self, want: Want, now: float) -> Grant:
        budget = self._limits.budget
        if budget is not None:
            reserved = sum(one.usd for one in self._reserved.values())
            if self._spent + reserved + want.usd > budget:
                # What is under way may cost less than was put aside for it.
                return Grant(_LATER_S, granted=False, spent=None if reserved else self._no_money())
        start = max(now, self._requests.next(now), self._tokens.next(now))
        self._requests.take(1, start)
        self._tokens.take(want.tokens, start)
        wait_s = start - now
        self._reserved[want.call] = _Reserved(want.tokens, want.usd, start + want.lifetime_s)
        return Grant(wait_s)

    def _no_money(self) -> str:
        return (
            f"the budget of ${self._limits.budget:,.2f} is spent (${self._spent:,.2f}, and the "
            "next call may cost more than is left); every answer is kept: run the same command "
            "again with a larger calls.budget to go on"
        )


class _Pace:
    """One rate: ``due`` is when everything that was taken has had its time."""

    def __init__(self, per_minute: float | None, now: float) -> None:
        self._seconds_each = _MINUTE / per_minute if per_minute else 0.0
        self._due = now + _BURST_S

    def next(self, now: float) -> float:
        return self._due - _BURST_S if self._seconds_each else now

    def take(self, amount: float, start: float) -> None:
        if self._seconds_each:
            self._due = max(self._due, start) + amount * self._seconds_each

    def correct(self, amount: float) -> None:
        self._due += amount * self._seconds_each

    def hold(self, until: float) -> None:
        if self._seconds_each:
            self._due = max(self._due, until + _BURST_S)
