"""The server against the bare model, and sixteen clients against one: ratios of one run.

    python -m benchmarks.serving                         # the tiny configuration, random weights
    python -m benchmarks.serving --requests 16 --rounds 1   # to see that it runs

One request alone is compared with the same call of ``dim.model`` in this process: the median may
be 1.10 times as long and 15 ms more. Then the same requests are sent one after the other and
sixteen at a time, all alike and with mixed sizes and steps, in turns. Leaves with status 1 when a
request alone takes longer than that, or when sixteen at a time are less than ``--target`` times as
fast.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from dim import model
from dim.config import load_config
from dim.model.config import ModelConfig
from infra.ports import free_port
from serving.config import ServingConfig
from serving.serve import Server, start

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
PARTS = ("understanding", "connector", "painter", "autoencoder")
CLIENTS = 16
ALONE_FACTOR, ALONE_MS = 1.10, 15.0
SIZES = ((64, 64), (64, 32), (96, 64))
STEPS = 20


@dataclass(frozen=True)
class Asked:
    """One generation to ask for."""

    seed: int
    size: tuple[int, int] = (64, 64)
    steps: int = STEPS

    @property
    def body(self) -> dict[str, Any]:
        """As the server takes it."""
        size = f"{self.size[0]}x{self.size[1]}"
        return {"prompt": "a red circle", "size": size, "steps": self.steps, "seed": self.seed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, report, and say what missed its target."""
    options = _options(arguments)
    alike = [Asked(seed) for seed in range(options.requests)]
    mixed = [
        Asked(seed, SIZES[seed % len(SIZES)], STEPS // 2 + seed % STEPS)
        for seed in range(options.requests)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(folder)
        with served(path) as server:
            failures = _alone(server, path, options.requests)
            for name, asked in (("alike", alike), ("mixed", mixed)):
                failures += _together(server, name, asked, options)
    for said in failures:
        print(f"FAILED: {said}", file=sys.stderr)
    return 1 if failures else 0


def save_model(folder: str) -> str:
    """The address of a model of the tiny configuration, with random weights, in ``folder``."""
    path = f"{folder}/model"
    random = [f"{part}.weights=null" for part in PARTS]
    model.build(load_config(ModelConfig, CONFIG, random), seed=0).save(path)
    return path


@contextlib.contextmanager
def served(path: str) -> Iterator[Server]:
    """A server of the model at ``path`` that takes as many as there are clients at a time."""
    server = start(
        ServingConfig(
            model=path,
            designers=("none",),
            port=free_port(),
            max_batch_size=CLIENTS,
            max_pending=64 * CLIENTS,
            max_pending_megapixel_steps=1e6,
        )
    )
    try:
        yield server
    finally:
        server.stop()


def _alone(server: Server, path: str, count: int) -> list[str]:
    """The median of a request alone against that of the bare call, in turns."""
    dim = model.load(path)
    bare: list[float] = []
    served: list[float] = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for seed in range(-2, count):  # the first two are not counted
            asked = Asked(abs(seed))
            took = _seconds(
                lambda asked=asked: dim.generate(
                    ["a red circle"], size=asked.size, seeds=[asked.seed], steps=asked.steps
                )
            )
            came = _seconds(lambda asked=asked: _ask(client, asked))
            if seed >= 0:
                bare.append(took)
                served.append(came)
    call, request = (1000 * statistics.median(one) for one in (bare, served))
    allowed = ALONE_FACTOR * call + ALONE_MS
    print(f"alone: call {call:.1f} ms, request {request:.1f} ms, allowed {allowed:.1f} ms")
    return [] if request <= allowed else [f"a request alone takes {request - allowed:.1f} ms more"]


def _together(
    server: Server, name: str, asked: Sequence[Asked], options: argparse.Namespace
) -> list[str]:
    """Throughput of sixteen clients against one, the best of some rounds in turns."""
    one, many = float("inf"), float("inf")
    for _ in range(options.rounds):
        one = min(one, _seconds(lambda: asyncio.run(_send(server, asked, 1))))
        many = min(many, _seconds(lambda: asyncio.run(_send(server, asked, CLIENTS))))
    count, ratio = len(asked), one / many
    print(
        f"{name}: {count / one:.1f}/s one by one, {count / many:.1f}/s by {CLIENTS}: {ratio:.2f}x"
    )
    if ratio >= options.target:
        return []
    return [f"{name}: {CLIENTS} clients are {ratio:.2f} times as fast, not {options.target:g}"]


async def _send(server: Server, asked: Sequence[Asked], clients: int) -> None:
    waiting = iter(asked)
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

        async def work() -> None:
            for one in waiting:
                (await client.post("/v1/images/generations", json=one.body)).raise_for_status()

        await asyncio.gather(*(work() for _ in range(clients)))


def _ask(client: httpx.Client, asked: Asked) -> None:
    client.post("/v1/images/generations", json=asked.body).raise_for_status()


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="timed; the best counts")
    parser.add_argument("--target", type=float, default=1.5, help="ratio to one client wanted")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
