"""Fetch: images by their URLs, politely and from public addresses only.

Every host name is resolved by us and the connection is made to the very addresses that were
checked, at every redirect anew, so that no name can point a worker at a private network. An address
is looked at once more when its socket is made, so that no way to write one can either.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from heapq import heappop, heappush
from ipaddress import ip_address
from typing import Annotated, Any
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
_NO_SUCH_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})
_RESOLVERS = 64  # names that are looked up at once: those of dead hosts take seconds
_JITTER = 1.5  # a pause is up to so many times as long
# A first attempt is given up early, when its host answers others so many times faster.
_PATIENCE, _LEAST_PATIENCE_S, _ANSWERS_KNOWN = 8, 1.0, 8
_LAST_ANSWER = 0.1  # what it counts in how fast a host answers, beside those before
_LEFT_ALONE_S = 300.0  # a host that failed too often
_MOST_HELD = 512 << 20  # bytes that wait to be taken; after that only what is wanted is begun
_HOSTS = 10_000  # that are remembered before those are forgotten of which nothing counts


class FetchConfig(StrictModel):
    """How images are fetched. The limits per host are shared out among ``workers``."""

    workers: Annotated[int, HowOnly] = Field(4, ge=1)
    """Processes that fetch at most, each for several ranges at once."""
    per_host: Annotated[int, HowOnly] = Field(8, ge=1)
    """Requests in flight to one host, by all workers together."""
    per_host_per_second: Annotated[float, HowOnly] = Field(20.0, gt=0)
    """Requests that are begun to one host in a second, by all workers together."""
    timeout_s: Annotated[float, HowOnly] = Field(30.0, gt=0)
    """From the start of an attempt to its last byte."""
    attempts: Annotated[int, HowOnly] = Field(4, ge=1)
    """On time-outs, broken connections and answers such as 429 and 503."""
    in_flight: Annotated[int, HowOnly] = Field(512, ge=1)
    """Requests of one worker in flight to all hosts together."""
    host_failures: Annotated[int, HowOnly] = Field(8, ge=1)
    """Links in a row for which a host does not answer, after which it is left alone for 5 minutes:
    its links fail at once."""
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
class Fetching:
    """Images on their way; what has come waits until it is taken.

    Attributes:
        loop: that they are fetched in.
        results: of all of them.
        wanted: is set when somebody waits for them.
    """

    loop: asyncio.AbstractEventLoop
    results: Future[Fetched]
    wanted: asyncio.Event

    def take(self) -> Fetched:
        """The bytes of each URL, or why there are none: a Rejection, or an error."""
        self.loop.call_soon_threadsafe(self.wanted.set)
        return self.results.result()


@dataclass(frozen=True)
class Fetcher:
    """Fetches images as one of ``config.workers``, for any number of threads.

    It has one session, and one view of every host, as long as its process lives; what is pickled
    are its settings.
    """

    config: FetchConfig

    def __call__(self, urls: Iterable[str]) -> Fetched:
        """The bytes of each URL, or why there are none: a Rejection, or an error."""
        return self.begin(urls).take()

    def begin(self, urls: Iterable[str], turn: int = 0) -> Fetching:
        """Let images be fetched, which may be taken later, or not at all (``results.cancel()``).

        Args:
            urls: of the images.
            turn: a host is asked for images of a lower one first; see :meth:`next_turn`.
        """
        loop, job = self._running
        wanted = asyncio.Event()
        work = job.fetch_all(sorted(set(urls)), wanted, turn)
        return Fetching(loop, asyncio.run_coroutine_threadsafe(work, loop), wanted)

    def next_turn(self) -> int:
        """A turn after all that were given out: those who came first are done first."""
        return next(self._turns)

    @cached_property
    def _turns(self) -> Iterator[int]:
        return itertools.count(1)

    @cached_property
    def _running(self) -> tuple[asyncio.AbstractEventLoop, _Job]:
        """An event loop in a thread of its own, and what runs in it."""
        loop = asyncio.new_event_loop()
        loop.set_default_executor(ThreadPoolExecutor(_RESOLVERS))
        threading.Thread(target=loop.run_forever, name="fetch", daemon=True).start()
        job = _Job(self.config)
        weakref.finalize(self, _close, loop, job)
        return loop, job

    def __getstate__(self) -> dict[str, Any]:
        """Leave the session behind."""
        return {"config": self.config}


def _close(loop: asyncio.AbstractEventLoop, job: _Job) -> None:
    with suppress(Exception):  # too late for it to matter to anyone
        asyncio.run_coroutine_threadsafe(job.close(), loop).result(2.0)
    loop.call_soon_threadsafe(loop.stop)


class _Busy(Exception):
    """Worth another attempt, after ``wait`` seconds if the host said so.

    ``lasted`` is how many seconds this one took.
    """

    def __init__(self, message: str, wait: float | None = None, lasted: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait
        self.lasted = lasted


class _SilentError(_Busy):
    """The host did not answer at all."""


class _Slots:
    """Requests that may be in flight to a host; of those who wait, the lowest turn is the next."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def taken(self, turn: int) -> AsyncIterator[None]:
        """One of them."""
        if self._free:
            self._free -= 1
        else:
            ready = asyncio.get_running_loop().create_future()
            heappush(self._waiting, (turn, next(self._arrivals), ready))
            try:
                await ready
            except asyncio.CancelledError:
                if not ready.cancelled():  # it was given at the same moment
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            *_, ready = heappop(self._waiting)
            if not ready.done():
                ready.set_result(None)
                return
        self._free += 1


