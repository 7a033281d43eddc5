"""Requests that come when they come: how long the slowest hundredth waits, beside a plain server.

    python -m benchmarks.serving_load                     # the tiny configuration, random weights
    python -m benchmarks.serving_load --requests 30       # to see that it runs

The plain server is ``benchmarks.plain_server``: FastAPI around the same model, in a process of its
own with as many threads as a painter has. Its capacity is what it answers when sixteen clients
never let it rest. Then both servers get the same requests at the same moments, drawn as a Poisson
process at 80 % of that rate, one server after the other. Leaves with status 1 when a request fails
or our 99th percentile is not the lower one. Ours at 80 % of its own capacity is printed too: a rate
that the plain server does not reach.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import httpx
import numpy as np

from benchmarks.serving import CLIENTS, SIZES, STEPS, Asked, save_model, served
from infra.ports import free_port

SHARE = 0.8
STARTED_S = 120.0


@dataclass(frozen=True)
class Waited:
    """How long the requests of one server took, in milliseconds; and how many failed."""

    milliseconds: Sequence[float]
    failed: int

    def percentile(self, share: float) -> float:
        """Of those that were answered."""
        return float(np.percentile(self.milliseconds, share)) if self.milliseconds else 0.0

    def __str__(self) -> str:
        at = ", ".join(f"p{share} {self.percentile(share):,.0f} ms" for share in (50, 90, 99))
        return f"{at}, {self.failed} failed"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, report, and say what missed its target."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(folder)
        with served(path) as ours, plain(path) as theirs:
            failures = measure(ours.url, theirs, options.requests, options.seed)
    for said in failures:
        print(f"FAILED: {said}", file=sys.stderr)
    return 1 if failures else 0


def measure(ours: str, theirs: str, count: int, seed: int = 0) -> list[str]:
    """Compare the servers at two addresses; what missed its target."""
    asked = mixed(count, seed)
    capacity = {"plain": 0.0, "ours": 0.0}
    for name, url in (("plain", theirs), ("ours", ours)):
        asyncio.run(_together(url, asked[:CLIENTS]))  # not counted
        began = time.perf_counter()
        asyncio.run(_together(url, asked))
        capacity[name] = count / (time.perf_counter() - began)
        print(f"capacity: {name} {capacity[name]:.1f} requests a second")
    rate = SHARE * capacity["plain"]
    moments = arrivals(count, rate, seed)
    waited = {
        name: asyncio.run(_as_they_come(url, asked, moments))
        for name, url in (("plain", theirs), ("ours", ours))
    }
    for name, result in waited.items():
        print(f"at {rate:.1f}/s ({SHARE:.0%} of plain): {name} {result}")
    own = SHARE * capacity["ours"]
    alone = asyncio.run(_as_they_come(ours, asked, arrivals(count, own, seed)))
    print(f"at {own:.1f}/s ({SHARE:.0%} of ours): ours {alone}")
    failures = [
        f"{name}: {result.failed} requests failed"
        for name, result in [*waited.items(), ("ours, at its own rate", alone)]
        if result.failed
    ]
    mine, other = (waited[name].percentile(99) for name in ("ours", "plain"))
    if mine >= other:
        failures.append(f"p99 is {mine:,.0f} ms, and the plain server's {other:,.0f} ms")
    return failures


def mixed(count: int, seed: int) -> list[Asked]:
    """Generations of several sizes and numbers of steps."""
    rng = np.random.default_rng(seed)
    return [
        Asked(number, SIZES[rng.integers(len(SIZES))], int(rng.integers(STEPS // 2, 2 * STEPS)))
        for number in range(count)
    ]


def arrivals(count: int, per_second: float, seed: int) -> list[float]:
    """The seconds at which the requests of a Poisson process come."""
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.exponential(1 / per_second, count)).tolist()


async def _as_they_come(url: str, asked: Sequence[Asked], moments: Sequence[float]) -> Waited:
    began = time.perf_counter()
    limits = httpx.Limits(max_connections=None)  # nobody waits for somebody else's connection
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:

        async def ask(one: Asked, moment: float) -> float | None:
            await asyncio.sleep(began + moment - time.perf_counter())
            answer = await client.post("/v1/images/generations", json=one.body)
            # From when it was due, so that a late start of ours counts as waiting.
            took = time.perf_counter() - began - moment
            return 1000 * took if answer.status_code == 200 else None

        took = await asyncio.gather(*map(ask, asked, moments))
    answered = [one for one in took if one is not None]
    return Waited(answered, len(took) - len(answered))


async def _together(url: str, asked: Sequence[Asked]) -> None:
    waiting = iter(asked)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def work() -> None:
            for one in waiting:
                (await client.post("/v1/images/generations", json=one.body)).raise_for_status()

        await asyncio.gather(*(work() for _ in range(CLIENTS)))


@contextlib.contextmanager
def plain(path: str) -> Iterator[str]:
    """The address of a plain server of the model at ``path``."""
    port = free_port()
    # A painter that reserves one CPU has one thread.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.plain_server", path, str(port)]
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + STARTED_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the plain server did not start")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=300, help="of each measurement")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked and when")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
