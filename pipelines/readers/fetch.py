"""Fetch: images by their URLs, politely and from public addresses only.

Every host name is resolved by us and the connection is made to the very addresses that were
checked, at every redirect anew, so that no name can point a worker at a private network. An address
is looked at once more when its socket is made, so that no way to write one can either.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address
from typing import Annotated
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver
from pydantic import Field, model_validator
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from yarl import URL

from dim.config import HowOnly, StrictModel
from dim.errors import InputError
from dim.retry_after import retry_after_s
from pipelines.outcome import Rejection
from pipelines.readers.public import is_public

_OPT_OUTS = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
_GONE = frozenset({404, 410, 451})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 1 << 16


class FetchConfig(StrictModel):
    """How images are fetched. The limits per host are shared out among ``workers``."""

    workers: Annotated[int, HowOnly] = Field(4, ge=1)
    """Ranges that are read at once when there are URLs."""
    per_host: Annotated[int, HowOnly] = Field(8, ge=1)
    """Requests in flight to one host, by all workers together."""
    per_host_per_second: Annotated[float, HowOnly] = Field(20.0, gt=0)
    """Requests that are begun to one host in a second, by all workers together."""
    timeout_s: Annotated[float, HowOnly] = Field(30.0, gt=0)
    """From the start of an attempt to its last byte."""
    attempts: Annotated[int, HowOnly] = Field(4, ge=1)
    """On time-outs, broken connections and answers such as 429 and 503."""
    max_wait_s: Annotated[float, HowOnly] = Field(120.0, gt=0)
    """Longest pause before another attempt; a ``Retry-After`` above it fails the record."""
    max_bytes: int = Field(50_000_000, ge=1)
    """Size of one image at most; the transfer stops there."""
    max_redirects: int = Field(5, ge=0)
    user_agent: str = "dim-on-ray"
    """What the hosts see. ``X-Robots-Tag`` rules for its name bind as the general ones do."""
    respect_opt_out: bool = True
    """Reject images whose host says noai, noimageai, noindex, noimageindex or none."""
    allow_private: bool = False
    """Also fetch from private, loopback and link-local addresses, at any port: for a network of
    one's own."""
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] | None = None
    """Ports that may be asked besides 80 and 443."""

    def longest_s(self, urls: int) -> float:
        """Seconds that so many URLs take at most, fetched together from one host that answers."""
        attempts = self.attempts * self.timeout_s + (self.attempts - 1) * self.max_wait_s
        return attempts + self.attempts * urls * self.workers / self.per_host_per_second

    @model_validator(mode="after")
    def _check(self) -> FetchConfig:
        if self.per_host < self.workers:
            raise ValueError("per_host must be at least workers: each worker needs one request")
        return self


Fetched = dict[str, bytes | Exception]


