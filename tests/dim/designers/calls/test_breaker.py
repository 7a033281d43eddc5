"""When calls are held back: a server that is down, one that is busy, and growing pauses."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from dim.designers.base import BreakerOptions
from dim.designers.calls.breaker import CircuitBreaker, CoolDown, Down, backoff_s
from dim.errors import CallsStopped

QUICK = BreakerOptions(failures=3, pause_s=0.05, down_s=0.6)


async def call(breaker: CircuitBreaker, error: Exception | None = None) -> None:
    async with breaker.call():
        if error is not None:
            raise error


async def fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        with pytest.raises(Down):
            await call(breaker, Down("refused"))


def test_it_opens_after_failures_in_a_row_only() -> None:
    async def run() -> None:
        breaker = CircuitBreaker(QUICK, "m at u")
        await fail(breaker, 2)
        await call(breaker)
        await fail(breaker, 2)
        with pytest.raises(ValueError):
            await call(breaker, ValueError("the request's own fault: the server is there"))
        await fail(breaker, 2)
        assert not breaker.is_open
        await fail(breaker, 1)
        assert breaker.is_open

    asyncio.run(run())


def test_one_call_tries_while_the_others_wait_and_all_go_when_it_is_answered() -> None:
    async def run() -> None:
        breaker = CircuitBreaker(QUICK, "m at u")
        await fail(breaker, 3)
        inside, most, done = 0, 0, 0
        release = asyncio.Event()

        async def wait_inside() -> None:
            nonlocal inside, most, done
            async with breaker.call():
                inside += 1
                most = max(most, inside)
                await release.wait()
                inside -= 1
            done += 1

        calls = [asyncio.create_task(wait_inside()) for _ in range(5)]
        await asyncio.sleep(0.2)
        assert (inside, most) == (1, 1)
        release.set()
        await asyncio.wait_for(asyncio.gather(*calls), 5)
        assert done == 5 and not breaker.is_open

    asyncio.run(run())


def test_a_cancelled_trial_lets_another_try() -> None:
    async def run() -> None:
        breaker = CircuitBreaker(QUICK, "m at u")
        await fail(breaker, 3)

        async def hang() -> None:
            async with breaker.call():
                await asyncio.sleep(60)

        trial = asyncio.create_task(hang())
        await asyncio.sleep(0.1)
        trial.cancel()
        await asyncio.wait_for(call(breaker), 5)
        assert not breaker.is_open

    asyncio.run(run())


def test_down_for_too_long_it_stops_everyone_in_one_sentence() -> None:
    async def run() -> None:
        breaker = CircuitBreaker(QUICK, "m at u")
        await fail(breaker, 3)

        async def keep_trying() -> str:
            while True:
                try:
                    await call(breaker, Down("HTTP 500: boom"))
                except Down:
                    continue
                except CallsStopped as stop:
                    return str(stop)

        said = await asyncio.wait_for(asyncio.gather(*(keep_trying() for _ in range(4))), 20)
        assert all("m at u has been down for" in one and "HTTP 500: boom" in one for one in said)
        assert all("run the same command again" in one and "\n" not in one for one in said)

    asyncio.run(run())


def test_whoever_comes_long_after_it_stopped_finds_it_tried_again() -> None:
    async def run() -> None:
        breaker = CircuitBreaker(BreakerOptions(failures=1, pause_s=0.2, down_s=0), "m at u")
        await fail(breaker, 1)
        with pytest.raises(CallsStopped):
            await call(breaker)
        await asyncio.sleep(0.25)
        await call(breaker)  # the server is back
        await call(breaker)
        assert not breaker.is_open

    asyncio.run(run())


def test_pauses_grow_while_it_stays_down() -> None:
    async def run() -> None:
        options = BreakerOptions(failures=1, pause_s=0.05, down_s=60)
        breaker = CircuitBreaker(options, "m at u")
        times = []
        for _ in range(5):
            with pytest.raises(Down):
                await call(breaker, Down("no"))
            times.append(time.monotonic())
        pauses = [after - before for before, after in pairwise(times)]
        assert all(pause >= 0.05 * 2**n for n, pause in enumerate(pauses))

    asyncio.run(run())


def test_a_cool_down_holds_everybody_and_grows_once_for_all_who_were_turned_away() -> None:
    now = [100.0]
    cool = CoolDown(clock=lambda: now[0])
    assert cool.hold(99.0, None) == 1.0
    assert cool.hold(99.5, None) == 1.0  # sent before the pause began: nothing new
    now[0] = 101.5
    assert cool.hold(101.4, None) == 2.0  # turned away again after it
    assert cool.hold(101.4, 7.0) == 7.0  # the server's own word
    assert cool.hold(101.4, 3.0) == 7.0  # another's word does not shorten it
    now[0] = 110.0
    cool.served(109.0)
    assert cool.hold(109.9, None) == 1.0


def test_a_cool_down_is_waited_for() -> None:
    async def run() -> float:
        cool = CoolDown()
        cool.hold(time.monotonic(), 0.2)
        began = time.monotonic()
        await asyncio.gather(*(cool.wait() for _ in range(3)))
        return time.monotonic() - began

    assert asyncio.run(run()) >= 0.19


def test_backoff_grows_and_differs() -> None:
    assert all(0.25 <= backoff_s(1) <= 0.5 for _ in range(50))
    assert all(4.0 <= backoff_s(5) <= 8.0 for _ in range(50))
    assert max(backoff_s(40) for _ in range(50)) <= 60.0
    assert len({backoff_s(3) for _ in range(10)}) > 1
