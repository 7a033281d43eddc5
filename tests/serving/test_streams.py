"""Streams of events, with parts that need no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dim.errors import DesignerError
from serving import events
from serving.jobs import EditJob, Preview
from serving.protocol import BlueprintDelta
from tests.serving.fakes import BLUEPRINT, Method, Server, opened, picture


@pytest.fixture
def server() -> Server:
    return Server()


def read(response: Any) -> list[tuple[str, dict]]:
    """(name, data) of the events of a response."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = [part.splitlines() for part in response.text.split("\n\n") if part]
    found = []
    for lines in parts:
        fields = dict(line.split(": ", 1) for line in lines if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def edit(server: Server, **fields: Any) -> Any:
    data = {"prompt": "x", "stream": "true", **fields}
    return server.http.post("/v1/images/edits", data=data, files={"image": ("a.png", picture())})


def test_the_blueprint_comes_first_as_it_is_written(server: Server) -> None:
    found = read(edit(server, partial_images=2, seed=3, output_format="webp"))
    assert [name for name, _ in found] == [
        "image_edit.blueprint.delta",
        "image_edit.blueprint.delta",
        "image_edit.blueprint.done",
        "image_edit.partial_image",
        "image_edit.partial_image",
        "image_edit.completed",
    ]
    assert all(data["type"] == name for name, data in found)
    assert "".join(data["delta"] for _, data in found[:2]) == found[2][1]["blueprint"] == BLUEPRINT
    partial, completed = found[4][1], found[-1][1]
    assert [data["partial_image_index"] for _, data in found[3:5]] == [0, 1]
    for image in (partial, completed):
        assert opened(image["b64_json"]).format == "WEBP" and image["output_format"] == "webp"
        assert image["size"] == "48x32" and image["created_at"] > 0
        assert (image["quality"], image["background"]) == ("auto", "opaque")
    assert (completed["seed"], completed["blueprint"]) == (3, BLUEPRINT)
    assert completed["usage"]["total_tokens"] > 0
    assert server.painter.jobs[0].previews == 2


@pytest.mark.parametrize("fields", [{"designer": "none"}, {"blueprint": "as it is"}])
def test_where_nobody_writes_there_is_no_blueprint_event(server: Server, fields: dict) -> None:
    ((name, data),) = read(edit(server, **fields))
    assert name == "image_edit.completed" and data["blueprint"] == fields.get("blueprint")


def test_every_image_of_a_stream_is_told_by_its_index(server: Server) -> None:
    body = {"prompt": "x", "stream": True, "n": 3, "seed": 5}
    found = read(server.http.post("/v1/images/generations", json=body))
    assert {name for name, _ in found} == {"image_generation.completed"}
    assert sorted((data["image_index"], data["seed"]) for _, data in found) == [
        (0, 5),
        (1, 6),
        (2, 7),
    ]


def test_an_error_before_the_first_event_is_a_status(server: Server) -> None:
    server.designer.pieces, server.designer.error = (), DesignerError("it is down")
    response = edit(server)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "designer_failed"
    assert edit(server, size="9x9").status_code == 400


def test_an_error_after_the_first_event_is_an_event(server: Server) -> None:
    server.painter.error = KeyError("a secret of the house")
    found = read(edit(server))
    assert [name for name, _ in found][-2:] == ["image_edit.blueprint.done", "error"]
    error = found[-1][1]["error"]
    assert set(error) == {"message", "type", "param", "code"} and "secret" not in error["message"]
    assert server.app.state.admission.pending.images == 0


def test_a_stream_in_which_nothing_happens_is_kept_open(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "PING_S", 0.02)
    pings, second, wait_for = [], asyncio.Event(), asyncio.wait_for

    async def counted(*arguments: Any) -> Any:
        try:
            return await wait_for(*arguments)
        except TimeoutError:
            pings.append("one")
            if len(pings) == 2:
                second.set()
            raise

    monkeypatch.setattr(events.asyncio, "wait_for", counted)

    async def slow(job: EditJob) -> AsyncIterator[Preview]:
        await second.wait()
        raise ValueError("late")
        yield

    server.painter.paint = Method(slow)
    response = edit(server)
    assert response.text.count(": ping\n") >= 2
    assert read(response)[-1][0] == "error"


def test_with_the_response_ends_the_work() -> None:
    ended: list[str] = []

    async def work(tell: events.Tell) -> None:
        try:
            while True:
                await tell(BlueprintDelta(type="blueprint.delta", delta="x"))
                await asyncio.sleep(0)
        finally:
            ended.append("work")

    async def gone() -> None:
        response = await events.stream(work)

        async def receive() -> dict[str, str]:
            return {"type": "http.disconnect"}

        async def send(_message: object) -> None:
            await asyncio.sleep(0)

        await response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)  # type: ignore[arg-type]

    asyncio.run(asyncio.wait_for(gone(), 10))
    assert ended == ["work"]
