"""Bodies that come in slowly, from a client made to order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from serving.config import UploadLimits
from serving.uploads import Uploads

LIMITS = UploadLimits(places=2, timeout_s=0.9, least_bytes_per_s=1000, grace_s=0.3)
PATIENT = LIMITS.model_copy(update={"grace_s": 60, "timeout_s": 60})


async def reads(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that reads a body, and says what it thinks if that fails."""
    try:
        size = len(await Request(scope, receive).body())
    except Exception:
        await JSONResponse("cannot read it", 400)(scope, receive, send)
        return
    await JSONResponse(size)(scope, receive, send)


async def ask(
    uploads: Uploads, chunks: Sequence[bytes | asyncio.Event], every_s: float
) -> tuple[int, bytes]:
    """Send ``chunks``, and then what ends a body or, after ``b""``, nothing; wait for events."""
    coming = iter(chunks)
    sent: list[Message] = []

    async def receive() -> Message:
        chunk = next(coming, None)
        if isinstance(chunk, asyncio.Event):
            await chunk.wait()
            return await receive()
        if chunk == b"":
            await asyncio.Event().wait()
        await asyncio.sleep(every_s)
        return {"type": "http.request", "body": chunk or b"", "more_body": chunk is not None}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "headers": [], "path": "/"}
    await uploads.receive_for(reads, scope, receive, send)
    return sent[0]["status"], sent[1]["body"]


def test_a_body_that_comes_in_time_is_read_whole() -> None:
    assert asyncio.run(ask(Uploads(PATIENT), [b"x" * 100] * 5, 0.05)) == (200, b"500")


@pytest.mark.parametrize(
    ("chunks", "every_s"),
    [([b""], 0), ([b"x"] * 100, 0.1), ([b"x" * 1000] * 100, 0.1), ([b"x" * 50, b""], 0)],
    ids=["nothing", "a byte now and then", "fast, without end", "a beginning"],
)
def test_a_body_that_does_not_is_given_up(chunks: list[bytes], every_s: float) -> None:
    status, body = asyncio.run(asyncio.wait_for(ask(Uploads(LIMITS), chunks, every_s), 3))
    assert status == 408 and b"the request's body did not come in" in body


def test_a_slow_upload_loses_its_place_to_one_that_comes() -> None:
    async def work() -> list[tuple[int, bytes]]:
        uploads = Uploads(PATIENT)
        slow = [asyncio.create_task(ask(uploads, [b"x" * size, b""], 0)) for size in (20, 10)]
        await asyncio.sleep(0.4)
        answers = [await ask(uploads, [b"x"], 0)]
        assert not slow[0].done()  # the slowest goes first
        answers += [await slow[1]]
        slow[0].cancel()
        return answers

    (status, body), (given_up, why) = asyncio.run(work())
    assert (status, body) == (200, b"1")
    assert given_up == 408 and b"while others wait" in why


def test_fast_uploads_keep_their_places_and_leave_them_when_they_are_there() -> None:
    async def work() -> None:
        uploads = Uploads(PATIENT)
        begun, rest = b"x" * 1_000_000, asyncio.Event()
        chunks = [begun, rest, b"x" * 1000]
        fast = [asyncio.create_task(ask(uploads, chunks, 0)) for _ in range(2)]

        def received() -> int:
            return sum(each._received for each in uploads._running)

        while received() < 2 * len(begun):  # noqa: ASYNC110, nothing is set when it comes
            await asyncio.sleep(0)
        status, body = await ask(uploads, [b"x"], 0)
        assert status == 429 and b"busy with 2 uploads" in body
        rest.set()
        assert [await each for each in fast] == [(200, b"1001000")] * 2
        assert (await ask(uploads, [b"x"], 0))[0] == 200
        assert not uploads._running

    asyncio.run(work())
