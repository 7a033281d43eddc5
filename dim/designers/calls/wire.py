"""A question as the JSON of a chat completions request, and what comes back as an answer."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dim.designers.base import CallOptions, Question
from dim.errors import InputError
from dim.images import Header, decode_image, encode_jpeg, encode_png, read_header
from dim.reading import REASONING_FIELDS, as_reasoning, says_something

SCHEMA, MAX_TOKENS, TEMPERATURE = "response_format", "max_tokens", "temperature"
STREAM, STREAM_USAGE = "stream", "stream_options"
"""What some servers refuse to be sent."""

EMPTY = "answered nothing"
_CUT_OFF = "the answer was cut off (calls.max_tokens is too small)"
_CUT_OFF_THINKING = (
    "the answer was cut off within the model's reasoning (calls.max_tokens is too small)"
)
_WITHHELD = "the answer was withheld by the server's content filter"

# Why an answer ended, as servers and the gateways in front of them call it.
_BY_LENGTH = ("length", "max_tokens", "model_length")
_BY_FILTER = ("content_filter", "safety", "recitation")
_BY_ACCIDENT = ("abort", "error", "cancelled")
_REASONING = (*REASONING_FIELDS, "reasoning_details")
_THOUGHTS = ("thinking", "reasoning", "thought")

_REQUEST = b'{"messages": [{"role": "user", "content": [%b]}], %b'
_IMAGE = b'{"type": "image_url", "image_url": {"url": "%b"}}'

# Of what any program reads, and so any server; see dim.images.Header.
_MEDIA_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_FAST = 1  # zlib's level; an upload of a few percent more is cheaper than the time
_SHOWN = 200  # characters of a server's message that go into an error
_CHARACTERS_PER_TOKEN = 4
_PIXELS_PER_TOKEN = 28 * 28  # of Qwen2.5-VL; others are near enough until the first answer


class NotACompletion(Exception):
    """The server sent something else; the text says what."""


class ServerSays(Exception):
    """An error in the body of an answer whose status is 200, as gateways send it."""

    def __init__(self, status: int | None, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Completion:
    """What a server answered: the text, or what is wrong with it, and the tokens it counted.

    A text that stood where reasoning belongs, and nothing elsewhere, has the mark of
    :func:`dim.reading.as_reasoning`. The counts are ``None`` where the server does not say.
    """

    text: str
    fault: str | None
    input_tokens: int | None
    output_tokens: int | None


def request_body(
    model: str,
    question: Question,
    options: CallOptions,
    without: Collection[str] = (),
    *,
    stream: bool = False,
) -> bytes:
    """The JSON of a request.

    Args:
        model: the name the server knows the model by.
        question: what to ask.
        options: its sampling.
        without: what this server is known to refuse.
        stream: ask for the answer while it is written.

    Raises:
        InputError: an image cannot be read.
    """
    request: dict[str, Any] = {"model": model}
    newer = MAX_TOKENS in without
    request["max_completion_tokens" if newer else MAX_TOKENS] = options.max_tokens
    if TEMPERATURE not in without:
        request[TEMPERATURE] = options.temperature
    if question.schema is not None and SCHEMA not in without:
        form = {"name": "answer", "schema": question.schema, "strict": True}
        request[SCHEMA] = {"type": "json_schema", "json_schema": form}
    if stream and STREAM not in without:
        request[STREAM] = True
        if STREAM_USAGE not in without:
            request[STREAM_USAGE] = {"include_usage": True}
    # Put together by hand: looking for characters to escape in megabytes of base64 takes as long
    # as all the rest of a request.
    parts = [_IMAGE % data_url(image, options.max_pixels) for image in question.images]
    parts.append(json.dumps({"type": "text", "text": question.text}).encode())
    return _REQUEST % (b", ".join(parts), json.dumps(request).encode()[1:])


def expected_input_tokens(question: Question, max_pixels: int | None = None) -> float:
    """About how many tokens a request has, before a server has counted any.

    Args:
        max_pixels: what its images are brought down to, as ``CallOptions`` has it.
    """
    images = sum(_pixels(image, max_pixels) for image in question.images) / _PIXELS_PER_TOKEN
    return images + len(question.text) / _CHARACTERS_PER_TOKEN


def expected_output_tokens(text: str) -> int:
    """About how many tokens an answer has that no server has counted."""
    return -(-len(text) // _CHARACTERS_PER_TOKEN)


def data_url(image: bytes, max_pixels: int | None = None) -> bytes:
    """An encoded image as a ``data:`` URL in which every server sees what the painter sees.

    A file whose pixels any reader shows as they are to be seen is sent as it is. Every other
    picture is decoded here and sent anew: as PNG, with the very same pixels, or, if it has to be
    made smaller, as JPEG.

    Args:
        image: the encoded image.
        max_pixels: width x height at most; ``None``: whatever it has.

    Raises:
        InputError: the bytes are no image.
    """
    header = read_header(image)
    size = _sent_size(header, max_pixels)
    if size is None and header.common is not None:
        return _data_url(_MEDIA_TYPES[header.format], header.common)
    picture = decode_image(image)
    if size is None:
        return _data_url("image/png", encode_png(picture, compress_level=_FAST))
    return _data_url("image/jpeg", encode_jpeg(picture.resize(size, Image.Resampling.LANCZOS)))


def sent_as(image: bytes, max_pixels: int | None) -> str:
    """What :func:`data_url` makes of an image, in words for the key of an answer.

    Empty for a file that is sent as it is, and for what is no image.
    """
    try:
        header = read_header(image)
    except InputError:
        return ""
    size = _sent_size(header, max_pixels)
    if size is not None:
        return f"jpeg {size[0]}x{size[1]}"
    return "png" if header.common is None else ""


def read_completion(body: bytes) -> Completion:
    """What a server's answer says.

    Raises:
        NotACompletion: it is no completion, or half of one.
        ServerSays: it is an error in the place of one.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        if body.lstrip()[:1] in (b"{", b"["):
            raise NotACompletion(f"the answer cannot be read ({shorten(body)})") from None
        answer = body.decode("utf-8", "replace")
    if not isinstance(answer, dict):
        said = shorten(answer) or "nothing"
        raise NotACompletion(f"did not answer with a chat completion but with {said}")
    return completion_of(answer)


