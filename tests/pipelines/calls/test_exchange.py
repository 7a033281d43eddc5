"""One meter for several worker processes, on a real local Ray."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import ray

from dim.designers import CallOptions, DesignRequest, create
from dim.designers.calls.gate import Gate
from dim.designers.calls.usage import Answer, Usage
from dim.errors import CallsStopped
from infra.storage import open_store
from pipelines.calls.answers import Answers
from pipelines.calls.exchange import ClusterExchange, share_meter
from tests.chat_server import ChatServer, completion
from tests.pipelines.samples import encoded, photo

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_without_limits_there_is_no_meter(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert share_meter("openai:m@http://127.0.0.1:9/v1", CallOptions(), store) is None
    limited = CallOptions(requests_per_minute=60)
    assert share_meter("oracle", limited, store) is None


async def enter(gate: Gate, usd: float) -> None:
    """Make a call that costs what was put aside for it."""
    gate.leave(await asyncio.wait_for(gate.enter(1, usd), 30), 1, usd)


async def end(meter: ray.actor.ActorHandle) -> None:
    """Kill a meter, and see that it is gone: until then it may still answer."""
    ray.kill(meter)
    for _ in range(300):
        try:
            await meter.__ray_ready__.remote()
        except ray.exceptions.ActorDiedError:
            return
        except ray.exceptions.ActorUnavailableError:
            pass
        await asyncio.sleep(0.1)
    raise TimeoutError("the meter lives on")


@ray.remote(num_cpus=0.1)
def ask(spec: str, calls: CallOptions, exchange: ClusterExchange, count: int) -> list[str]:
    """What a worker does."""
    designer = create(spec, calls=calls, exchange=exchange)
    picture = encoded(photo(1))
    return [str(r) for r in designer.design([DesignRequest(f"{n}", picture) for n in range(count)])]


def test_two_workers_keep_one_limit(chat_server: ChatServer, tmp_path: Path) -> None:
    times: list[float] = []
    chat_server.respond = lambda request: times.append(time.monotonic()) or completion("ok")
    spec = f"openai:m@{chat_server.url}"
    calls = CallOptions(retries=0, timeout_s=30, requests_per_minute=1800, in_flight=16)
    exchange = share_meter(spec, calls, open_store(str(tmp_path)))
    assert exchange is not None
    warm = [ask.remote(spec, calls, exchange, 1) for _ in range(2)]
    ray.get(warm)
    times.clear()
    jobs = [ask.remote(spec, calls, exchange, 60) for _ in range(2)]
    assert ray.get(jobs) == [["ok"] * 60] * 2
    # 120 calls at 30 a second; each alone would have kept to 60 in two seconds
    assert max(times) - min(times) >= 119 / 30 * 0.97


def test_the_budget_is_one_for_all_and_counts_what_was_spent_before(
    chat_server: ChatServer, tmp_path: Path
) -> None:
    store = open_store(str(tmp_path))
    Answers(store, "range").add("k", Answer("x", Usage(1, 1, 0.6, 0.1)), "r")
    chat_server.respond = lambda request: completion("ok", tokens=(100_000, 0))
    spec = f"openai:m@{chat_server.url}"
    calls = CallOptions(retries=0, timeout_s=30, input_price=1.0, budget=1.0, in_flight=1)
    exchange = share_meter(spec, calls, store)
    assert exchange is not None
    workers = [ask.remote(spec, calls, exchange, 50) for _ in range(2)]
    for worker in workers:
        with pytest.raises(CallsStopped, match=r"budget of \$1.00 is spent"):
            ray.get(worker)
    assert 3 <= len(chat_server.requests) <= 5  # 40 cents, 10 a call; each first could not know


def test_a_meter_that_dies_is_made_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    calls = CallOptions(requests_per_minute=60_000, input_price=1.0, budget=1.0)
    exchange = share_meter("openai:mortal@http://127.0.0.1:9/v1", calls, store)
    assert exchange is not None

    async def live_on() -> None:
        gate = Gate(exchange, 60.0)
        await enter(gate, 0.5)
        Answers(store, "range").add("k", Answer("x", Usage(1, 1, 0.5, 0.1)), "r")
        await end(exchange.meter)
        await enter(gate, 0.1)
        with pytest.raises(CallsStopped, match="is spent"):
            await enter(gate, 0.5)  # what the answers say was spent was read again

    asyncio.run(live_on())


def test_jobs_that_call_one_server_share_its_rates_and_not_their_money(tmp_path: Path) -> None:
    spec = "openai:shared@http://127.0.0.1:9/v1"
    rich = CallOptions(requests_per_minute=120, input_price=1.0, budget=100.0)
    poor = rich.model_copy(update={"budget": 0.01})
    one = share_meter(spec, rich, open_store(str(tmp_path / "one")))
    two = share_meter(spec, poor, open_store(str(tmp_path / "two")))
    assert one is not None and two is not None

    async def enter_both() -> float:
        gates = Gate(one, 60.0), Gate(two, 60.0)
        await enter(gates[0], 0.001)
        began = time.monotonic()
        await enter(gates[1], 0.001)
        await enter(gates[0], 1.0)
        with pytest.raises(CallsStopped):
            await gates[1].enter(1, 1.0)
        return time.monotonic() - began

    assert asyncio.run(enter_both()) >= 0.9  # half a second between any two
