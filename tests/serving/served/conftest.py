"""One real server for the tests of this folder: it takes longer to start than they do to run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from infra.ports import free_port
from serving.config import ServingConfig
from serving.serve import Server, start

BATCH, PLACES = 4, 10
"""Images that are painted at once, and that are let in."""
BODY_LIMIT = 300_000


@pytest.fixture(scope="package")
def server(ray_cluster: None, tiny_model_dir: Path) -> Iterator[Server]:
    server = start(
        ServingConfig(
            model=str(tiny_model_dir),
            designers=("oracle", "self"),
            port=free_port(),
            max_batch_size=BATCH,
            batch_wait_s=0.2,
            max_pending=PLACES,
            max_request_bytes=BODY_LIMIT,
            max_image_pixels=1_000_000,
        )
    )
    yield server
    server.stop()


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