def completion_of(answer: dict[str, Any]) -> Completion:
    """What the object of a completion says; errors as of ``read_completion``."""
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        if answer.get("error"):
            raise _error_in(answer["error"])
        raise NotACompletion("answered without a choice")
    text, fault = _read_choice(choices[0])
    usage = answer.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    return Completion(text, fault, *counts)


def says_now(message: dict[str, Any]) -> str:
    """The text of a message that is still being written."""
    return _text(message.get("content"))


def shorten(value: object) -> str:
    """The beginning of what somebody said, on one line."""
    said = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    text = " ".join(said.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _read_choice(choice: dict[str, Any]) -> tuple[str, str | None]:
    message = choice.get("message")
    message = message if isinstance(message, dict) else {"content": choice.get("text")}
    text, finished = _said(message), str(choice.get("finish_reason")).lower()
    if finished in _BY_ACCIDENT:
        raise NotACompletion(f"broke the answer off ({finished})")
    if finished in _BY_FILTER:
        return text, _WITHHELD
    if text:
        return text, _CUT_OFF if finished in _BY_LENGTH else None
    refusal = _refusal(message)
    if refusal:
        return text, f"refused: {shorten(refusal)}"
    thoughts = _reasoning(message)
    if finished in _BY_LENGTH:
        # A model that thinks may use up all its tokens before it says anything.
        return text, _CUT_OFF_THINKING if thoughts else _CUT_OFF
    # A server with a reasoning parser takes an answer for reasoning where it finds no end of that.
    return (as_reasoning(thoughts), None) if thoughts else (text, EMPTY)


def _said(message: dict[str, Any]) -> str:
    """What a message says, or calls a function with; empty if nothing but marks is left."""
    text = _text(message.get("content"))
    if says_something(text):
        return text
    calls = message.get("tool_calls")
    calls = [call.get("function") for call in _objects(calls)] + [message.get("function_call")]
    return "\n".join(filter(None, (_text(call.get("arguments")) for call in _objects(calls))))


def _reasoning(message: dict[str, Any]) -> str:
    """What a server puts where a model's reasoning belongs."""
    thoughts = [part for part in _objects(message.get("content")) if _is_thought(part)]
    found = [_text(message.get(name), thoughts=True) for name in _REASONING]
    found.append(_text(thoughts, thoughts=True))
    return next((text for text in found if says_something(text)), "")


def _refusal(message: dict[str, Any]) -> object:
    parts = [part.get("refusal") for part in _objects(message.get("content"))]
    return message.get("refusal") or next(filter(None, parts), None)


def _text(content: object, *, thoughts: bool = False) -> str:
    """The text of a message, which some servers send in parts or as the object that was asked for.

    Args:
        content: what stands there.
        thoughts: take parts that are reasoning too.
    """
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return json.dumps(content)
    if not isinstance(content, list):
        return ""
    texts: list[object] = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and (thoughts or not _is_thought(part)):
            texts += [part.get("text") or part.get("summary"), _text(part.get("thinking"))]
    return "".join(text for text in texts if isinstance(text, str))


def _is_thought(part: dict[str, Any]) -> bool:
    return part.get("thought") is True or str(part.get("type")).startswith(_THOUGHTS)


def _objects(values: object) -> list[dict[str, Any]]:
    return (
        [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
    )


def _error_in(error: object) -> ServerSays:
    code = error.get("code") if isinstance(error, dict) else None
    message = error.get("message", error) if isinstance(error, dict) else error
    return ServerSays(code if isinstance(code, int) else None, shorten(message))


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _data_url(media_type: str, data: bytes) -> bytes:
    return b"data:%b;base64,%b" % (media_type.encode(), base64.b64encode(data))


def _sent_size(header: Header, max_pixels: int | None) -> tuple[int, int] | None:
    """Width and height that an image is brought down to; ``None``: it keeps its own."""
    pixels = header.width * header.height
    if max_pixels is None or pixels <= max_pixels:
        return None
    scale = math.sqrt(max_pixels / pixels)
    width = max(1, math.floor(header.width * scale))
    return width, max(1, min(math.floor(header.height * scale), max_pixels // width))


def _pixels(image: bytes, max_pixels: int | None) -> int:
    try:
        header = read_header(image)
    except InputError:  # it will not be sent
        return 0
    pixels = header.width * header.height
    return pixels if max_pixels is None else min(pixels, max_pixels)
