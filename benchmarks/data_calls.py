"""The call engine: how near it comes to what a server allows, and how exactly it keeps a limit.

    python -m benchmarks.data_calls

A server in a process of its own answers every request after a fixed time. First the engine asks it
as fast as ``in_flight`` open requests allow, which is ``in_flight / latency`` a second at best; a
bare aiohttp loop that sends the same bytes and reads nothing shows what this machine can do. Then
two workers on a local Ray, who could go far beyond it, share a limit of requests a minute, and the
server counts. Fails below 90 % of the ideal, and more than 2 % away from the limit.
"""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Annotated

import aiohttp
import numpy as np
import typer
from aiohttp import web
from PIL import Image
from rich.console import Console
from rich.table import Table

from dim.designers import CallOptions, DesignRequest, create
from dim.designers.calls.wire import request_body

BAR = 0.90
TOLERANCE = 0.02
WORKERS = 2
_ANSWER = json.dumps(
    {
        "choices": [{"finish_reason": "stop", "message": {"content": "A plan. " * 100}}],
        "usage": {"prompt_tokens": 1500, "completion_tokens": 300},
    }
).encode()


def serve(latency_s: float, control: Connection) -> None:
    """Answer on a free port until told to stop; says the port, and on demand when it was asked."""
    asyncio.run(_serve(latency_s, control))


async def _serve(latency_s: float, control: Connection) -> None:
    times: list[float] = []

    async def answer(request: web.Request) -> web.Response:
        began = time.monotonic()
        times.append(began)
        await request.read()
        await asyncio.sleep(latency_s - (time.monotonic() - began))
        return web.Response(body=_ANSWER, content_type="application/json")

    application = web.Application(client_max_size=64 << 20)
    application.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    control.send(runner.addresses[0][1])
    while await asyncio.to_thread(control.recv):
        control.send(times[:])
        times.clear()
    await runner.cleanup()


class Server:
    """The server as this process sees it."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self.url = f"http://127.0.0.1:{control.recv()}/v1"

    def times(self) -> list[float]:
        """When it was asked since this was called last, in seconds."""
        self._control.send(True)
        return sorted(self._control.recv())

    def stop(self) -> None:
        """Have it end."""
        self._control.send(False)


@contextmanager
def running(latency_s: float) -> Iterator[Server]:
    """A server while the block runs."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(latency_s, theirs), daemon=True)
    process.start()
    server = Server(ours)
    try:
        yield server
    finally:
        server.stop()
        process.join()


def photograph(side: int) -> bytes:
    """A JPEG with as much in it as a photograph has."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def engine_rate(url: str, options: CallOptions, image: bytes, count: int) -> float:
    """Answers per second of the call engine."""
    designer = create(f"openai:m@{url}", calls=options)
    designer.design([DesignRequest("warm up", image)] * options.in_flight)
    requests = [DesignRequest(f"edit {n}", image) for n in range(count)]
    began = time.perf_counter()
    replies = designer.design(requests)
    seconds = time.perf_counter() - began
    failed = [reply for reply in replies if not isinstance(reply, str)]
    if failed:
        raise failed[0]
    return count / seconds


def bare_rate(url: str, options: CallOptions, image: bytes, count: int) -> float:
    """Answers per second of aiohttp alone, which is given the bytes and reads no answer."""
    from dim.designers import Question

    body = request_body("m", Question("edit", (image,)), options)

    async def ask_all() -> float:
        connector = aiohttp.TCPConnector(limit=options.in_flight)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def ask() -> None:
                async with session.post(f"{url}/chat/completions", data=body) as response:
                    await response.read()

            await asyncio.gather(*(ask() for _ in range(options.in_flight)))
            began = time.perf_counter()
            await asyncio.gather(*(ask() for _ in range(count)))
            return count / (time.perf_counter() - began)

    return asyncio.run(ask_all())


def limited_rate(server: Server, options: CallOptions, image: bytes, seconds: float) -> float:
    """Requests per minute that reach the server from two workers under one limit."""
    import ray

    from infra.storage import open_store
    from pipelines.calls.exchange import ClusterExchange, share_meter

    spec = f"openai:m@{server.url}"

    @ray.remote(num_cpus=0.5)
    class Worker:
        def __init__(self, exchange: ClusterExchange) -> None:
            self._designer = create(spec, calls=options, exchange=exchange)

        def ask(self, count: int) -> int:
            replies = self._designer.design([DesignRequest(str(n), image) for n in range(count)])
            return sum(isinstance(reply, str) for reply in replies)

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with tempfile.TemporaryDirectory() as folder:
            exchange = share_meter(spec, options, open_store(folder))
            if exchange is None:
                raise RuntimeError("there is no limit to keep")
            workers = [Worker.remote(exchange) for _ in range(WORKERS)]
            ray.get([worker.ask.remote(1) for worker in workers])
            server.times()
            count = round((options.requests_per_minute or 0) / 60 * seconds / WORKERS)
            answered = sum(ray.get([worker.ask.remote(count) for worker in workers]))
    finally:
        ray.shutdown()
    times = server.times()
    if not answered == len(times) == WORKERS * count:
        raise RuntimeError(f"{answered} of {WORKERS * count} requests were answered")
    return (len(times) - 1) / (times[-1] - times[0]) * 60


def main(
    count: Annotated[int, typer.Option(min=1, help="Requests at full speed.")] = 6400,
    in_flight: Annotated[int, typer.Option(min=1, help="Open at once.")] = 64,
    latency: Annotated[float, typer.Option(min=0.001, help="Of the server, in seconds.")] = 0.2,
    side: Annotated[int, typer.Option(min=16, help="Of the image that is sent, in pixels.")] = 512,
    limit: Annotated[float, typer.Option(min=1, help="Requests a minute.")] = 6000,
    seconds: Annotated[float, typer.Option(min=1, help="For which the limit is kept.")] = 30,
) -> None:
    """Measure the call engine against the ideal and against its limit."""
    image = photograph(side)
    options = CallOptions(in_flight=in_flight, retries=0)
    limited = CallOptions(in_flight=in_flight, retries=0, requests_per_minute=limit)
    with running(latency) as server:
        bare = bare_rate(server.url, options, image, count)
        engine = engine_rate(server.url, options, image, count)
        kept = limited_rate(server, limited, image, seconds)
    ideal = in_flight / latency
    table = Table("", "measured", "ideal or limit", "ratio", "bar")
    table.add_row("bare aiohttp, answers/s", f"{bare:.0f}", f"{ideal:.0f}", f"{bare / ideal:.3f}")
    table.add_row(
        "call engine, answers/s",
        f"{engine:.0f}",
        f"{ideal:.0f}",
        f"{engine / ideal:.3f}",
        f"≥ {BAR:.2f}",
    )
    table.add_row(
        f"{WORKERS} workers, requests/min",
        f"{kept:.0f}",
        f"{limit:.0f}",
        f"{kept / limit:.3f}",
        f"1 ± {TOLERANCE:.2f}",
    )
    Console().print(table)
    if engine < BAR * ideal or abs(kept / limit - 1) > TOLERANCE:
        raise typer.Exit(1)


if __name__ == "__main__":
    from dim.cli import run

    run(main)
