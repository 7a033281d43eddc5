"""The way to a meter, wherever it is: many calls share one exchange with it."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from typing import Protocol

from dim.designers.calls.meter import Grant, Limits, Meter, Settled, Want
from dim.errors import CallsStopped

_AT_ONCE = 32  # calls per exchange

_Waiting = tuple[Want, "asyncio.Future[float]"]


class Exchange(Protocol):
    """A meter as its users see it; it may be another process's."""

    async def __call__(
        self, settled: Sequence[Settled], wants: Sequence[Want], hold_s: float
    ) -> list[Grant]:
        """See :meth:`dim.designers.calls.meter.Meter.exchange`."""
        ...


class LocalExchange:
    """A meter of this process alone.

    Args:
        limits: what to keep to.
    """

    def __init__(self, limits: Limits) -> None:
        self._meter = Meter(limits, time.monotonic())

    async def __call__(
        self, settled: Sequence[Settled], wants: Sequence[Want], hold_s: float
    ) -> list[Grant]:
        """See :class:`Exchange`."""
        return self._meter.exchange(settled, wants, time.monotonic(), hold_s)


class Gate:
    """Makes calls wait for their turn. Lives in one event loop.

    Args:
        exchange: the meter.
        lifetime_s: of a call that is not heard of again.
        pause_s: between two exchanges, so that calls which come one by one share one.
    """

    def __init__(self, exchange: Exchange, lifetime_s: float, pause_s: float = 0.0) -> None:
        self._exchange = exchange
        self._lifetime_s = lifetime_s
        self._pause_s = pause_s
        self._me = uuid.uuid4().hex[:12]
        self._calls = 0
        self._waiting: list[_Waiting] = []
        self._settled: list[Settled] = []
        self._hold_s = 0.0
        self._runner: asyncio.Task[None] | None = None

    async def enter(self, tokens: float, usd: float) -> str:
        """Wait until a call of so many tokens and at most so much money may be made.

        Returns:
            What :meth:`leave` is to be told.

        Raises:
            CallsStopped: the budget is spent, or the meter is lost.
        """
        self._calls += 1
        want = Want(f"{self._me}-{self._calls}", tokens, usd, self._lifetime_s)
        turn: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append((want, turn))
        self._run()
        wait_s = await turn
        try:
            await asyncio.sleep(wait_s)
        except asyncio.CancelledError:
            self.leave(want.call, 0.0, 0.0)
            raise
        return want.call

    def leave(self, call: str, tokens: float, usd: float) -> None:
        """A call is over and its answer is kept; this is what it cost."""
        self._settled.append(Settled(call, tokens, usd))
        self._run()

    def hold(self, seconds: float) -> None:
        """Nobody may call for so long."""
        self._hold_s = max(self._hold_s, seconds)
        self._run()

    def _run(self) -> None:
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._exchange_until_nothing_is_left())

    async def _exchange_until_nothing_is_left(self) -> None:
        while self._waiting or self._settled or self._hold_s:
            await asyncio.sleep(self._pause_s)
            settled, self._settled = self._settled, []
            hold_s, self._hold_s = self._hold_s, 0.0
            asked = self._waiting[:_AT_ONCE]
            del self._waiting[:_AT_ONCE]
            try:
                grants = await self._exchange(settled, [want for want, _ in asked], hold_s)
            except Exception as error:  # whoever waits must hear of it
                self._turn_away(asked, error)
                continue
            wait_s = self._tell(asked, grants)
            if wait_s:
                await asyncio.sleep(wait_s)

    def _tell(self, asked: list[_Waiting], grants: Sequence[Grant]) -> float:
        """Let go who may, and queue again who may not yet; returns until when to wait with that."""
        later, wait_s = [], 0.0
        for (want, turn), grant in zip(asked, grants, strict=True):
            if turn.done():  # whoever wanted to call was cancelled; it must not count
                if grant.granted:
                    self._settled.append(Settled(want.call, 0.0, 0.0))
            elif grant.spent is not None:
                turn.set_exception(CallsStopped(grant.spent))
            elif grant.granted:
                turn.set_result(grant.wait_s)
            else:
                later.append((want, turn))
                wait_s = grant.wait_s
        self._waiting[:0] = later
        return wait_s

    def _turn_away(self, asked: list[_Waiting], error: Exception) -> None:
        for _, turn in asked:
            if not turn.done():
                turn.set_exception(CallsStopped(f"the limits of calls cannot be kept: {error}"))
