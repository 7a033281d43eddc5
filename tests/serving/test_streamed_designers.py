"""Designers over HTTP whose blueprints are told while they are written, and those that cannot."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dim.blueprint import Blueprint
from dim.errors import DesignerError
from serving.designer import OtherDesigners
from serving.jobs import DesignJob
from tests.chat_server import Response, completion, streamed
from tests.chat_server import running as chat_server
from tests.serving.test_designers import ANSWER, PNG, pool

WORDS = [ANSWER[at : at + 12] for at in range(0, len(ANSWER), 12)]
RENDERED = Blueprint.parse(ANSWER, instruction="remove the cup").render()
Answering = Callable[[dict[str, Any]], Response]


def job(instruction: str = "remove the cup", **more: Any) -> DesignJob:
    return DesignJob("best", PNG, instruction, **{"streamed": True, **more})


async def pieces(pool: OtherDesigners, job: DesignJob) -> list[str]:
    return [piece async for piece in pool.write(job)]


def told(respond: Answering, *jobs: DesignJob, **settings: Any) -> tuple[list[list[str]], Any]:
    """The pieces of each job, one after the other, and what the server was asked."""
    with chat_server(respond) as server:

        async def work() -> list[list[str]]:
            asked = pool(server.url, **settings)
            return [await pieces(asked, each) for each in jobs]

        return asyncio.run(work()), server.requests


def test_a_blueprint_is_told_while_its_designer_writes() -> None:
    read = threading.Event()

    def words() -> Iterator[str]:
        yield from WORDS[:6]
        assert read.wait(20), "nothing was told before the end"
        yield from WORDS[6:]

    with chat_server(lambda _: streamed(words())) as server:

        async def work() -> None:
            asked = pool(server.url)
            found = []
            async for piece in asked.write(job()):
                found.append(piece)
                read.set()
            assert len(found) > 1 and "".join(found) == RENDERED
            # It was paid for: the next to ask gets it whole.
            assert await pieces(asked, job()) == [RENDERED]
            assert await pieces(asked, job(streamed=False)) == [RENDERED]

        asyncio.run(work())
    (request,) = server.requests
    assert request["stream"] is True and request["stream_options"] == {"include_usage": True}


def test_who_reads_along_with_somebody_else_reads_the_same() -> None:
    def words() -> Iterator[str]:
        for word in WORDS:
            time.sleep(0.02)
            yield word

    with chat_server(lambda _: streamed(words())) as server:

        async def work() -> None:
            asked = pool(server.url)
            found = await asyncio.gather(*(pieces(asked, job()) for _ in range(3)))
            assert all(len(each) > 1 and "".join(each) == RENDERED for each in found)

        asyncio.run(work())
    assert len(server.requests) == 1


def test_where_nobody_reads_along_nothing_is_streamed() -> None:
    found, (request,) = told(lambda _: completion(ANSWER), job(streamed=False))
    assert found == [[RENDERED]]
    assert "stream" not in request and "stream_options" not in request


def error(message: str) -> Response:
    return Response(json.dumps({"error": {"message": message}}).encode(), 400)


def test_a_server_that_does_not_stream_is_asked_as_ever() -> None:
    def respond(request: dict[str, Any]) -> Response:
        if "stream" in request:
            return error("stream is not supported for this model")
        return completion(ANSWER)

    found, requests = told(respond, job(), job("take it away"))
    assert found[0] == [RENDERED] and len(found[1]) == 1
    assert ["stream" in request for request in requests] == [True, False, False]


@pytest.mark.parametrize("said", ["Unknown field", "not allowed: stream_options"])
def test_a_server_that_refuses_for_its_own_reasons_is_asked_as_ever(said: str) -> None:
    def respond(request: dict[str, Any]) -> Response:
        if "stream_options" in request:
            return error(said)
        return streamed(WORDS, tokens=None) if "stream" in request else completion(ANSWER)

    found, requests = told(respond, job())
    assert "".join(found[0]) == RENDERED
    assert ("stream" in requests[-1]) == ("stream_options" in said)


def test_a_server_that_overlooks_it_answers_at_the_end() -> None:
    found, requests = told(lambda _: completion(ANSWER), job())
    assert found == [[RENDERED]] and len(requests) == 1


def test_a_stream_that_breaks_off_is_asked_for_again() -> None:
    answers = [streamed(WORDS[:9], finish_reason=None), streamed(WORDS)]
    found, requests = told(lambda _: answers.pop(0), job())
    assert "".join(found[0]) == RENDERED and len(requests) == 2


def test_what_breaks_off_for_good_is_an_error_and_is_not_kept() -> None:
    broken = [True, True, False]

    def respond(_: dict[str, Any]) -> Response:
        if broken.pop(0):
            return streamed(WORDS[:9], finish_reason=None)
        return streamed(WORDS)

    with chat_server(respond) as server:

        async def work() -> None:
            asked = pool(server.url)
            with pytest.raises(DesignerError, match="'best' did not answer; the server's log"):
                await pieces(asked, job())
            assert "".join(await pieces(asked, job())) == RENDERED

        asyncio.run(work())
    assert len(server.requests) == 3


def test_whether_it_is_a_blueprint_is_known_at_the_end() -> None:
    with chat_server(lambda _: streamed(WORDS[:-3])) as server:

        async def work() -> None:
            found: list[str] = []
            with pytest.raises(DesignerError, match="did not answer with a blueprint"):
                async for piece in pool(server.url).write(job()):
                    found.append(piece)
            assert RENDERED.startswith("".join(found))

        asyncio.run(work())


def test_a_stream_that_halts_ends_at_the_deadline_and_its_answer_is_kept() -> None:
    go_on = threading.Event()

    def words() -> Iterator[str]:
        yield from WORDS[:9]
        go_on.wait(20)
        yield from WORDS[9:]

    with chat_server(lambda _: streamed(words())) as server:

        async def work() -> None:
            asked = pool(server.url, deadline_s=20)
            found: list[str] = []
            with pytest.raises(DesignerError, match=r"'best' did not answer in [\d.]+ s"):
                async for piece in asked.write(job(deadline=time.time() + 0.8)):
                    found.append(piece)
            assert found and RENDERED.startswith("".join(found))
            go_on.set()
            assert "".join(await pieces(asked, job())) == RENDERED

        asyncio.run(work())
    assert len(server.requests) == 1


@pytest.mark.parametrize("counted", [(0, 500), None])
def test_what_a_stream_costs_is_counted(counted: tuple[int, int] | None) -> None:
    """A server that counts no tokens has them counted here."""
    dollars_a_token = 0.01
    one_question = 2048 * dollars_a_token  # as much as it may answer
    with chat_server(lambda _: streamed(WORDS, tokens=counted)) as server:

        async def work() -> None:
            price = {"output_price": 1e6 * dollars_a_token, "budget_usd": one_question + 0.1}
            asked = pool(server.url, **price)
            assert "".join(await pieces(asked, job())) == RENDERED
            with pytest.raises(DesignerError, match="takes no more questions"):
                await pieces(asked, job("take it away"))

        asyncio.run(work())
    assert len(server.requests) == 1
