"""When not to call: a server that is down is left alone, and one that is busy is given time."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from dim.designers.base import BreakerOptions
from dim.errors import CallsStopped

LONGEST_PAUSE_S = 60.0
_FIRST_HOLD_S = 1.0
_SPREAD = 0.25  # of a pause: who waited together does not come back together

Clock = Callable[[], float]


class Down(Exception):
    """A call that shows that the server, or the way to it, does not work."""


class CircuitBreaker:
    """Lets calls through while the server answers; while it does not, one at a time to try.

    Args:
        options: its numbers.
        who: what to call the server in a message.
        clock: seconds, for tests.
    """

    def __init__(self, options: BreakerOptions, who: str, clock: Clock | None = None) -> None:
        self._options = options
        self._who = who
        self._clock: Clock = clock or _loop_time
        self._failures = 0
        self._opened_at: float | None = None
        self._try_at = 0.0
        self._pause_s = options.pause_s
        self._trying = False
        self._why = ""
        self._changed = asyncio.Event()

    @property
    def is_open(self) -> bool:
        """Whether the server counts as down."""
        return self._opened_at is not None

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        """Wait until a call may be made; the block is the call.

        A :class:`Down` that it raises counts against the server; any other error shows that it is
        there.

        Raises:
            CallsStopped: the server has been down for too long.
        """
        probe = await self._wait()
        try:
            yield
        except Down as down:
            self._failed(str(down), probe)
            raise
        except (CallsStopped, asyncio.CancelledError):
            raise
        except Exception:
            self._answered()
            raise
        else:
            self._answered()
        finally:
            if probe:
                self._trying = False
                self._wake()

    async def _wait(self) -> bool:
        """Whether the call is the one that tries whether the server is back."""
        while self._opened_at is not None:
            now = self._clock()
            if not self._trying and now >= self._try_at:
                self._trying = True
                return True
            if not self._trying and now - self._opened_at >= self._options.down_s:
                raise CallsStopped(
                    f"{self._who} has been down for {now - self._opened_at:.0f} s ({self._why}); "
                    "what it answered is kept: run the same command again to go on"
                )
            ends = self._opened_at + self._options.down_s
            wait_s = None if self._trying else max(0.0, min(self._try_at, ends) - now)
            await _wait_for(self._changed, wait_s)
        return False

    def _failed(self, why: str, probe: bool) -> None:
        self._failures += 1
        self._why = why
        now = self._clock()
        if self._opened_at is None and self._failures >= self._options.failures:
            self._opened_at = now
            self._try_at = now + self._pause_s
        elif probe:
            self._pause_s = min(2 * self._pause_s, max(LONGEST_PAUSE_S, self._options.pause_s))
            self._try_at = now + self._pause_s

    def _answered(self) -> None:
        self._failures = 0
        self._pause_s = self._options.pause_s
        if self._opened_at is not None:
            self._opened_at = None
            self._wake()

    def _wake(self) -> None:
        """Let everyone who waits look again."""
        self._changed.set()
        self._changed = asyncio.Event()


class CoolDown:
    """The pause that a busy server asked for, kept by all requests and not by the one it told.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock: Clock = clock or _loop_time
        self._from = self._until = 0.0
        self._next_s = _FIRST_HOLD_S

    async def wait(self, longest_s: float = math.inf) -> float:
        """Wait until the pause is over, and a little longer, each a different time.

        Returns:
            0, or how many seconds of the pause are left because they are more than ``longest_s``.
        """
        while (left := self._until - self._clock()) > 0:
            if left > longest_s:
                return left
            spread = random.uniform(0, _SPREAD * min(self._until - self._from, LONGEST_PAUSE_S))
            await asyncio.sleep(left + spread)
        return 0.0

    def hold(self, sent_at: float, retry_after_s: float | None) -> float:
        """A request that was sent at ``sent_at`` was turned away.

        Returns:
            Seconds from now until the next may be sent. Without the server's word for it they
            grow with every request that is turned away after a pause.
        """
        now = self._clock()
        news = sent_at >= self._until or not self._until
        if retry_after_s is None and news:
            retry_after_s = self._next_s
            self._next_s = min(2 * self._next_s, LONGEST_PAUSE_S)
        if retry_after_s is not None and now + retry_after_s > self._until:
            self._from, self._until = now, now + retry_after_s
        return max(0.0, self._until - now)

    def served(self, sent_at: float) -> None:
        """A request that was sent at ``sent_at`` was answered."""
        if sent_at >= self._until:
            self._next_s = _FIRST_HOLD_S


def backoff_s(failures: int) -> float:
    """A random pause before the next attempt, in seconds; about twice as long after each."""
    return random.uniform(0.5, 1.0) * min(0.5 * 2 ** (failures - 1), LONGEST_PAUSE_S)


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


async def _wait_for(event: asyncio.Event, seconds: float | None) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return
