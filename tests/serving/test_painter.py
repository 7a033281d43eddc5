"""Painters on a real Serve: who has gone, what is drained, and what a killed replica leaves."""

from __future__ import annotations

import base64
import io
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from ray import serve

from dim import model as models
from dim.model import DIM
from infra.ports import free_port
from serving.config import ServingConfig
from serving.engine import Load
from serving.serve import Server, start

AT_ONCE = 20


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> DIM:
    return models.load(tiny_model_dir)


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


def painters() -> list[ray.actor.ActorHandle]:
    """The replicas of the painter, as Serve names them."""
    named = ray.util.list_named_actors(all_namespaces=True)
    names = [one["name"] for one in named if "::dim#painter#" in one["name"]]
    return [ray.get_actor(name, namespace="serve") for name in names]


def loads() -> list[Load]:
    """Of each painter, by asking as often as both are sure to have answered."""
    handle = serve.get_deployment_handle("painter", "dim")
    return [handle.load.remote().result(timeout_s=20) for _ in range(24)]


def generate(server: Server, seed: int, steps: int) -> httpx.Response:
    body = {"prompt": "a red circle", "seed": seed, "steps": steps}
    return httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=120)


def test_a_client_that_goes_away_stops_the_painters_steps(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = b'{"prompt": "a red circle", "seed": 1, "steps": 100000}'
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.encode() + body)
        until(lambda: any(load.running and load.steps for load in loads()))
    until(lambda: all(load.running == 0 for load in loads()))
    steps = {load.steps for load in loads()}
    assert max(steps) > 0
    time.sleep(0.5)
    assert {load.steps for load in loads()} <= steps


def test_no_request_fails_when_a_painter_is_killed_under_load(server: Server, model: DIM) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = [pool.submit(generate, server, seed, 150) for seed in range(AT_ONCE)]
        until(lambda: sum(load.running for load in loads()) > 0)
        victim = painters()[0]
        ray.kill(victim, no_restart=True)
        answers = [one.result() for one in asked]
    assert [answer.text[:200] for answer in answers if answer.status_code != 200] == []
    expected = model.generate(["a red circle"], seeds=[7], steps=150)[0]
    png = base64.b64decode(answers[7].json()["data"][0]["b64_json"])
    assert np.array_equal(Image.open(io.BytesIO(png)), expected)
