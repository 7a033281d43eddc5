"""Answers as they come about: server-sent events, by OpenAI's names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from serving.errors import error_response
from serving.protocol import Event

Tell = Callable[[Event], Awaitable[None]]
"""Where a work in progress says what has come about."""

PING_S = 15.0
"""Proxies give up on a stream in which nothing happens."""

AHEAD = 4
"""Events that may wait for a slow client before the work waits too."""


class EventStream(EventSourceResponse):
    """The response; with it ends the work that makes the events, also when the client has gone."""

    def __init__(self, events: AsyncIterator[bytes], work: asyncio.Task[None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)


async def stream(work: Callable[[Tell], Awaitable[object]]) -> EventStream:
    """What ``work`` tells, as a response that begins with its first event.

    Raises:
        Exception: what ``work`` raises before that. What it raises later is an event, ``error``.
    """
    events: asyncio.Queue[Event | Exception | None] = asyncio.Queue(AHEAD)

    async def run() -> None:
        try:
            await work(events.put)
        except Exception as error:
            await events.put(error)
        else:
            await events.put(None)

    task = asyncio.create_task(run())
    try:
        first = await events.get()
    except asyncio.CancelledError:
        task.cancel()
        raise
    if isinstance(first, Exception):
        raise first
    return EventStream(_written(first, events), task)


async def _written(
    event: Event | Exception | None, events: asyncio.Queue[Event | Exception | None]
) -> AsyncIterator[bytes]:
    while event is not None:
        yield await asyncio.to_thread(_write, event)
        if isinstance(event, Exception):
            return
        while True:
            try:
                event = await asyncio.wait_for(events.get(), PING_S)
                break
            except TimeoutError:
                yield KEEPALIVE_COMMENT


def _write(event: Event | Exception) -> bytes:
    if isinstance(event, Exception):
        body = bytes(error_response(event).body).decode()
        return format_sse_event(event="error", data_str=body)
    return format_sse_event(event=event.type, data_str=event.model_dump_json())
