"""Fetching images by their URLs from many hosts, some links of which never answer."""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web
from PIL import Image

from benchmarks.row import Row
from dim.images import encode_png
from infra.ports import free_port
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.readers.fetch import FetchConfig

HOSTS = 200  # of one server: every 127.x address is this machine
PER_HOST = 2.0  # requests a second, so that no machine is too slow for the ideal
LATENCY_S = 0.1
HANGING = 0.02
URLS = 16_384
FETCH = FetchConfig(
    workers=1, per_host_per_second=PER_HOST, timeout_s=3, attempts=2, allow_private=True
)


def serve(port: int, image: bytes) -> None:
    """Images after a while, or nothing."""
    import asyncio

    async def answer(request: web.Request) -> web.Response:
        hangs = request.path.startswith("/hang")
        await asyncio.sleep(3600 if hangs else LATENCY_S)
        return web.Response(body=image, content_type="image/png")

    app = web.Application()
    app.router.add_get("/{name}", answer)
    web.run_app(app, host="0.0.0.0", port=port, print=None, backlog=4096)  # noqa: S104


@contextmanager
def serving() -> Iterator[int]:
    """The server, in a process of its own; gives its port."""
    port, image = free_port(), encode_png(Image.new("RGB", (64, 64), "teal"))
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(port, image), daemon=True)
    process.start()
    try:
        time.sleep(3)
        yield port
    finally:
        process.kill()
        process.join()


def rate(urls: int = URLS) -> float:
    """Links a second that one worker is done with, those included that never answer."""
    order = random.Random(0)
    with serving() as port, tempfile.TemporaryDirectory() as folder:
        lines = [
            json.dumps({"image_path": f"http://127.0.1.{1 + n % HOSTS}:{port}/{kind}{n}"})
            for n in range(urls)
            for kind in ["hang" if order.random() < HANGING else "ok"]
        ]
        file = Path(folder, "images.jsonl")
        file.write_text("\n".join(lines))
        config = IngestConfig(images=str(file), out="unused", fetch=FETCH)
        source = ingest.open_source(config)
        work = ingest.attempts_at(source, config)
        began = time.monotonic()
        with ThreadPoolExecutor(ingest.RANGES_AT_ONCE) as pool:
            tables = pool.map(lambda each: list(work.tables(each)), source.ranges)
            done = sum(table.num_rows for some in tables for table in some)
        seconds = time.monotonic() - began
    if done != urls:
        raise RuntimeError(f"{done} of {urls} records came out")
    return urls / seconds


_RATE: list[float] = []


def measured() -> float:
    """The rate, measured once."""
    if not _RATE:
        _RATE.append(rate())
    return _RATE[0]


BEFORE = 10.0  # of 640 links: a part of 64 records waited for its slowest link
ROWS = (
    Row(
        "urls",
        "links a second of 200 hosts, 2 % of them hanging",
        BEFORE,
        20 * BEFORE,
        "more",
        measured,
    ),
    Row(
        "urls-ideal",
        "the same, as a part of what the hosts' limits allow",
        BEFORE / (HOSTS * PER_HOST),
        0.8,
        "more",
        lambda: measured() / (HOSTS * PER_HOST),
    ),
)
