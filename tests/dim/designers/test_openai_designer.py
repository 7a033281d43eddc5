"""The HTTP designer against a real server that answers rightly, wrongly, late or not at all."""

from __future__ import annotations

import base64
import io
import json
import pickle
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from PIL import Image

from dim.blueprint import request_prompt
from dim.caption import request_prompt as caption_prompt
from dim.design import ReviewRequest, Reviews
from dim.designers import CallOptions, DesignRequest, Question, create, create_captioner
from dim.designers.base import BreakerOptions
from dim.designers.calls.gate import LocalExchange
from dim.designers.calls.meter import Grant, Limits, Settled, Want
from dim.designers.calls.usage import Unusable
from dim.designers.calls.wire import data_url
from dim.errors import CallsStopped, DesignerError, InputError
from dim.review import Review
from dim.review import parse as parse_review
from dim.review import request_prompt as review_prompt
from tests.chat_server import (
    ChatServer,
    Response,
    completion,
    images_of,
    running,
    streamed,
    text_of,
)

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


def test_a_review_shows_both_images_and_the_plan(server: ChatServer) -> None:
    server.respond = lambda request: completion(Review(True, 9).render())
    source, painted = encoded("JPEG"), encoded("WEBP")
    designer = create(f"openai:test@{server.url}", calls=QUICK)
    assert isinstance(designer, Reviews)
    (reply,) = designer.review([ReviewRequest("Add a hat", "a plan", source, painted)])
    assert parse_review(str(reply), instruction="Add a hat") == Review(True, 9)
    (asked,) = server.requests
    assert text_of(asked) == review_prompt("Add a hat", "a plan")
    sent = [base64.b64decode(url.partition(",")[2]) for url in images_of(asked)]
    assert sent == [source, painted]