@dataclass(frozen=True)
class Fetcher:
    """Fetches the images of a few records at a time, as one of ``config.workers``."""

    config: FetchConfig
    next_starts: dict[str, float] = field(default_factory=dict, compare=False)
    """When the next request to a host may begin, on this worker's clock."""

    def __call__(self, urls: Iterable[str]) -> Fetched:
        """The bytes of each URL, or why there are none: a Rejection, or an error."""
        wanted = sorted(set(urls))
        return asyncio.run(self._all(wanted)) if wanted else {}

    async def _all(self, urls: list[str]) -> Fetched:
        config = self.config
        connector = aiohttp.TCPConnector(
            limit=0,
            resolver=_PublicOnly(config.allow_private),
            use_dns_cache=False,
            socket_factory=partial(_socket, config),
        )
        timeout = aiohttp.ClientTimeout(total=config.timeout_s)
        headers = {"User-Agent": config.user_agent, "Accept": "image/*"}
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=headers, auto_decompress=False
        ) as session:
            job = _Job(config, session, self.next_starts)
            found = await asyncio.gather(*(job.fetch(url) for url in urls), return_exceptions=True)
        results: Fetched = {}
        for url, result in zip(urls, found, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result
            results[url] = result
        return results


class _Busy(Exception):
    """Worth another attempt, after ``wait`` seconds if the host said so."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


@dataclass
class _Job:
    config: FetchConfig
    session: aiohttp.ClientSession
    next_starts: dict[str, float]
    slots: dict[str, asyncio.Semaphore] = field(init=False)

    def __post_init__(self) -> None:
        share = self.config.per_host // self.config.workers
        self.slots = defaultdict(lambda: asyncio.Semaphore(share))

    async def fetch(self, url: str) -> bytes:
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_Busy),
            stop=stop_after_attempt(self.config.attempts),
            wait=self._pause,
            reraise=True,
        )
        try:
            return await attempts(self._attempt, url)
        except _Busy as error:
            raise InputError(f"{url}: {error}") from None

    def _pause(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait if isinstance(error, _Busy) else None
        return min(
            asked if asked is not None else 0.5 * 2**state.attempt_number, self.config.max_wait_s
        )

    async def _attempt(self, url: str) -> bytes:
        for _ in range(self.config.max_redirects + 1):
            host = check_url(url, self.config.allow_private)
            try:
                async with self.slots[host]:
                    await self._turn(host)
                    answer = await self._get(url)
            except TimeoutError:
                raise _Busy(f"no answer within {self.config.timeout_s:g} s") from None
            except aiohttp.InvalidURL:
                raise InputError(f"{url} is not a URL") from None
            except (aiohttp.ClientError, OSError) as error:
                refused = _refused(error)
                if refused:
                    raise Rejection(refused.reason, f"{url}: {refused}") from None
                raise _Busy(f"{type(error).__name__}: {error}") from None
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise InputError(f"{url}: more than {self.config.max_redirects} redirects")

    async def _turn(self, host: str) -> None:
        """Wait for this worker's next turn at a host."""
        now = time.monotonic()
        start = max(now, self.next_starts.get(host, 0.0))
        self.next_starts[host] = start + self.config.workers / self.config.per_host_per_second
        await asyncio.sleep(start - now)

    async def _get(self, url: str) -> bytes | str:
        """The body, or where a redirect leads."""
        async with self.session.get(url, allow_redirects=False) as answer:
            if answer.status in _REDIRECTS and "Location" in answer.headers:
                return answer.headers["Location"]
            if answer.status in _BUSY:
                raise self._busy(answer)
            if answer.status in _GONE:
                raise Rejection("url.gone", f"{url} answers {answer.status}", answer.status)
            if answer.status != 200:
                raise InputError(f"{url} answers {answer.status}")
            if self.config.respect_opt_out:
                tags = answer.headers.getall("X-Robots-Tag", [])
                check_opt_out(url, tags, self.config.user_agent)
            return await self._body(url, answer)

    def _busy(self, answer: aiohttp.ClientResponse) -> Exception:
        wait = retry_after_s(answer.headers)
        if wait is not None and wait > self.config.max_wait_s:
            return InputError(f"{answer.url} answers {answer.status}, to be asked in {wait:.0f} s")
        return _Busy(f"answers {answer.status}, also after {self.config.attempts} attempts", wait)

    async def _body(self, url: str, answer: aiohttp.ClientResponse) -> bytes:
        most, parts, size = self.config.max_bytes, [], answer.content_length or 0
        if size <= most:
            size = 0
            async for chunk in answer.content.iter_chunked(_CHUNK):
                size += len(chunk)
                if size > most:
                    break
                parts.append(chunk)
        if size > most:
            raise Rejection("url.too_large", f"{url} is over {most:,} bytes", size, most)
        return b"".join(parts)


def is_url(value: object) -> bool:
    """Whether a value is an address of the web."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def check_url(url: str, allow_private: bool) -> str:
    """The host of a URL, which must be of the web and, if it is a number, public.

    The URL is read as the client reads it, to which some other letters are digits too.

    Raises:
        InputError: it is no http(s) URL.
        Rejection: ``url.private_address``.
    """
    try:
        parts = URL(url)
        host, _ = parts.host, parts.port
    except (ValueError, TypeError):
        raise InputError(f"{url} is not a URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"{url} is not an http or https URL")
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return host  # a name: its addresses are checked when it is resolved
    if not allow_private and not is_public(host):
        raise Rejection("url.private_address", f"{url}: {host} is not a public address")
    return host


class _Refused(OSError):
    """A connection that is not made, and the reason code."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _refused(error: BaseException) -> _Refused | None:
    """The refusal of ours, however the client wrapped it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, _Refused):
            return found
        found = getattr(found, "os_error", None) or found.__cause__
    return None


class _PublicOnly(AbstractResolver):
    """Resolves names for the connector, which then connects to these addresses and no others."""

    def __init__(self, allow_private: bool) -> None:
        self._inner = ThreadedResolver()
        self._allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        for item in found:
            if not self._allow_private and not is_public(item["host"]):
                raise _Refused(
                    "url.private_address",
                    f"{host} is at {item['host']}, which is not a public address",
                )
        return found

    async def close(self) -> None:
        await self._inner.close()


def _socket(config: FetchConfig, info: aiohttp.AddrInfoType) -> socket.socket:
    """A socket for one address: the last look at where it goes, whatever led there."""
    family, kind, protocol, _, place = info
    address, port = str(place[0]), int(place[1])
    if not config.allow_private:
        if not is_public(address):
            raise _Refused("url.private_address", f"{address} is not a public address")
        if port not in (80, 443, *(config.ports or ())):
            raise _Refused("url.port", f"port {port} is not 80 or 443 and not one of fetch.ports")
    return socket.socket(family, kind, protocol)


def check_opt_out(url: str, tags: Iterable[str], user_agent: str) -> None:
    """See that no ``X-Robots-Tag`` keeps the image from being used.

    A tag may be for one robot, ``name: noai``; it counts if the name is ours or there is none.

    Raises:
        Rejection: ``url.opted_out``.
    """
    ours = user_agent.partition("/")[0].strip().lower()
    for tag in tags:
        applies = True
        for directive in tag.lower().split(","):
            name, colon, rest = directive.partition(":")
            if colon and name.strip() not in ("unavailable_after", "max-image-preview"):
                applies = name.strip() in (ours, "*")
                directive = rest
            if applies and directive.strip() in _OPT_OUTS:
                raise Rejection("url.opted_out", f"{url} says {directive.strip()}")
