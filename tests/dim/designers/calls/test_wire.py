"""What is sent to a server, and what is made of everything a server may answer."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dim.colour import SRGB_PRIMARIES
from dim.designers import CallOptions, Question
from dim.designers.calls.transport import Barred, Broken, Busy, Refused, failure_of
from dim.designers.calls.wire import (
    MAX_TOKENS,
    SCHEMA,
    TEMPERATURE,
    NotACompletion,
    ServerSays,
    data_url,
    expected_input_tokens,
    read_completion,
    request_body,
    sent_as,
)
from dim.images import decode_image, read_header
from dim.reading import as_reasoning
from tests.image_files import (
    DISPLAY_P3,
    chunk,
    exif,
    opened,
    packed_text,
    printer,
    raw_png,
    screen,
    with_chunks,
)
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

    large = Question("", (encoded(photo(1, (560, 560))),))
    assert expected_input_tokens(large) == 400
    assert expected_input_tokens(large, 200 * 784) == 200


def sent_image(image: bytes, max_pixels: int | None = None) -> tuple[str, bytes]:
    """The type that is declared, and what is sent under it."""
    head, _, content = data_url(image, max_pixels).partition(b";base64,")
    return head.decode().removeprefix("data:"), base64.b64decode(content)


SEEN = photo(2)
DEEP = np.asarray(SEEN).astype(">u2") << 8 | 0x80
CLEAR = SEEN.convert("RGBA")
CLEAR.putalpha(Image.linear_gradient("L").resize(SEEN.size))
PLAIN = {
    "PNG": encoded(SEEN),
    "grey PNG": encoded(SEEN.convert("L")),
    "palette": encoded(SEEN.quantize(32)),
    "JPEG": encoded(SEEN, "JPEG"),
    "JPEG with EXIF": encoded(SEEN, "JPEG", exif=exif(1)),
    "WebP": encoded(SEEN, "WEBP"),
    "sRGB by a profile": encoded(SEEN, "JPEG", icc_profile=screen(SRGB_PRIMARIES)),
    "several pictures": encoded(SEEN, "MPO", save_all=True, append_images=[photo(3)]),
}
OTHERWISE = {
    "turned JPEG": encoded(SEEN, "JPEG", exif=exif(6)),
    "turned PNG": encoded(SEEN, exif=exif(8)),
    "turned behind its pixels": with_chunks(
        encoded(SEEN), chunk(b"eXIf", exif(3).tobytes()[6:]), behind=True
    ),
    "turned WebP": encoded(SEEN, "WEBP", exif=exif(5)),
    "16-bit grey": encoded(Image.fromarray(np.asarray(SEEN.convert("L")).astype(np.uint16) << 8)),
    "16-bit colour": raw_png(64, 16, 2, [row.tobytes() for row in DEEP]),
    "clear in part": encoded(CLEAR),
    "clear WebP": encoded(CLEAR, "WEBP", lossless=True),
    "clear palette": encoded(SEEN.quantize(32), transparency=1),
    "P3": encoded(SEEN, "JPEG", icc_profile=screen(DISPLAY_P3)),
    "inks": encoded(SEEN.convert("CMYK"), "JPEG"),
    "inks with a profile": encoded(SEEN.convert("CMYK"), "TIFF", icc_profile=printer()),
    "GIF": encoded(SEEN, "GIF"),
    "BMP": encoded(SEEN, "BMP"),
    "TIFF": encoded(SEEN, "TIFF"),
}


@pytest.mark.parametrize("kind", [*PLAIN, *OTHERWISE])
def test_a_model_is_shown_the_pixels_that_the_painter_sees(kind: str) -> None:
    image = {**PLAIN, **OTHERWISE}[kind]
    media_type, content = sent_image(image)
    seen = opened(content)
    assert media_type == {"MPO": "image/jpeg"}.get(seen.format, seen.get_format_mimetype())
    # as servers do: no turning, no profiles, whatever lies under the transparent
    assert np.array_equal(np.asarray(seen.convert("RGB")), np.asarray(decode_image(image)))
    assert read_header(content).common is content
    assert sent_as(image, None) == ("" if kind in PLAIN else "png")


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_file_is_sent_as_it_is(kind: str) -> None:
    assert sent_image(PLAIN[kind], 64 * 48)[1] == PLAIN[kind]


def test_metadata_that_servers_stumble_over_are_not_sent() -> None:
    image = with_chunks(encoded(SEEN), packed_text(b"history " * 200_000))
    with pytest.raises(ValueError, match="too large"):
        opened(image)
    media_type, content = sent_image(image)
    assert (media_type, content) == ("image/png", encoded(SEEN))
    assert sent_as(image, None) == ""  # it shows the same


@pytest.mark.parametrize("kind", ["PNG", "turned JPEG", "clear in part"])
@pytest.mark.parametrize("size", [(800, 600), (601, 799), (3000, 100), (100, 5000)])
def test_large_images_are_made_smaller(kind: str, size: tuple[int, int]) -> None:
    large = photo(2, size)
    image = {
        "PNG": encoded(large),
        "turned JPEG": encoded(large, "JPEG", exif=exif(6)),
        "clear in part": encoded(large.convert("RGBA")),
    }[kind]
    most = 100_000
    media_type, content = sent_image(image, most)
    seen, whole = opened(content), decode_image(image)
    assert (media_type, seen.format, seen.mode) == ("image/jpeg", "JPEG", "RGB")
    assert most * 0.97 < seen.width * seen.height <= most
    assert seen.width / seen.height == pytest.approx(whole.width / whole.height, rel=0.02)
    small = whole.resize(seen.size, Image.Resampling.LANCZOS)
    assert np.abs(np.asarray(seen, int) - np.asarray(small, int)).mean() < 2
    assert sent_as(image, most) == f"jpeg {seen.width}x{seen.height}"


def test_a_strip_is_made_smaller_to_no_less_than_a_line() -> None:
    content = sent_image(encoded(photo(1, (4000, 8))), 500)[1]
    width, height = opened(content).size
    assert (height, width) == (1, 500)


def test_a_request_keeps_to_the_size_in_its_options() -> None:
    question = Question("", (encoded(photo(1, (300, 200))),))
    options = CallOptions(max_pixels=15_000)
    request = json.loads(request_body("m", question, options))
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    assert url == data_url(question.images[0], 15_000).decode()
    assert opened(base64.b64decode(url.partition(",")[2])).size == (150, 100)


def test_the_default_size_lets_usual_images_pass_and_two_fit_a_small_context() -> None:
    most = CallOptions().max_pixels
    assert most is not None
    assert most >= 1536 * 1024 and 2 * most / 28**2 + 2048 + 1024 < 8192


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
