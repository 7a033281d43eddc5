"""Many requests of all shapes, then odd sizes, aborts and streams: memory stays where it was.

    python -m benchmarks.serving_soak                               # 1,000 and 800 requests
    python -m benchmarks.serving_soak --mixed 40 --odd 40           # to see that it runs

Sixteen clients send ``--mixed`` generations and edits of several shapes, numbers of steps and
images, all of which have to be answered. Then ``--odd`` edits of sources with odd sizes: a quarter
is left before its answer comes, a quarter is streamed to the end, and of a quarter the stream is
closed at its first event. After each part the server has to be empty, to paint the same image as at
first, bit for bit, and to have grown by no more than ``--grow`` MiB a process since the part's
first fifth. Leaves with status 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import re
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.serving import CLIENTS, save_model, served

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"
SIZES = ((64, 64), (64, 32), (96, 64), (128, 48), (16, 48), (112, 112))
WARM = 0.2
EMPTY_S = 60.0
Sends = Callable[[httpx.AsyncClient, int], Awaitable[str]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Send, report, and say what went wrong."""
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder, served(save_model(folder)) as server:
        failures = measure(server.url, options.mixed, options.odd, options.grow)
    for said in failures:
        print(f"FAILED: {said}", file=sys.stderr)
    return 1 if failures else 0


def measure(url: str, count_mixed: int, count_odd: int, grow_mib: float) -> list[str]:
    """Soak the server at ``url``, which this process started; what went wrong."""
    first, failures = _painted(url), []
    for name, send, count in (("mixed", _send_mixed, count_mixed), ("odd", _send_odd, count_odd)):
        began = time.perf_counter()
        warm = int(WARM * count)
        came = asyncio.run(_send_all(url, send, range(warm)))
        before = replicas_bytes()
        came += asyncio.run(_send_all(url, send, range(warm, count)))
        seconds = time.perf_counter() - began
        if not _is_empty(url):
            failures.append(f"{name}: places are not free again")
        after = replicas_bytes()
        outcomes = {outcome: came.count(outcome) for outcome in sorted(set(came))}
        grown = {part: (after[part] - before[part]) / 2**20 for part in before}
        told = ", ".join(f"{part} {mib:+.1f} MiB" for part, mib in sorted(grown.items()))
        print(f"{name}: {count} requests in {seconds:.0f} s, {outcomes}; {told}")
        failures += [f"{name}: {o}" for o in outcomes if o not in ("answered", "left", "streamed")]
        failures += [
            f"{name}: {part} has grown by {mib:.0f} MiB"
            for part, mib in grown.items()
            if mib > grow_mib
        ]
        if _painted(url) != first:
            failures.append(f"{name}: the same request has another image afterwards")
    return failures


def replicas_bytes(application: str = "dim") -> dict[str, int]:
    """Bytes of memory of the replicas that this process started, by deployment."""
    found: dict[str, int] = {}
    titled = re.compile(rf"ray::ServeReplica:{re.escape(application)}:(\w+)\b")
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            named = titled.match(" ".join(process.cmdline()))
            if named is not None:
                found[named[1]] = found.get(named[1], 0) + process.memory_info().rss
    return found


async def _send_all(url: str, send: Sends, numbers: range) -> list[str]:
    """What became of each request."""
    waiting, came = iter(numbers), []
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def work() -> None:
            for number in waiting:
                came.append(await send(client, number))

        await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return came


async def _send_mixed(client: httpx.AsyncClient, number: int) -> str:
    rng = np.random.default_rng(number)
    width, height = SIZES[rng.integers(len(SIZES))]
    fields = {"prompt": "a red circle", "seed": number, "steps": int(rng.integers(1, 12))}
    fields |= {"size": f"{width}x{height}", "n": int(rng.integers(1, 3))}
    if number % 2:
        return _outcome(await client.post(GENERATE, json=fields))
    files = {"image": ("a.png", _picture(rng, 64, 64))}
    return _outcome(await client.post(EDIT, data=_texts(fields), files=files))


async def _send_odd(client: httpx.AsyncClient, number: int) -> str:
    rng = np.random.default_rng([1, number])
    width, height = (int(side) for side in rng.integers(17, 180, 2))
    files = {"image": ("a.png", _picture(rng, width, height))}
    kind = number % 4
    fields = {"prompt": "x", "seed": number, "steps": 4 if kind < 2 else 30}
    if kind == 0:
        return _outcome(await client.post(EDIT, data=_texts(fields), files=files))
    if kind == 1:
        body = _texts({**fields, "stream": "true", "partial_images": 2})
        answer = await client.post(EDIT, data=body, files=files)
        whole = answer.status_code == 200 and "image_edit.completed" in answer.text
        return "streamed" if whole else f"a stream without its end: {answer.text[:200]}"
    if kind == 2:
        body = _texts({**fields, "stream": "true", "partial_images": 3})
        async with client.stream("POST", EDIT, data=body, files=files) as stream:
            async for _ in stream.aiter_lines():
                return "left"
        return "a stream without an event"
    soon = httpx.Timeout(10, read=float(rng.uniform(0.01, 0.2)))
    try:
        answer = await client.post(EDIT, data=_texts(fields), files=files, timeout=soon)
    except httpx.ReadTimeout:
        return "left"
    return _outcome(answer)


def _texts(fields: dict[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in {**fields, "designer": "none"}.items()}


def _outcome(answer: httpx.Response) -> str:
    return "answered" if answer.status_code == 200 else f"{answer.status_code} {answer.text[:200]}"


def _picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _painted(url: str) -> str:
    """The image of one request that is always the same."""
    body = {"prompt": "a red circle", "seed": 7, "steps": 8, "size": "64x64"}
    answer = httpx.post(f"{url}{GENERATE}", json=body, timeout=60).raise_for_status()
    return str(answer.json()["data"][0]["b64_json"])


def _is_empty(url: str) -> bool:
    deadline = time.monotonic() + EMPTY_S
    while time.monotonic() < deadline:
        if httpx.get(f"{url}/healthz", timeout=30).json()["pending_images"] == 0:
            return True
        time.sleep(0.1)
    return False


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mixed", type=int, default=1000, help="requests of mixed shapes")
    parser.add_argument("--odd", type=int, default=800, help="edits of odd sizes")
    parser.add_argument("--grow", type=float, default=64.0, help="MiB that a process may grow by")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
