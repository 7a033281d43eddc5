"""Clients that people have: OpenAI's SDK, asynchronously and in streams, and LiteLLM."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn

from infra.ports import free_port
from tests.serving.fakes import BLUEPRINT, Server, opened, picture

PHOTO = ("photo.png", picture(), "image/png")


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Server, str]]:
    """The application with parts that need no Ray, and its address."""
    server, port = Server(), free_port()
    http = uvicorn.Server(uvicorn.Config(server.app, port=port, log_level="warning"))
    thread = threading.Thread(target=http.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not http.started:
        assert time.monotonic() < deadline, "the test's server did not start"
        time.sleep(0.02)
    yield server, f"http://127.0.0.1:{port}/v1"
    http.should_exit = True
    thread.join(timeout=20)


@pytest.fixture
def server(served: tuple[Server, str]) -> Server:
    served[0].painter.jobs.clear()
    return served[0]


@pytest.fixture(scope="module")
def url(served: tuple[Server, str]) -> str:
    return served[1]


def test_the_sdk_edits_asynchronously_and_in_streams(server: Server, url: str) -> None:
    async def ask() -> tuple[openai.types.ImagesResponse, list[Any]]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            whole, events = await asyncio.gather(
                client.images.edit(image=PHOTO, prompt="x", n=2, extra_body={"seed": 3}),
                client.images.edit(image=[PHOTO], prompt="x", stream=True, partial_images=2),
            )
            return whole, [event async for event in events]

    whole, events = asyncio.run(ask())
    assert [item.seed for item in whole.data or []] == [3, 4]
    for item in whole.data or []:
        assert item.revised_prompt == BLUEPRINT and opened(item.b64_json).size == (48, 32)
    assert [event.type for event in events] == [
        "image_edit.blueprint.delta",
        "image_edit.blueprint.delta",
        "image_edit.blueprint.done",
        "image_edit.partial_image",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    assert opened(events[-1].b64_json).size == (48, 32)


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks for one at import
    return pytest.importorskip(
        "litellm", reason="edits by LiteLLM need it installed (pip: litellm)"
    )


def test_litellm_edits_and_generates(litellm: Any, server: Server, url: str) -> None:
    known = {"model": "openai/dim", "api_base": url, "api_key": "none"}
    edited = litellm.image_edit(image=PHOTO[1], prompt="x", n=2, size="auto", **known)
    assert [opened(item.b64_json).size for item in edited.data] == [(48, 32)] * 2
    made = litellm.image_generation(prompt="a circle", n=2, size="64x32", seed=7, **known)
    assert [opened(item.b64_json).size for item in made.data] == [(64, 32)] * 2
    assert [job.seed for job in server.painter.jobs[2:]] == [7, 8]


def test_litellm_asks_asynchronously_and_is_told_what_is_wrong(
    litellm: Any, server: Server, url: str
) -> None:
    known = {"model": "openai/dim", "api_base": url, "api_key": "none"}
    edited = asyncio.run(litellm.aimage_edit(image=PHOTO[1], prompt="x", **known))
    assert opened(edited.data[0].b64_json).size == (48, 32)
    with pytest.raises(litellm.BadRequestError, match="multiples of 16"):
        litellm.image_generation(prompt="a", size="63x64", **known)
