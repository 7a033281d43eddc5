"""Painters on a real Serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from ray import serve

from infra.ports import free_port
from serving.config import ServingConfig
from serving.engine import Load
from serving.serve import APPLICATION, Server, start


@pytest.fixture(scope="module")
def server(ray_cluster: None, tiny_model_dir: Path) -> Iterator[Server]:
    server = start(
        ServingConfig(
            model=str(tiny_model_dir),
            designers=("none",),
            port=free_port(),
            painter_replicas=2,
            cpus_per_replica=0.5,
            max_batch_size=8,
            max_steps=100_000,
        )
    )
    yield server
    server.stop()


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def loads() -> list[Load]:
    """Of each painter, by asking as often as both are sure to have answered."""
    handle = serve.get_deployment_handle("painter", APPLICATION)
    return [handle.load.remote().result(timeout_s=20) for _ in range(8)]


def generate(server: Server, seed: int, steps: int, timeout: float = 60) -> httpx.Response:
    body = {"prompt": "a red circle", "seed": seed, "steps": steps}
    return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=timeout)


def test_a_client_that_goes_away_stops_the_painters_steps(server: Server) -> None:
    with pytest.raises(httpx.ReadTimeout):
        generate(server, seed=1, steps=100_000, timeout=1.0)
    until(lambda: all(load.running == 0 for load in loads()))
    steps = {load.steps for load in loads()}
    assert max(steps) > 0
    time.sleep(0.5)
    assert {load.steps for load in loads()} <= steps
