"""One HTTP request to a chat completions server: the completion, or what kind of failure it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import aiohttp

from dim.designers.calls.breaker import Down
from dim.designers.calls.stream import EVENT_STREAM, StreamedCompletion
from dim.designers.calls.wire import (
    Completion,
    NotACompletion,
    ServerSays,
    read_completion,
    shorten,
)
from dim.retry_after import retry_after_s

_CONNECT_TIMEOUT_S = 10.0
_STREAMED = {"Accept": f"{EVENT_STREAM}, application/json"}
_OPENAI_URL = "https://api.openai.com/v1"
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")
_NO_MONEY = ("insufficient_quota", "billing_hard_limit", "insufficient balance")


class Failure(Exception):
    """No answer; the text says why."""


class Busy(Failure):
    """The server asks to come back later, after ``retry_after_s`` if it says when."""

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Broken(Failure, Down):
    """The server or the way to it failed; the same request may be answered next time."""


class Refused(Failure):
    """The server does not take this request; ``status`` is its HTTP status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Barred(Failure, Down):
    """The server answers nobody who comes like this: wrong key, unknown model, no money left.

    ``for_good`` where it cannot be a passing thing.
    """

    def __init__(self, message: str, *, for_good: bool) -> None:
        super().__init__(message)
        self.for_good = for_good


class Transport:
    """Connections to one server. Must be made, used and closed within one event loop.

    Args:
        url: base address such as ``http://host:8000/v1``; ``None``: OpenAI's. Its query goes with
            every request, and a user and password in it go instead of ``key``.
        key: sent as a bearer token.
        timeout_s: for one request, from sending to the last byte.
    """

    def __init__(self, url: str | None, key: str | None, timeout_s: float) -> None:
        base = urlsplit(url or _OPENAI_URL)
        self._url = base._replace(path=f"{base.path.rstrip('/')}/chat/completions").geturl()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_TIMEOUT_S),
            headers=_headers(None if "@" in base.netloc else key),
            # Looking for proxies costs every request a little, and few machines have one.
            trust_env=any(os.environ.get(n) or os.environ.get(n.upper()) for n in _PROXIES),
        )

    async def close(self) -> None:
        """Hang up."""
        await self._session.close()

    async def send(self, body: bytes, on_text: Callable[[str], None] | None = None) -> Completion:
        """What the server answers to a request.

        Args:
            body: the request.
            on_text: is told the answer's text so far, as often as more of it comes, if the server
                streams it.

        Raises:
            Failure: one of the kinds above.
        """
        accepted = None if on_text is None else _STREAMED
        headers: Mapping[str, str] = {}
        try:
            async with self._session.post(self._url, data=body, headers=accepted) as response:
                status, headers = response.status, response.headers
                if on_text and status == 200 and response.content_type == EVENT_STREAM:
                    return await _follow(response, on_text)
                said = await response.read()
        except NotACompletion as error:
            raise Broken(str(error)) from None
        except ServerSays as error:
            raise failure_of(error.status or 500, str(error).encode(), headers) from None
        except aiohttp.ConnectionTimeoutError as error:
            raise Broken(f"cannot be reached ({shorten(error)})") from None
        except TimeoutError:
            raise Broken("no answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Broken(f"cannot be reached ({shorten(error) or type(error).__name__})") from None
        except Exception as error:  # a server can send anything
            kind = type(error).__name__
            raise Broken(f"the answer cannot be read ({kind}: {shorten(error)})") from None
        if status != 200:
            raise failure_of(status, said, headers)
        try:
            return read_completion(said)
        except NotACompletion as error:
            raise Broken(str(error)) from None
        except ServerSays as error:
            raise failure_of(error.status or 500, str(error).encode(), headers) from None


async def _follow(response: aiohttp.ClientResponse, on_text: Callable[[str], None]) -> Completion:
    """A streamed answer, told while it comes."""
    streamed = StreamedCompletion()
    async for data in response.content.iter_any():
        before = streamed.text
        streamed.feed(data)
        if streamed.text != before:
            on_text(streamed.text)
    return streamed.end()


def failure_of(status: int, said: bytes, headers: Mapping[str, str]) -> Failure:
    """The kind of failure that an answer of a status other than 200 is."""
    message = f"answered HTTP {status}: {shorten(said) or 'nothing'}"
    wait_s = retry_after_s(headers)
    lower = said.lower()
    if status == 402 or (status == 429 and any(sign.encode() in lower for sign in _NO_MONEY)):
        return Barred(message, for_good=True)
    if status == 429 or (status == 503 and wait_s is not None):
        return Busy(message, wait_s)
    if status in (401, 404):
        return Barred(message, for_good=False)
    if status in (408, 409, 425) or status >= 500 or status < 400:
        return Broken(message)
    return Refused(message, status)


def _headers(key: str | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    payers = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
    found = {name: os.environ.get(variable) for name, variable in payers.items()}
    return headers | {name: value for name, value in found.items() if value}
