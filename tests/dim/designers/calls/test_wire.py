"""What is sent to a server, and what is made of everything a server may answer."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from dim.designers import CallOptions, Question
from dim.designers.calls.transport import Barred, Broken, Busy, Refused, failure_of
from dim.designers.calls.wire import (
    MAX_TOKENS,
    SCHEMA,
    TEMPERATURE,
    NotACompletion,
    ServerSays,
    expected_input_tokens,
    read_completion,
    request_body,
)
from dim.reading import as_reasoning
from tests.pipelines.samples import encoded, photo

ASKED = Question("What?", (encoded(photo(1, (280, 280))),), {"type": "object"})
OPTIONS = CallOptions(max_tokens=77, temperature=0.5)


def sent(without: frozenset[str] = frozenset(), question: Question = ASKED) -> dict[str, Any]:
    return json.loads(request_body("m", question, OPTIONS, without))


def test_a_request_has_the_schema_and_the_sampling() -> None:
    request = sent()
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("m", 77, 0.5)
    form = request["response_format"]
    assert form["type"] == "json_schema" and form["json_schema"]["schema"] == {"type": "object"}
    image, text = request["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": "What?"}
    assert "response_format" not in sent(question=Question("x", ()))


def test_what_a_server_refuses_is_left_out() -> None:
    request = sent(frozenset({SCHEMA, MAX_TOKENS, TEMPERATURE}))
    assert set(request) == {"model", "messages", "max_completion_tokens"}
    assert request["max_completion_tokens"] == 77


def test_tokens_are_guessed_before_any_are_counted() -> None:
    assert expected_input_tokens(ASKED) == pytest.approx(100 + 5 / 4)
    assert expected_input_tokens(Question("abcd" * 10, (b"no image",))) == 10


def body(**choice: Any) -> bytes:
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.parametrize(
    ("answer", "text", "fault"),
    [
        (body(message={"content": "hi"}), "hi", None),
        (body(message={"content": [{"type": "text", "text": "a"}, {"text": "b"}]}), "ab", None),
        (body(message={"content": [{"type": "image"}, 3]}), "", "answered nothing"),
        (body(message={"content": 7}), "", "answered nothing"),
        (body(message=None), "", "answered nothing"),
        (body(), "", "answered nothing"),
        (body(message={"content": None}, finish_reason="length"), "", "cut off"),
        (body(message={"content": "ha"}, finish_reason="length"), "ha", "cut off"),
        (body(message={"content": "x"}, finish_reason="content_filter"), "x", "content filter"),
        (body(message={"content": "", "refusal": "no"}), "", "refused: no"),
    ],
)
def test_completions_are_read_in_every_shape(answer: bytes, text: str, fault: str | None) -> None:
    completion = read_completion(answer)
    assert completion.text == text
    assert completion.fault is None if fault is None else fault in str(completion.fault)


CALL = {"name": "plan", "arguments": '{"a": 1}'}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": {"a": 1}}, '{"a": 1}'),
        ({"content": ["a", {"type": "output_text", "text": "b"}]}, "ab"),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}, "a"),
        ({"content": [{"type": "reasoning", "text": "hm"}, {"text": "a"}]}, "a"),
        ({"content": [{"text": "hm", "thought": True}, {"text": "a"}]}, "a"),
        ({"content": "a", "reasoning_content": "hm", "tool_calls": [{"function": CALL}]}, "a"),
        ({"content": None, "tool_calls": [{"type": "function", "function": CALL}]}, '{"a": 1}'),
        ({"content": "", "tool_calls": [{"function": {"arguments": {"a": 1}}}]}, '{"a": 1}'),
        ({"content": "", "function_call": CALL}, '{"a": 1}'),
        ({"content": None, "reasoning_content": "a"}, as_reasoning("a")),
        ({"content": "", "reasoning": "a", "reasoning_content": None}, as_reasoning("a")),
        ({"content": " \n", "reasoning": [{"type": "text", "text": "a"}]}, as_reasoning("a")),
        ({"content": "<think></think>\n", "reasoning_content": "a"}, as_reasoning("a")),
        ({"reasoning_details": [{"type": "reasoning.text", "text": "a"}]}, as_reasoning("a")),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}]},
            as_reasoning("a"),
        ),
    ],
)
def test_an_answer_is_read_where_the_server_put_it(message: dict[str, Any], text: str) -> None:
    completion = read_completion(body(message=message, finish_reason="stop"))
    assert (completion.text, completion.fault) == (text, None)


def test_an_older_completion_has_its_text_beside_no_message() -> None:
    assert read_completion(body(text="hi", finish_reason="stop")).text == "hi"


@pytest.mark.parametrize(
    ("message", "finished", "fault"),
    [
        ({"content": None, "reasoning_content": "a"}, "length", "cut off within the .* reasoning"),
        ({"content": None, "tool_calls": [{"function": CALL}]}, "length", "cut off"),
        ({"content": "a"}, "MAX_TOKENS", "cut off"),
        ({"content": None, "reasoning_content": "a"}, "content_filter", "content filter"),
        ({"content": None}, "content_filter", "content filter"),
        ({"content": "a"}, "SAFETY", "content filter"),
        ({"content": None, "refusal": "no", "reasoning": "a"}, "stop", "refused: no"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "stop", "refused: no"),
        ({"content": "<think></think>", "reasoning": " "}, "stop", "answered nothing"),
    ],
)
def test_an_answer_that_is_none_says_why(
    message: dict[str, Any], finished: str, fault: str
) -> None:
    completion = read_completion(body(message=message, finish_reason=finished))
    assert re.search(fault, str(completion.fault))


@pytest.mark.parametrize("finished", ["abort", "error"])
def test_an_answer_that_the_server_broke_off_is_no_completion(finished: str) -> None:
    with pytest.raises(NotACompletion, match=finished):
        read_completion(body(message={"content": "1. Edit"}, finish_reason=finished))


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 7}, (5, 7)),
        ({"prompt_tokens": "5", "completion_tokens": -7}, (None, None)),
        (None, (None, None)),
        ([], (None, None)),
    ],
)
def test_tokens_are_read_where_they_are_counted(usage: Any, counts: tuple[Any, Any]) -> None:
    answer = json.dumps({"choices": [{"message": {"content": "x"}}], "usage": usage}).encode()
    completion = read_completion(answer)
    assert (completion.input_tokens, completion.output_tokens) == counts


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"", "did not answer with a chat completion but with nothing"),
        (b"<html>Log in</html>", "but with <html>Log in</html>"),
        (b'{"choices": [{"mess', "cannot be read"),
        (b"\xff\xfe", "did not answer with a chat completion"),
        (b"null", "did not answer with a chat completion"),
        (b'{"choices": 3}', "without a choice"),
        (b'{"choices": [null]}', "without a choice"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_what_is_no_completion_is_said(answer: bytes, complaint: str) -> None:
    with pytest.raises(NotACompletion, match=complaint) as caught:
        read_completion(answer)
    assert len(str(caught.value)) < 300


def test_an_error_in_the_place_of_a_completion_is_one() -> None:
    with pytest.raises(ServerSays, match="rate limited") as caught:
        read_completion(b'{"error": {"message": "rate limited", "code": 429}}')
    assert caught.value.status == 429
    with pytest.raises(ServerSays, match="oops") as caught:
        read_completion(b'{"error": "oops", "choices": []}')
    assert caught.value.status is None


@pytest.mark.parametrize(
    ("status", "said", "headers", "kind"),
    [
        (429, b"slow", {"Retry-After": "3"}, Busy),
        (429, b'{"error": {"code": "insufficient_quota"}}', {}, Barred),
        (402, b"pay", {}, Barred),
        (503, b"", {}, Broken),
        (503, b"", {"Retry-After": "3"}, Busy),
        (500, b"", {}, Broken),
        (408, b"", {}, Broken),
        (302, b"", {}, Broken),
        (401, b"key?", {}, Barred),
        (404, b"model?", {}, Barred),
        (400, b"bad", {}, Refused),
        (403, b"flagged", {}, Refused),
        (413, b"large", {}, Refused),
    ],
)
def test_a_status_says_what_kind_of_failure_it_is(
    status: int, said: bytes, headers: dict[str, str], kind: type[Exception]
) -> None:
    failure = failure_of(status, said, headers)
    assert type(failure) is kind and f"HTTP {status}" in str(failure)
    if isinstance(failure, Busy):
        assert failure.retry_after_s == 3.0
    if isinstance(failure, Barred):
        assert failure.for_good == (status in (402, 429))