@dataclass
class _Host:
    """What this worker knows of a host.

    Attributes:
        slots: requests that may be in flight.
        next_start: when the next one may begin.
        failed: links in a row for which it did not answer, however long it was waited for.
        until: it is not asked before that, because it failed too often.
        users: links that are being fetched from it.
        answers: how often it answered.
        usual_s: how many seconds it took of late.
    """

    slots: _Slots
    next_start: float = 0.0
    failed: int = 0
    until: float = 0.0
    users: int = 0
    answers: int = 0
    usual_s: float = 0.0

    def answered(self, seconds: float) -> None:
        """Note that it did, after so many."""
        self.failed = 0
        self.answers += 1
        share = max(_LAST_ANSWER, 1 / self.answers)
        self.usual_s += share * (seconds - self.usual_s)

    @property
    def patience_s(self) -> float | None:
        """How long a first attempt waits for the beginning of its answer; ``None``: to its end."""
        if self.answers < _ANSWERS_KNOWN:
            return None
        return max(_LEAST_PATIENCE_S, _PATIENCE * self.usual_s)

    def is_idle(self, now: float) -> bool:
        """Whether nothing would be lost if it was forgotten."""
        return not (self.users or self.failed) and max(self.next_start, self.until) <= now


@dataclass
class _Link:
    """A link that is being fetched.

    Attributes:
        turn: when it is, beside others of its host.
        attempts: that were begun.
        is_counted: whether it is among those for which its host did not answer.
    """

    turn: int
    attempts: int = 0
    is_counted: bool = False


