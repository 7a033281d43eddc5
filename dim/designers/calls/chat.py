"""Questions with images to a chat endpoint that speaks OpenAI's API, many at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from dim.designers.base import CallOptions, OnAnswer, OnText, Question, Reply
from dim.designers.calls.breaker import LONGEST_PAUSE_S, CircuitBreaker, CoolDown, backoff_s
from dim.designers.calls.gate import Exchange, Gate, LocalExchange
from dim.designers.calls.meter import Limits
from dim.designers.calls.transport import Barred, Broken, Busy, Failure, Refused, Transport
from dim.designers.calls.usage import Answer, Prices, Unusable, Usage
from dim.designers.calls.wire import (
    EMPTY,
    MAX_TOKENS,
    SCHEMA,
    STREAM,
    STREAM_USAGE,
    TEMPERATURE,
    Completion,
    expected_input_tokens,
    expected_output_tokens,
    request_body,
)
from dim.errors import CallsStopped, DesignerError, InputError
from dim.records import clean_text
from dim.redaction import redact

__all__ = ["ChatEndpoint", "Question"]

ResultT = TypeVar("ResultT")

_INLINE_BYTES = 256 << 10  # images larger than this together are encoded in a thread
_LEASE_MARGIN_S = 60.0
_HEDGE_AFTER_ANSWERS = 30  # fewer say nothing about what is slow
_HEDGE_WINDOW = 200
_EXCHANGE_PAUSE_S = 0.01
_LEARN = 0.1  # weight of the last answer in running means


class ChatEndpoint:
    """A model behind a URL. Holds one connection pool and one event loop in its own thread.

    Args:
        model: the name the server knows the model by.
        url: base address such as ``http://host:8000/v1``; ``None`` = ``OPENAI_BASE_URL`` or
            OpenAI's own, which need ``OPENAI_API_KEY``.
        options: how calls are made.
        exchange: the meter that calls are counted by, where it is shared with other processes;
            ``None``: by the options, for this endpoint alone.

    Raises:
        DesignerError: there is no URL and no key.
    """

    def __init__(
        self,
        model: str,
        url: str | None,
        options: CallOptions,
        exchange: Exchange | None = None,
    ) -> None:
        key = os.environ.get("OPENAI_API_KEY")
        url = url or os.environ.get("OPENAI_BASE_URL")
        if url is None and not key:
            raise DesignerError(
                f"openai:{model} calls OpenAI and needs OPENAI_API_KEY; "
                f"for your own server write openai:{model}@http://host:port/v1"
            )
        self._loop = _LoopThread(threads=options.in_flight)
        self._calls = _Calls(model, url, key, options, exchange)
        weakref.finalize(self, _close, self._loop, self._calls)

    def ask(
        self,
        questions: Sequence[Question],
        on_answer: OnAnswer | None = None,
        on_text: OnText | None = None,
    ) -> list[Reply]:
        """One answer or error per question; answers are :class:`dim.designers.calls.usage.Answer`.

        At most ``in_flight`` are open at once, over all threads that ask. With ``on_text`` the
        server is asked to stream.

        Raises:
            CallsStopped: the server is down, nobody is let in, or the budget is spent. Every answer
                that had come or was still to come has been reported by then.
        """
        return self._loop.run(self._calls.ask(questions, on_answer, on_text))


@dataclass
class _Call:
    """A question on its way, and the request that was made of it."""

    question: Question
    max_pixels: int | None
    on_text: Callable[[str], None] | None = None
    body: bytes | None = None
    without: frozenset[str] = frozenset()

    @cached_property
    def input_tokens(self) -> float:
        """How many it has by our own count, for which its images have to be looked at."""
        return expected_input_tokens(self.question, self.max_pixels)


@dataclass(frozen=True)
class _Answered:
    """What came back, what it cost, and what the gate is to be told when it is kept."""

    completion: Completion
    usage: Usage
    lease: str | None

    def twice(self) -> _Answered:
        """The same, paid twice."""
        usage = self.usage
        return replace(
            self,
            usage=replace(
                usage,
                input_tokens=2 * usage.input_tokens,
                output_tokens=2 * usage.output_tokens,
                usd=2 * usage.usd,
            ),
        )


class _Calls:
    """What runs within the event loop."""

    def __init__(
        self,
        model: str,
        url: str | None,
        key: str | None,
        options: CallOptions,
        exchange: Exchange | None,
    ) -> None:
        self._model = model
        self._who = f"{model} at {redact(url) if url else 'OpenAI'}"
        self._connection = (url, key, options.timeout_s)
        self._options = options
        self._prices = options.prices
        self._transport: Transport | None = None
        self._open = asyncio.Semaphore(options.in_flight)
        # Some are made ready while others are out, and some are being stored.
        self._near = asyncio.Semaphore(2 * options.in_flight)
        self._breaker = CircuitBreaker(options.breaker, self._who)
        self._cool_down = CoolDown()
        self._longest_pause_s = max(options.busy_s, LONGEST_PAUSE_S)
        self._gate = _gate(options, exchange)
        self._refused: set[str] = set()
        self._expected = _Expected(options.max_tokens)
        self._slow = _Slow(options.hedge_after)
        self._served = self._turned_away = False

    async def ask(
        self,
        questions: Sequence[Question],
        on_answer: OnAnswer | None,
        on_text: OnText | None = None,
    ) -> list[Reply]:
        stopped: list[BaseException] = []

        async def ask_one(place: int, question: Question) -> Reply | None:
            told = None if on_text is None else partial(on_text, place)
            call = _Call(question, self._options.max_pixels, told)
            async with self._near:
                try:
                    return await self._ask_one(place, call, on_answer, stopped)
                except Exception as error:
                    stopped.append(error)
                    return None

        asked = (ask_one(place, question) for place, question in enumerate(questions))
        replies = await asyncio.gather(*asked)
        if stopped:  # only now: what is under way is paid for, and has been waited for
            raise stopped[0]
        return [reply for reply in replies if reply is not None]

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.close()

    async def _ask_one(
        self,
        place: int,
        call: _Call,
        on_answer: OnAnswer | None,
        stopped: Sequence[BaseException],
    ) -> Reply | None:
        """The reply to one question, which has been reported; ``None`` if it is not asked.

        ``stopped``: why nothing more is asked, as soon as there is a reason.
        """
        try:
            await self._encode(call, self._refused)
            async with self._open:
                if stopped:
                    return None
                answered = await self._call_until_answered(call)
        except InputError as error:
            return DesignerError(f"image not sent: {error}")
        except Failure as failure:
            return DesignerError(f"{self._who}: {failure}")
        reply = self._reply(answered.completion, answered.usage)
        try:
            if on_answer is not None:
                # In a thread: storing an answer must not hold up the other requests.
                await asyncio.to_thread(on_answer, place, reply)
        finally:
            self._leave(answered.lease, answered.usage)
        return reply

    def _reply(self, completion: Completion, usage: Usage) -> Answer | Unusable:
        if completion.fault is not None:
            message = f"{self._who}: {completion.fault}"
            return Unusable(message, usage, final=completion.fault != EMPTY)
        return Answer(clean_text(completion.text), usage)

    async def _call_until_answered(self, call: _Call) -> _Answered:
        """Try again what may yet succeed.

        Raises:
            Failure: it does not, also after all attempts.
            CallsStopped: nothing else would succeed either.
        """
        failures = 0
        busy_since: float | None = None
        while True:
            try:
                return await self._call_in_any_form(call)
            except Busy as busy:
                now = time.monotonic()
                busy_since = busy_since or now
                self._check_patience(busy, now, busy_since)
            except (Broken, Barred) as failure:
                if isinstance(failure, Barred) and (failure.for_good or not self._served):
                    raise CallsStopped(f"{self._who}: {failure}") from None
                if not self._breaker.is_open:  # else it is not this request's fault
                    failures += 1
                if failures > self._options.retries:
                    raise
                await asyncio.sleep(backoff_s(max(failures, 1)))

    def _check_patience(self, busy: Busy, now: float, since: float) -> None:
        patience = self._options.busy_s
        if max(now - since, busy.retry_after_s or 0.0) < patience:
            return
        # One request may be too large for the server's limits; two in a row are the server.
        second, self._turned_away = self._turned_away, True
        if patience and second:
            raise CallsStopped(
                f"{self._who} was too busy for any answer in {patience:g} s ({busy}); what it "
                "answered before is kept: run the same command again to go on"
            )
        raise busy

    async def _call_in_any_form(self, call: _Call) -> _Answered:
        """Send a request, without what this server turns out not to take."""
        without = set(self._refused)
        first: Refused | None = None
        while True:
            try:
                answered = await self._call_once(call, without)
            except Refused as refused:
                first = first or refused
                culprits = _culprits(refused, call, without) - without
                if not culprits:
                    raise first from None  # it was the request itself
                without |= culprits
            else:
                self._refused |= without
                return answered

    async def _call_once(self, call: _Call, without: Set[str]) -> _Answered:
        body = await self._encode(call, without)
        async with self._breaker.call():
            left_s = await self._cool_down.wait(self._longest_pause_s)
            if left_s:
                raise Busy(f"asks to be left alone for {left_s:,.0f} s", left_s)
            return await self._hedged(call, body)

    async def _encode(self, call: _Call, without: Set[str]) -> bytes:
        if call.body is None or call.without != without:
            call.without = frozenset(without)
            encode = partial(
                request_body,
                *(self._model, call.question, self._options, call.without),
                stream=call.on_text is not None,
            )
            if sum(map(len, call.question.images)) <= _INLINE_BYTES:
                call.body = encode()
            else:  # in a thread: encoding megabytes must not hold up the other requests
                call.body = await asyncio.to_thread(encode)
        return call.body

    async def _hedged(self, call: _Call, body: bytes) -> _Answered:
        """Send a request, and once more if the answer takes unusually long."""
        slow_s = self._slow.after_s()
        if slow_s is None:
            return await self._send(call, body)
        first = asyncio.create_task(self._send(call, body))
        await asyncio.wait([first], timeout=slow_s)
        if first.done():
            return first.result()
        # What is told is the first one's: two at a time would be a muddle.
        silent = replace(call, on_text=call.on_text and (lambda _: None))
        second = asyncio.create_task(self._send(silent, body))
        running = {first, second}
        try:
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good:
                    return good[0].result().twice() if running else good[0].result()
            return first.result()
        finally:
            for task in running:
                task.cancel()

    async def _send(self, call: _Call, body: bytes) -> _Answered:
        lease = await self._enter(call)
        sent_at = time.monotonic()
        try:
            completion = await self._connect().send(body, call.on_text)
        except BaseException as error:
            self._leave(lease, None)
            if isinstance(error, Busy):
                self._hold(sent_at, error)
            raise
        seconds = time.monotonic() - sent_at
        self._served, self._turned_away = True, False
        self._cool_down.served(sent_at)
        self._slow.note(seconds)
        usage = self._usage(call, completion, seconds)
        if self._gate:
            self._expected.learn(call.input_tokens, usage)
        return _Answered(completion, usage, lease)

    async def _enter(self, call: _Call) -> str | None:
        if self._gate is None:
            return None
        tokens = self._expected.tokens(call.input_tokens)
        return await self._gate.enter(
            tokens, self._expected.most_usd(call.input_tokens, self._prices)
        )

    def _connect(self) -> Transport:
        """The connections, made within the loop that they belong to."""
        if self._transport is None:
            self._transport = Transport(*self._connection)
        return self._transport

    def _hold(self, sent_at: float, busy: Busy) -> None:
        wait_s = self._cool_down.hold(sent_at, busy.retry_after_s)
        if self._gate:
            self._gate.hold(min(wait_s, self._longest_pause_s))

    def _leave(self, lease: str | None, usage: Usage | None) -> None:
        if self._gate and lease:
            tokens = usage.input_tokens + usage.output_tokens if usage else 0
            self._gate.leave(lease, tokens, usage.usd if usage else 0.0)

    def _usage(self, call: _Call, completion: Completion, seconds: float) -> Usage:
        read, written = completion.input_tokens, completion.output_tokens
        if read is None:
            read = round(self._expected.input_tokens(call.input_tokens))
        if written is None:
            written = expected_output_tokens(completion.text)
        return Usage(read, written, self._prices.of(read, written), seconds)


class _Expected:
    """What a request will take, learnt from those that were answered."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._ratio = self._most = 1.0
        self._output = max_tokens / 4

    def input_tokens(self, counted: float) -> float:
        """As the server counts them, from what we counted."""
        return counted * self._ratio

    def tokens(self, counted: float) -> float:
        """Of a request and its answer."""
        return self.input_tokens(counted) + self._output

    def most_usd(self, counted: float, prices: Prices) -> float:
        """More than it will cost."""
        return prices.of(counted * self._most, self._max_tokens)

    def learn(self, counted: float, usage: Usage) -> None:
        ratio = usage.input_tokens / max(counted, 1.0)
        self._ratio += _LEARN * (ratio - self._ratio)
        self._most = max(self._most, ratio)
        self._output += _LEARN * (usage.output_tokens - self._output)