def test_credentials_in_the_url_reach_the_server_and_no_error(
    server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    url = server.url.replace("://", "://me:s3cret%40@") + "/?api_key=s3cret&version=1"
    designer = create(f"openai:test@{url}", calls=QUICK)
    assert designer.design([DesignRequest("Add a hat", encoded())]) == ["a plan"]
    asked = server.requests[0]
    assert asked["path"] == "/v1/chat/completions?api_key=s3cret&version=1"
    assert base64.b64decode(asked["login"].removeprefix("Basic ")) == b"me:s3cret@"
    assert "s3cret" not in f"{designer.name} {designer.fingerprint}"
    server.respond = lambda request: Response(f"no such model at {url}".encode(), 400)
    (refused,) = designer.design([DesignRequest("Add a hat", encoded())])
    assert "api_key=***" in str(refused) and "s3cret" not in str(refused)
    server.respond = lambda request: Response(b"wrong password", 401)
    with pytest.raises(CallsStopped) as barred:
        create(f"openai:test@{url}", calls=QUICK).design([DesignRequest("x", encoded())])
    assert "s3cret" not in str(barred.value)


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
        (completion(None, "length", reasoning="1. Edit Instr"), "cut off within the .* reasoning"),
        (completion("1. Edit Instr", "abort"), "broke the answer off"),
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


def spread(server: ChatServer, statuses: list[int], **headers: str) -> list[float]:
    """Have the server send these statuses before it answers; returns when it was asked."""
    times: list[float] = []

    def respond(request: dict[str, Any]) -> Response:
        times.append(time.monotonic())
        if len(times) <= len(statuses):
            return Response(b"{}", statuses[len(times) - 1], headers=headers)
        return completion("at last")

    server.respond = respond
    return times


def test_being_told_to_wait_costs_no_attempt(server: ChatServer) -> None:
    times = spread(server, [429] * 4, **{"Retry-After-Ms": "20"})
    assert ask(server, 1, CallOptions(retries=0, timeout_s=5)) == ["at last"]
    assert len(times) == 5


def test_retry_after_is_honoured_by_every_request(server: ChatServer) -> None:
    times = spread(server, [429], **{"Retry-After": "1"})
    assert ask(server, 6, CallOptions(retries=0, timeout_s=5, in_flight=2)) == ["at last"] * 6
    ordered = sorted(times)
    gaps = [later - earlier for earlier, later in pairwise(ordered)]
    assert len(times) == 7 and max(gaps) >= 0.95
    assert gaps.index(max(gaps)) < 3  # what was out when the server said so, and no more


@pytest.mark.parametrize("limits", [{}, {"requests_per_minute": 60_000}])
def test_nobody_waits_for_a_pause_that_is_longer_than_the_job_s_patience(
    server: ChatServer, limits: dict[str, Any]
) -> None:
    """A quota that is spent until tomorrow: what waits for its turn does not sleep until then."""
    times = spread(server, [429] * 9, **{"Retry-After": "86400"})
    options = CallOptions(retries=0, timeout_s=5, busy_s=1, in_flight=1, **limits)
    began = time.monotonic()
    with pytest.raises(CallsStopped, match="too busy for any answer in 1 s"):
        ask(server, 4, options)
    assert time.monotonic() - began < 10
    assert len(times) == 1


def test_other_processes_are_not_held_longer_than_the_job_has_patience(server: ChatServer) -> None:
    held: list[float] = []

    class Watched(LocalExchange):
        async def __call__(
            self, settled: Sequence[Settled], wants: Sequence[Want], hold_s: float
        ) -> list[Grant]:
            held.append(hold_s)
            return await super().__call__(settled, wants, hold_s)

    spread(server, [429] * 9, **{"Retry-After": "86400"})
    options = CallOptions(retries=0, timeout_s=5, busy_s=90, requests_per_minute=60_000)
    watched = Watched(Limits(requests_per_minute=60_000))
    designer = create(f"openai:test@{server.url}", calls=options, exchange=watched)
    (reply,) = designer.design([DesignRequest("do", encoded())])
    assert "answered HTTP 429" in str(reply)
    deadline = time.monotonic() + 5
    while not any(held) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert max(held) == 90


def test_a_server_that_is_busy_for_too_long_stops_the_job(server: ChatServer) -> None:
    server.respond = lambda request: Response(b"full", 429, headers={"Retry-After-Ms": "20"})
    with pytest.raises(CallsStopped, match=r"too busy for any answer in 0.2 s \(answered HTTP 429"):
        ask(server, 3, CallOptions(retries=0, timeout_s=5, busy_s=0.2))
    server.respond = lambda request: Response(b"full", 429, headers={"Retry-After": "9999"})
    began = time.monotonic()
    with pytest.raises(CallsStopped, match="too busy"):
        ask(server, 3, CallOptions(retries=0, timeout_s=5, busy_s=60))
    assert time.monotonic() - began < 20  # nobody waits for what is beyond all patience


def test_a_request_that_alone_is_turned_away_fails_alone(server: ChatServer) -> None:
    server.respond = lambda request: (
        Response(b"request too large", 429, headers={"Retry-After-Ms": "20"})
        if "do 1" in text_of(request)
        else completion("fine")
    )
    options = CallOptions(retries=0, timeout_s=5, busy_s=0.5, in_flight=1)
    designer = create(f"openai:test@{server.url}", calls=options)
    first, bad, last = designer.design([DesignRequest(f"do {n}", encoded()) for n in range(3)])
    assert (first, last) == ("fine", "fine") and "request too large" in str(bad)


@pytest.mark.parametrize(
    "broken",
    [
        Response(b"{}", 500),
        Response(b"<html>Bad gateway</html>", 502, "text/html"),
        Response(b"<html>Log in</html>", 200, "text/html"),
        Response(b"", 200),
        Response(completion("half").body[:60]),
    ],
)
def test_what_may_pass_is_tried_again(server: ChatServer, broken: Response) -> None:
    asked: list[int] = []

    def once(request: dict[str, Any]) -> Response:
        asked.append(1)
        return broken if len(asked) == 1 else completion("at last")

    server.respond = once
    assert ask(server, 1, CallOptions(retries=1, timeout_s=5)) == ["at last"]
    assert len(asked) == 2


def test_what_will_not_pass_is_not_tried_again(server: ChatServer) -> None:
    server.respond = lambda request: Response(b"bad image", 400)
    (reply,) = ask(server, 1, CallOptions(retries=5, timeout_s=5))
    assert "HTTP 400: bad image" in str(reply) and len(server.requests) == 1


@pytest.mark.parametrize(
    "barred",
    [
        Response(b'{"error": "wrong key"}', 401),
        Response(b"no such model", 404),
        Response(b'{"error": {"code": "insufficient_quota"}}', 429),
    ],
)
def test_who_is_not_let_in_stops_at_once(server: ChatServer, barred: Response) -> None:
    server.respond = lambda request: barred
    with pytest.raises(CallsStopped, match=f"test at http.*: answered HTTP {barred.status}"):
        ask(server, 500, CallOptions(retries=5, timeout_s=5, in_flight=4))
    assert len(server.requests) <= 8


def test_a_server_that_dies_stops_the_job_and_keeps_what_it_said(server: ChatServer) -> None:
    arrived: dict[int, Any] = {}
    server.respond = lambda request: (
        completion("fine") if len(server.requests) <= 10 else Response(b"dead", 500)
    )
    breaker = BreakerOptions(failures=3, pause_s=0.1, down_s=0.5)
    options = CallOptions(retries=100, timeout_s=5, in_flight=2, breaker=breaker)
    designer = create(f"openai:test@{server.url}", calls=options)
    with pytest.raises(CallsStopped, match="has been down for .*HTTP 500: dead.*again"):
        designer.design(
            [DesignRequest(f"do {n}", encoded()) for n in range(300)],
            on_answer=arrived.__setitem__,
        )
    assert len(arrived) == 10 and set(arrived.values()) == {"fine"}
    assert len(server.requests) < 30  # the others were never asked


def test_a_server_that_comes_back_is_asked_on(server: ChatServer) -> None:
    server.respond = lambda request: (
        Response(b"restarting", 503) if len(server.requests) <= 12 else completion("fine")
    )
    breaker = BreakerOptions(failures=1, pause_s=0.05, down_s=60)
    options = CallOptions(retries=0, timeout_s=5, in_flight=8, breaker=breaker)
    assert ask(server, 40, options) == ["fine"] * 40  # while it is down no attempts are used up


def test_answers_know_what_they_cost(server: ChatServer) -> None:
    body = json.loads(completion("a plan").body)
    body["usage"] = {"prompt_tokens": 1000, "completion_tokens": 200}
    server.respond = lambda request: Response(json.dumps(body).encode())
    options = CallOptions(retries=0, timeout_s=5, input_price=2.0, output_price=10.0)
    (reply,) = ask(server, 1, options)
    assert reply == "a plan"
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (1000, 200)
    assert reply.usage.usd == pytest.approx(0.004) and 0 < reply.usage.seconds < 5
    del body["usage"]
    (guessed,) = ask(server, 1, options)
    assert guessed.usage.output_tokens == 2 and guessed.usage.input_tokens > 10


def test_useless_answers_cost_too_and_are_reported(server: ChatServer) -> None:
    server.respond = lambda request: completion("1. Edit Instr", "length")
    designer = create(f"openai:test@{server.url}", calls=QUICK)
    arrived: list[Any] = []
    (reply,) = designer.design(
        [DesignRequest("x", encoded())], on_answer=lambda place, answer: arrived.append(answer)
    )
    assert isinstance(reply, Unusable) and arrived == [reply]
    assert reply.usage.output_tokens == 1 and reply.final
    copy = pickle.loads(pickle.dumps(reply))
    assert (str(copy), copy.usage, copy.final) == (str(reply), reply.usage, True)


def test_calls_stop_at_the_budget_and_what_was_answered_is_reported(server: ChatServer) -> None:
    server.respond = lambda request: completion("a plan", tokens=(100_000, 100))
    options = CallOptions(retries=0, timeout_s=5, in_flight=4, input_price=1.0, budget=1.0)
    arrived: dict[int, Any] = {}
    designer = create(f"openai:test@{server.url}", calls=options)
    with pytest.raises(CallsStopped, match=r"budget of \$1.00 is spent"):
        designer.design(
            [DesignRequest(f"do {n}", encoded()) for n in range(50)],
            on_answer=arrived.__setitem__,
        )
    assert len(arrived) == len(server.requests)
    assert 9 <= len(server.requests) <= 13  # the first four could not yet know what a call costs


def test_a_schema_that_a_server_refuses_is_left_out_from_then_on(server: ChatServer) -> None:
    def no_schema(request: dict[str, Any]) -> Response:
        if "response_format" in request:
            return Response(b"response_format is not supported", 400)
        return completion("a plan")

    server.respond = no_schema
    designer = create(f"openai:test@{server.url}", calls=QUICK)
    question = Question("x", (encoded(),), {"type": "object"})
    assert designer.ask([question]) == ["a plan"]
    assert ["response_format" in request for request in server.requests] == [True, False]
    server.requests.clear()
    assert designer.ask([question] * 3) == ["a plan"] * 3
    assert not any("response_format" in request for request in server.requests)


def test_a_bad_request_does_not_cost_the_schema(server: ChatServer) -> None:
    server.respond = lambda request: (
        Response(b"bad image", 400) if text_of(request) == "bad" else completion("a plan")
    )
    designer = create(f"openai:test@{server.url}", calls=QUICK)
    schema = {"type": "object"}
    (bad,) = designer.ask([Question("bad", (encoded(),), schema)])
    assert "bad image" in str(bad) and len(server.requests) == 2
    assert designer.ask([Question("good", (encoded(),), schema)]) == ["a plan"]
    assert "response_format" in server.requests[-1]


def test_a_server_of_the_newer_parameter_names_is_understood(server: ChatServer) -> None:
    def newer(request: dict[str, Any]) -> Response:
        if "max_tokens" in request:
            return Response(b"Unsupported parameter: use 'max_completion_tokens' instead", 400)
        if "temperature" in request:
            return Response(b"Unsupported value: 'temperature'", 400)
        return completion("a plan")

    server.respond = newer
    assert ask(server, 2, CallOptions(in_flight=1)) == ["a plan"] * 2
    assert len(server.requests) == 4 and server.requests[-1]["max_completion_tokens"] == 2048


def test_a_rate_is_kept(server: ChatServer) -> None:
    times: list[float] = []
    server.respond = lambda request: times.append(time.monotonic()) or completion("ok")
    options = CallOptions(retries=0, timeout_s=5, requests_per_minute=1200)
    assert ask(server, 21, options) == ["ok"] * 21
    assert max(times) - min(times) >= 0.9


def test_a_slow_answer_is_asked_for_twice_if_told_so(server: ChatServer) -> None:
    release = threading.Event()
    slow: list[int] = []

    def respond(request: dict[str, Any]) -> Response:
        if "do 35." in text_of(request) or '"do 35"' in text_of(request):
            slow.append(1)
            if len(slow) == 1:
                release.wait(10)
        return completion("ok")

    server.respond = respond
    options = CallOptions(retries=0, timeout_s=20, in_flight=4, hedge_after=0.9)
    designer = create(f"openai:test@{server.url}", calls=options)
    questions = [Question(f'"do {n}"', (encoded(),)) for n in range(36)]
    replies = designer.ask(questions)
    release.set()
    assert replies == ["ok"] * 36 and len(slow) == 2
    assert replies[35].usage.input_tokens == 2  # both are reckoned to be billed


def test_of_two_streams_one_is_told(server: ChatServer) -> None:
    release, told = threading.Event(), []
    slow: list[int] = []

    def words() -> Iterator[str]:
        yield "this one"
        release.wait(10)

    def respond(request: dict[str, Any]) -> Response:
        if "do 35" not in text_of(request):
            return completion("ok")
        slow.append(1)
        return streamed(words()) if len(slow) == 1 else streamed(["the other"])

    server.respond = respond
    options = CallOptions(retries=0, timeout_s=20, in_flight=4, hedge_after=0.9)
    designer = create(f"openai:test@{server.url}", calls=options)
    for number in range(36):
        requests = [DesignRequest(f"do {number}", encoded())]
        (reply,) = designer.design(requests, on_text=lambda _, text: told.append(text))
    release.set()
    assert reply == "the other" and told == ["this one"] and len(slow) == 2


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
    turned = data_url(encoded("JPEG", (32, 16), exif=exif)).decode()
    assert turned.startswith("data:image/png")
    with Image.open(io.BytesIO(base64.b64decode(turned.partition(",")[2]))) as image:
        assert image.size == (16, 32)
    assert data_url(encoded("BMP")).startswith(b"data:image/png")
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