class _Job:
    """What runs within the event loop."""

    def __init__(self, config: FetchConfig) -> None:
        self.config = config
        self._session: aiohttp.ClientSession | None = None
        self._hosts: dict[str, _Host] = {}
        self._most_hosts = _HOSTS
        self._open = asyncio.Semaphore(config.in_flight)
        self._held = 0

    async def fetch_all(self, urls: list[str], wanted: asyncio.Event, turn: int) -> Fetched:
        """All of some images. When many bytes wait to be taken, only those that are wanted are
        begun."""
        held = 0

        async def fetch(url: str) -> bytes:
            nonlocal held
            if self._held > _MOST_HELD:
                await wanted.wait()
            data = await self.fetch(url, turn)
            held += len(data)
            self._held += len(data)
            return data

        try:
            found = await asyncio.gather(*map(fetch, urls), return_exceptions=True)
            await wanted.wait()
        finally:
            self._held -= held
        results: Fetched = {}
        for url, result in zip(urls, found, strict=True):
            if isinstance(result, BaseException) and not isinstance(result, Exception):
                raise result
            results[url] = result
        return results

    async def close(self) -> None:
        """Hang up."""
        if self._session is not None:
            await self._session.close()

    async def fetch(self, url: str, turn: int) -> bytes:
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_Busy),
            stop=stop_after_attempt(self.config.attempts),
            wait=self._pause,
            reraise=True,
        )
        try:
            return await attempts(self._attempt, url, _Link(turn))
        except _Busy as error:
            raise InputError(f"{url}: {error}") from None

    def _pause(self, state: RetryCallState) -> float:
        """What the host asks for, or a growing time since the attempt began.

        Those that failed together do not come back together.
        """
        error = state.outcome.exception() if state.outcome else None
        assert isinstance(error, _Busy)
        jitter = random.uniform(1.0, _JITTER)
        if error.wait is not None:
            return min(error.wait * jitter, self.config.max_wait_s)
        pause = 0.5 * 2**state.attempt_number * jitter - error.lasted
        return min(max(pause, 0.0), self.config.max_wait_s)

    async def _attempt(self, url: str, link: _Link) -> bytes:
        link.attempts += 1
        for _ in range(self.config.max_redirects + 1):
            name = check_url(url, self.config.allow_private)
            with self._at(name) as host:
                try:
                    answer = await self._in_turn(url, name, host, link)
                except _SilentError:
                    host.failed += not link.is_counted
                    link.is_counted = True
                    if host.failed >= self.config.host_failures:
                        host.until = time.monotonic() + _LEFT_ALONE_S
                    raise
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
        raise InputError(f"{url}: more than {self.config.max_redirects} redirects")

    @contextmanager
    def _at(self, name: str) -> Iterator[_Host]:
        """A host, which is remembered as long as anything of it counts."""
        share = self.config.per_host // self.config.workers
        host = self._hosts.setdefault(name, _Host(_Slots(share)))
        host.users += 1
        try:
            yield host
        finally:
            host.users -= 1
            if len(self._hosts) > self._most_hosts:
                now = time.monotonic()
                self._hosts = {n: h for n, h in self._hosts.items() if not h.is_idle(now)}
                self._most_hosts = max(_HOSTS, 2 * len(self._hosts))

    async def _in_turn(self, url: str, name: str, host: _Host, link: _Link) -> bytes | str:
        """The body, or where a redirect leads, when the host may be asked.

        Only who may ask its host takes one of the places that there are for all.
        """
        async with host.slots.taken(link.turn):
            now = time.monotonic()
            if host.until > now:
                raise InputError(f"{url}: {name} did not answer for {host.failed} links in a row")
            start = max(now, host.next_start)
            host.next_start = start + self.config.workers / self.config.per_host_per_second
            await asyncio.sleep(start - now)
            async with self._open:
                # Whoever is asked again is waited for then as long as it may take.
                asked_again = link.attempts == 1 < self.config.attempts
                patience = asyncio.timeout(host.patience_s if asked_again else None)
                began = time.monotonic()
                try:
                    return await self._get(url, host, patience)
                except TimeoutError:
                    kind = _Busy if patience.expired() else _SilentError
                    message = f"no answer within {self.config.timeout_s:g} s"
                    raise kind(message, lasted=time.monotonic() - began) from None
                except aiohttp.InvalidURL:
                    raise InputError(f"{url} is not a URL") from None
                except (aiohttp.ClientError, OSError) as error:
                    raise _failure(url, name, error) from None

    def _connected(self) -> aiohttp.ClientSession:
        """The session, made within the loop that it belongs to."""
        config = self.config
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=0,
                resolver=_PublicOnly(config.allow_private),
                use_dns_cache=False,
                socket_factory=partial(_socket, config),
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=config.timeout_s),
                headers={"User-Agent": config.user_agent, "Accept": "image/*"},
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
            )
        return self._session

    async def _get(self, url: str, host: _Host, patience: asyncio.Timeout) -> bytes | str:
        """The body, or where a redirect leads; ``patience`` is for the beginning of the answer."""
        began = time.monotonic()
        async with patience, self._connected().get(url, allow_redirects=False) as answer:
            patience.reschedule(None)
            host.answered(time.monotonic() - began)
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


def _failure(url: str, name: str, error: Exception) -> Exception:
    """What a connection that failed means: only one that might be made next time is tried again."""
    for cause in _causes(error):
        if isinstance(cause, _Refused):
            return Rejection(cause.reason, f"{url}: {cause}")
        if isinstance(cause, socket.gaierror) and cause.errno in _NO_SUCH_NAME:
            return InputError(f"{url}: there is no host {name}")
    return _SilentError(f"{type(error).__name__}: {error}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, however the client wrapped it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = getattr(found, "os_error", None) or found.__cause__


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
