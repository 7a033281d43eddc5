"""Limits and budget, on a clock of the test's own, and the gate in front of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from dim.designers.calls.gate import Gate, LocalExchange
from dim.designers.calls.meter import Grant, Limits, Meter, Settled, Want
from dim.errors import CallsStopped


def want(call: str = "c", tokens: float = 0.0, usd: float = 0.0) -> Want:
    return Want(call, tokens, usd, lifetime_s=10.0)


def starts(meter: Meter, count: int, now: float, **of: float) -> list[float]:
    wants = [want(f"{now}-{n}", **of) for n in range(count)]
    return [round(now + grant.wait_s, 6) for grant in meter.exchange([], wants, now)]


def test_calls_are_paced_evenly_from_the_first_on() -> None:
    meter = Meter(Limits(requests_per_minute=600), now=100.0)
    assert starts(meter, 4, 100.0) == [100.0, 100.1, 100.2, 100.3]
    assert starts(meter, 2, 100.05) == [100.4, 100.5]  # whoever comes later queues behind


def test_no_second_holds_more_than_the_limit_after_a_rest() -> None:
    meter = Meter(Limits(requests_per_minute=6000), now=0.0)
    times = starts(meter, 300, 50.0)
    assert sum(time < 51.0 for time in times) <= 100 + 10  # a tenth of a second's worth is made up
    assert times[-1] == pytest.approx(50.0 + 289 * 0.01, abs=0.02)


def test_tokens_have_a_rate_of_their_own_and_are_corrected() -> None:
    meter = Meter(Limits(tokens_per_minute=60_000), now=0.0)  # a thousand a second
    assert starts(meter, 3, 0.0, tokens=500) == [0.0, 0.5, 1.0]
    (grant,) = meter.exchange([Settled("0.0-0", 2500, 0.0)], [want(tokens=1)], 1.0)
    assert grant.wait_s == pytest.approx(1.5 + 2.0 - 1.0)  # 2,000 more than was thought
    (grant,) = meter.exchange([Settled("0.0-1", 0, 0.0)], [want("d", tokens=1)], 1.0)
    assert grant.wait_s == pytest.approx(2.0, abs=0.01)  # 500 that were not taken are given back


def test_the_stricter_of_two_rates_counts() -> None:
    meter = Meter(Limits(requests_per_minute=600, tokens_per_minute=60_000), now=0.0)
    assert starts(meter, 2, 0.0, tokens=10) == [0.0, 0.1]
    assert starts(meter, 2, 0.0, tokens=1000) == [0.2, 1.1]  # a second of tokens each


def test_a_hold_moves_everyone() -> None:
    meter = Meter(Limits(requests_per_minute=600), now=0.0)
    (grant,) = meter.exchange([], [want()], 0.0, hold_s=5.0)
    assert grant.wait_s == pytest.approx(5.0)


def test_the_budget_is_never_exceeded_and_asks_to_wait_while_money_may_come_back() -> None:
    meter = Meter(Limits(budget=1.0), now=0.0, spent=0.5)
    first, second = meter.exchange([], [want("a", usd=0.4), want("b", usd=0.4)], 0.0)
    assert first.granted
    assert not second.granted and second.spent is None and second.wait_s > 0
    (again,) = meter.exchange([Settled("a", 0, 0.05)], [want("b", usd=0.4)], 0.1)
    assert again.granted  # it cost less than was put aside
    (last,) = meter.exchange([Settled("b", 0, 0.4)], [want("c", usd=0.4)], 0.2)
    assert not last.granted and last.spent is not None
    assert "budget of $1.00 is spent ($0.95" in last.spent and "larger calls.budget" in last.spent


def test_a_call_that_is_lost_with_its_worker_gives_its_money_back() -> None:
    meter = Meter(Limits(budget=1.0), now=0.0)
    meter.exchange([], [want("lost", usd=0.9)], 0.0)
    (early,) = meter.exchange([], [want("b", usd=0.5)], 9.0)
    assert not early.granted and early.spent is None
    (late,) = meter.exchange([], [want("b", usd=0.5)], 11.0)
    assert late.granted


def test_a_call_the_meter_does_not_know_is_counted_all_the_same() -> None:
    meter = Meter(Limits(budget=1.0), now=0.0)
    (grant,) = meter.exchange([Settled("of another meter", 5, 0.8)], [want(usd=0.3)], 0.0)
    assert grant.spent is not None


class Counting:
    """A meter that counts how often it is asked, and takes its time."""

    def __init__(self, limits: Limits) -> None:
        self._local = LocalExchange(limits)
        self.exchanges = 0

    async def __call__(
        self, settled: Sequence[Settled], wants: Sequence[Want], hold_s: float
    ) -> list[Grant]:
        self.exchanges += 1
        await asyncio.sleep(0.005)
        return await self._local(settled, wants, hold_s)


def test_calls_that_come_together_share_an_exchange() -> None:
    exchange = Counting(Limits(requests_per_minute=60_000))

    async def enter_all() -> float:
        gate = Gate(exchange, 10.0)
        began = time.monotonic()
        leases = await asyncio.gather(*(gate.enter(1, 0) for _ in range(200)))
        for lease in leases:
            gate.leave(lease, 1, 0)
        assert len(set(leases)) == 200
        return time.monotonic() - began

    assert asyncio.run(enter_all()) >= 0.199 * 0.95  # the two hundredth begins after 0.2 s
    assert exchange.exchanges <= 10


def test_the_gate_waits_for_money_and_stops_when_there_is_none() -> None:
    async def spend() -> list[str]:
        gate = Gate(LocalExchange(Limits(budget=1.0)), 10.0)
        said = []

        async def call(name: str, seconds: float) -> None:
            try:
                lease = await gate.enter(0, 0.6)
            except CallsStopped as stop:
                said.append(f"{name} stopped: {stop}")
                return
            said.append(f"{name} begins")
            await asyncio.sleep(seconds)
            said.append(f"{name} ends")
            gate.leave(lease, 0, 0.3)

        await asyncio.gather(call("a", 0.2), call("b", 0.2), call("c", 0.2))
        return said

    said = asyncio.run(spend())
    assert said[:4] == ["a begins", "a ends", "b begins", "b ends"]  # 0.6 more do not fit beside it
    assert said[4].startswith("c stopped: the budget of $1.00 is spent ($0.60")


def test_a_lost_meter_stops_calls_and_hangs_nobody() -> None:
    async def lost(settled: Sequence[Settled], wants: Sequence[Want], hold_s: float) -> list[Grant]:
        raise ConnectionError("the meter's node is gone")

    async def enter() -> None:
        await asyncio.wait_for(Gate(lost, 10.0).enter(0, 0), 5)

    with pytest.raises(CallsStopped, match="limits .* cannot be kept: the meter's node is gone"):
        asyncio.run(enter())


def test_a_cancelled_call_gives_back_what_was_put_aside() -> None:
    async def cancel() -> None:
        gate = Gate(LocalExchange(Limits(requests_per_minute=60, budget=1.0)), 1000.0)
        first = await gate.enter(0, 0.1)
        waiting = asyncio.create_task(gate.enter(0, 0.8))  # its turn is in a second
        await asyncio.sleep(0.05)
        waiting.cancel()
        gate.leave(first, 0, 0.1)
        await asyncio.wait_for(gate.enter(0, 0.8), 10)

    asyncio.run(cancel())
