"""Questions with images to a chat endpoint that speaks OpenAI's API, many at a time."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import threading
import weakref
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    DefaultAioHttpClient,
)
from openai.types.chat import ChatCompletion
from PIL import Image

from dim.designers.base import CallOptions, OnAnswer, Reply
from dim.errors import DesignerError, InputError
from dim.images import decode_image, encode_png
from dim.records import clean_text

ResultT = TypeVar("ResultT")

# What vision servers read as it is; anything else is sent as PNG.
_SENDABLE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_ORIENTATION = 0x0112  # EXIF tag
_SHOWN = 200  # characters of a server's message that go into an error


@dataclass(frozen=True)
class Question:
    """A text with the images it speaks of, encoded.

    ``schema`` is the JSON schema that the answer should keep to, where the server can see to it.
    """

    text: str
    images: tuple[bytes, ...]
    schema: dict[str, Any] | None = None


class ChatEndpoint:
    """A model behind a URL. Holds one connection pool and one event loop in its own thread.

    Args:
        model: the name the server knows the model by.
        url: base address such as ``http://host:8000/v1``; ``None`` = ``OPENAI_BASE_URL`` or
            OpenAI's own, which need ``OPENAI_API_KEY``.
        options: how calls are made.

    Raises:
        DesignerError: there is no URL and no key.
    """

    def __init__(self, model: str, url: str | None, options: CallOptions) -> None:
        key = os.environ.get("OPENAI_API_KEY")
        url = url or os.environ.get("OPENAI_BASE_URL")
        if url is None and not key:
            raise DesignerError(
                f"openai:{model} calls OpenAI and needs OPENAI_API_KEY; "
                f"for your own server write openai:{model}@http://host:port/v1"
            )
        self._model = model
        self._where = url or "OpenAI"
        self._url = url
        self._key = key or "none"  # the client insists on a key; local servers ignore it
        self._options = options
        self._loop = _LoopThread(threads=options.in_flight)
        self._client: AsyncOpenAI | None = None

    def ask(self, questions: Sequence[Question], on_answer: OnAnswer | None = None) -> list[Reply]:
        """One answer or error per question. At most ``in_flight`` are open at once."""
        return self._loop.run(self._ask_all(questions, on_answer))

    async def _ask_all(
        self, questions: Sequence[Question], on_answer: OnAnswer | None
    ) -> list[Reply]:
        gate = asyncio.Semaphore(self._options.in_flight)
        client = self._connect()

        async def ask_one(place: int, question: Question) -> Reply:
            async with gate:
                reply = await self._ask_one(client, question)
            if on_answer is not None and isinstance(reply, str):
                # In a thread: storing an answer must not hold up the other requests.
                await asyncio.to_thread(on_answer, place, reply)
            return reply

        asked = (ask_one(place, question) for place, question in enumerate(questions))
        return list(await asyncio.gather(*asked))

    def _connect(self) -> AsyncOpenAI:
        """The client, made within the loop that its connections belong to."""
        if self._client is None:
            self._client = AsyncOpenAI(
                base_url=self._url,
                api_key=self._key,
                timeout=self._options.timeout_s,
                max_retries=self._options.retries,
                http_client=DefaultAioHttpClient(),
            )
            weakref.finalize(self, _close, self._loop, self._client)
        return self._client

    async def _ask_one(self, client: AsyncOpenAI, question: Question) -> Reply:
        try:
            # In a thread: encoding megabytes must not hold up the other requests.
            content = await asyncio.to_thread(_content, question)
            completion = await client.chat.completions.create(
                model=self._model,
                messages=[{"role": "user", "content": content}],
                temperature=self._options.temperature,
                max_tokens=self._options.max_tokens,
            )
            return clean_text(_answer(completion))
        except InputError as error:
            return DesignerError(f"image not sent: {error}")
        except Exception as error:  # a server can answer anything, and each answer is one row's
            return DesignerError(f"{self._model} at {self._where}: {_explain(error)}")


def _close(loop: _LoopThread, client: AsyncOpenAI) -> None:
    """Hang up, when the endpoint goes or the process ends."""
    with contextlib.suppress(Exception):  # too late for it to matter to anyone
        loop.run(client.close(), timeout_s=2.0)
    loop.stop()


def _content(question: Question) -> Any:
    images = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in question.images
    ]
    return [*images, {"type": "text", "text": question.text}]


def data_url(image: bytes) -> str:
    """An encoded image as a ``data:`` URL, re-encoded only where a server would misread it.

    Raises:
        InputError: the bytes are no image.
    """
    media_type = _sendable_type(image)
    if media_type is None:
        image, media_type = encode_png(decode_image(image)), "image/png"
    return f"data:{media_type};base64,{base64.b64encode(image).decode()}"


def _sendable_type(image: bytes) -> str | None:
    try:
        with Image.open(io.BytesIO(image)) as opened:
            # Pillow decodes a whole PNG to look for EXIF behind its pixels; few have any.
            exif = {} if opened.format == "PNG" else opened.getexif()
            upright = exif.get(_ORIENTATION, 1) == 1
            return _SENDABLE.get(opened.format or "") if upright else None
    except Exception:  # whatever is wrong with it, decode_image says it in a sentence
        return None


def _answer(completion: object) -> str:
    """The text of a completion, if that is what the server sent.

    Raises:
        DesignerError: it sent something else, or an answer that stops half way.
    """
    if not isinstance(completion, ChatCompletion):
        raise DesignerError(f"did not answer with a chat completion but with {_short(completion)}")
    if not completion.choices:
        raise DesignerError("answered without a choice")
    choice = completion.choices[0]
    message = choice.message
    if message is None or not message.content or not message.content.strip():
        refusal = getattr(message, "refusal", None)
        raise DesignerError(f"refused: {_short(refusal)}" if refusal else "answered nothing")
    if choice.finish_reason == "length":
        raise DesignerError("the answer was cut off (calls.max_tokens is too small)")
    if choice.finish_reason == "content_filter":
        raise DesignerError("the answer was withheld by the server's content filter")
    return message.content


def _explain(error: Exception) -> str:
    cause = error.__cause__ or error
    # The client's transport reports a refused connection as a timeout while connecting.
    if isinstance(error, APITimeoutError) and "Connect" not in type(cause).__name__:
        return "no answer in time"
    if isinstance(error, APIConnectionError):
        return f"cannot be reached ({_short(cause)})"
    if isinstance(error, APIStatusError):
        return f"answered HTTP {error.status_code}: {_short(error.response.text or error.message)}"
    if isinstance(error, DesignerError):
        return str(error)
    return f"the answer cannot be read ({type(error).__name__}: {_short(error)})"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class _LoopThread:
    """An event loop in a daemon thread, so that synchronous callers share one connection pool."""

    def __init__(self, threads: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._loop.set_default_executor(ThreadPoolExecutor(threads))
        threading.Thread(target=self._loop.run_forever, name="chat-endpoint", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, ResultT], timeout_s: float | None = None) -> ResultT:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout_s)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