class _Slow:
    """When an answer is unusually late."""

    def __init__(self, quantile: float | None) -> None:
        self._quantile = quantile
        self._seconds: deque[float] = deque(maxlen=_HEDGE_WINDOW)

    def note(self, seconds: float) -> None:
        if self._quantile is not None:
            self._seconds.append(seconds)

    def after_s(self) -> float | None:
        """Seconds after which a request is sent again; ``None``: it is not."""
        if self._quantile is None or len(self._seconds) < _HEDGE_AFTER_ANSWERS:
            return None
        return sorted(self._seconds)[int(self._quantile * len(self._seconds))]


def _gate(options: CallOptions, exchange: Exchange | None) -> Gate | None:
    limits = limits_of(options)
    if not limits:
        return None
    lifetime_s = options.timeout_s + _LEASE_MARGIN_S
    if exchange is None:
        return Gate(LocalExchange(limits), lifetime_s)
    return Gate(exchange, lifetime_s, _EXCHANGE_PAUSE_S)


def limits_of(options: CallOptions) -> Limits:
    """What calls made by ``options`` must keep to, all workers together."""
    return Limits(options.requests_per_minute, options.tokens_per_minute, options.budget)


def _culprits(refused: Refused, call: _Call, without: Set[str]) -> set[str]:
    """What a server may have refused a request for, besides the request itself."""
    said = str(refused).lower()
    if refused.status not in (400, 422):
        return set()
    if "max_completion_tokens" in said:
        return {MAX_TOKENS}
    if "temperature" in said:
        return {TEMPERATURE}
    if call.on_text is not None and re.search(rf"\b{STREAM}", said):
        return {STREAM_USAGE if STREAM_USAGE in said else STREAM}
    if call.question.schema is not None and SCHEMA not in without:
        return {SCHEMA}
    return set() if call.on_text is None else {STREAM}


def _close(loop: _LoopThread, calls: _Calls) -> None:
    """Hang up, when the endpoint goes or the process ends."""
    with contextlib.suppress(Exception):  # too late for it to matter to anyone
        loop.run(calls.close(), timeout_s=2.0)
    loop.stop()


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
