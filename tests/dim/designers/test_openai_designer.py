"""The HTTP designer against a real server that answers rightly, wrongly, late or not at all."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from dim.blueprint import request_prompt
from dim.caption import request_prompt as caption_prompt
from dim.designers import CallOptions, DesignRequest, create, create_captioner
from dim.designers.wire import data_url
from dim.errors import DesignerError, InputError
from tests.chat_server import ChatServer, Response, completion, images_of, running, text_of

QUICK = CallOptions(retries=0, timeout_s=5, busy_s=0)


def encoded(format: str = "PNG", size: tuple[int, int] = (32, 16), **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with running(lambda request: completion("a plan")) as server:
        yield server


def ask(server: ChatServer, count: int = 1, options: CallOptions = QUICK) -> list[Any]:
    designer = create(f"openai:test@{server.url}", calls=options)
    return designer.design([DesignRequest(f"do {n}", encoded()) for n in range(count)])


def test_sends_text_and_images_as_data_urls(server: ChatServer) -> None:
    source, target = encoded("JPEG"), encoded("WEBP")
    designer = create(f"openai:test@{server.url}", calls=QUICK)
    replies = designer.design(
        [DesignRequest("Add a hat", source), DesignRequest("Add a hat", source, target)]
    )
    assert replies == ["a plan", "a plan"]
    alone, pair = sorted(server.requests, key=lambda request: len(images_of(request)))
    assert alone["path"] == "/v1/chat/completions"
    assert alone["model"] == "test" and alone["temperature"] == 0.0
    assert text_of(alone) == request_prompt("Add a hat", False)
    assert text_of(pair) == request_prompt("Add a hat", True)
    assert [url.partition(",")[0] for url in images_of(pair)] == [
        "data:image/jpeg;base64",
        "data:image/webp;base64",
    ]
    assert base64.b64decode(images_of(pair)[1].partition(",")[2]) == target


def test_answers_keep_the_order_of_the_requests(server: ChatServer) -> None:
    def late_first(request: dict[str, Any]) -> Response:
        number = int(text_of(request).partition("do ")[2].split()[0])
        time.sleep(0.05 * (number == 0))
        return completion(f"answer {number}")

    server.respond = late_first
    assert ask(server, 8) == [f"answer {n}" for n in range(8)]


def test_answers_are_reported_as_they_arrive(server: ChatServer) -> None:
    arrived: dict[int, str] = {}
    release = threading.Event()

    def hold_first(request: dict[str, Any]) -> Response:
        if "do 0" in text_of(request):
            assert release.wait(5)
        return completion("late" if "do 0" in text_of(request) else "soon")

    def note(place: int, answer: str) -> None:
        arrived[place] = answer
        if len(arrived) == 2:
            release.set()  # only what was reported before the last answer lets it come

    server.respond = hold_first
    designer = create(f"openai:test@{server.url}", calls=QUICK)
    requests = [DesignRequest(f"do {n}", encoded()) for n in range(3)]
    assert designer.design(requests, on_answer=note) == ["late", "soon", "soon"]
    assert arrived == {0: "late", 1: "soon", 2: "soon"}


@pytest.mark.parametrize(
    ("response", "complaint"),
    [
        (Response(b'{"error": {"message": "boom"}}', 500), "answered HTTP 500: .*boom"),
        (Response(b"slow down", 429, "text/plain"), "answered HTTP 429: slow down"),
        (Response(b"<html>Bad gateway</html>", 502, "text/html"), "HTTP 502: <html>Bad gateway"),
        (
            Response(b"<html>Log in</html>", 200, "text/html"),
            "did not answer with a chat completion",
        ),
        (Response(b"", 200), "cannot be read|did not answer"),
        (Response(completion("half").body[:60]), "cannot be read"),
        (Response(b"{}"), "without a choice"),
        (Response(b'{"choices": []}'), "without a choice"),
        (Response(b"[1, 2]"), "did not answer with a chat completion|cannot be read|without"),
        (completion(""), "answered nothing"),
        (completion("  \n"), "answered nothing"),
        (completion(None, refusal="I cannot do that"), "refused: I cannot do that"),
        (completion("1. Edit Instr", "length"), "cut off"),
        (completion("x", "content_filter"), "content filter"),
    ],
)
def test_a_bad_answer_is_that_requests_error(
    server: ChatServer, response: Response, complaint: str
) -> None:
    server.respond = lambda request: response if "do 1" in text_of(request) else completion("fine")
    good, bad, also_good = ask(server, 3)
    assert (good, also_good) == ("fine", "fine")
    assert isinstance(bad, DesignerError)
    with pytest.raises(DesignerError, match=complaint):
        raise bad
    assert "\n" not in str(bad) and len(str(bad)) < 400


def test_a_busy_server_is_asked_again(server: ChatServer) -> None:
    seen: list[int] = []

    def busy_twice(request: dict[str, Any]) -> Response:
        seen.append(1)
        if len(seen) <= 2:
            status = 429 if len(seen) == 1 else 503
            return Response(b"{}", status, headers={"Retry-After-Ms": "10"})
        return completion("at last")

    server.respond = busy_twice
    assert ask(server, 1, CallOptions(retries=3, timeout_s=5)) == ["at last"]
    assert len(seen) == 3


def test_a_hanging_server_is_given_up(server: ChatServer) -> None:
    release = threading.Event()
    server.respond = lambda request: completion(str(release.wait(10)))
    (reply,) = ask(server, 1, CallOptions(retries=0, timeout_s=0.3))
    release.set()
    assert isinstance(reply, DesignerError)
    assert "no answer in time" in str(reply)


def test_nobody_at_the_address() -> None:
    designer = create("openai:test@http://127.0.0.1:9/v1", calls=QUICK)
    (reply,) = designer.design([DesignRequest("x", encoded())])
    assert isinstance(reply, DesignerError)
    assert "test at http://127.0.0.1:9/v1: cannot be reached" in str(reply)


def test_never_more_in_flight_than_told(server: ChatServer) -> None:
    now, most, lock = 0, 0, threading.Lock()

    def count(request: dict[str, Any]) -> Response:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.02)
        with lock:
            now -= 1
        return completion("ok")

    server.respond = count
    assert ask(server, 20, CallOptions(retries=0, in_flight=3)) == ["ok"] * 20
    assert 2 <= most <= 3


def test_an_unreadable_image_is_not_sent(server: ChatServer) -> None:
    designer = create(f"openai:test@{server.url}", calls=QUICK)
    bad, good = designer.design([DesignRequest("x", b"no image"), DesignRequest("y", encoded())])
    assert isinstance(bad, DesignerError) and "image not sent" in str(bad)
    assert good == "a plan"
    assert len(server.requests) == 1


def test_half_a_surrogate_pair_cannot_break_a_file(server: ChatServer) -> None:
    body = json.loads(completion("x").body)
    body["choices"][0]["message"]["content"] = "ok \ud83d"
    server.respond = lambda request: Response(json.dumps(body).encode())
    assert ask(server) == ["ok ?"]


def test_images_are_sent_upright_and_in_a_format_servers_read() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = data_url(encoded("JPEG", (32, 16), exif=exif))
    assert turned.startswith("data:image/png")
    with Image.open(io.BytesIO(base64.b64decode(turned.partition(",")[2]))) as image:
        assert image.size == (16, 32)
    assert data_url(encoded("BMP")).startswith("data:image/png")
    with pytest.raises(InputError):
        data_url(b"nothing")


def test_the_captioner_asks_for_a_long_caption(server: ChatServer) -> None:
    server.respond = lambda request: completion("A red field.")
    captioner = create_captioner(f"openai:test@{server.url}", calls=QUICK)
    assert captioner.caption([encoded(), encoded()]) == ["A red field.", "A red field."]
    assert server.texts() == [caption_prompt()] * 2


def test_the_server_is_not_part_of_what_makes_an_answer() -> None:
    one, two = (create(f"openai:m@http://127.0.0.1:{port}/v1") for port in (1, 2))
    warm = create("openai:m@http://127.0.0.1:1/v1", calls=CallOptions(temperature=1.0))
    assert one.fingerprint == two.fingerprint != warm.fingerprint
