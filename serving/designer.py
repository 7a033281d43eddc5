"""The designer deployments: instructions and images in, blueprints out.

A designer that is a model of ours is asked a batch at a time (``serving.own_designer``, which has
the models' libraries). One that is somewhere else, or is quick, is asked question by question, each
designer in threads of its own, so that a slow one holds up nobody else's (``OtherDesigners``).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Protocol, TypeVar

from dim.blueprint import Blueprint
from dim.design import ReviewRequest
from dim.designers import CallOptions, DesignRequest, Reply, create
from dim.designers.base import SOMEBODY_WAITS
from dim.designers.calls.usage import Unusable
from dim.designers.openai import OpenAIModel
from dim.errors import BlueprintError, CallsStopped, DesignerError
from dim.reflection import require_reviews
from dim.review import parse as parse_review
from serving.config import DesignerConfig, ServingConfig
from serving.drafts import Draft
from serving.jobs import DesignJob, ReviewJob
from serving.shipping import received

logger = logging.getLogger("ray.serve")
AnswerT = TypeVar("AnswerT")
TOLD_EVERY_S = 0.1


class Written(Protocol):
    """What is asked of a designer, with what it has written of its answer so far."""

    words: str


class Question:
    """What is asked of a designer somewhere else: its answer, and what is written of it so far.

    Args:
        ask: asks it, on one of ``threads``; is given this question, to say what is written.
        threads: of the designer.
    """

    def __init__(
        self, ask: Callable[[Question], Sequence[Reply]], threads: ThreadPoolExecutor
    ) -> None:
        self.words = ""
        loop = asyncio.get_running_loop()
        self.answer = loop.run_in_executor(threads, the_only, partial(ask, self))


async def as_written(
    job: DesignJob, written: Written, answer: Awaitable[Reply]
) -> AsyncGenerator[str, None]:
    """The blueprint of ``answer``, in pieces while it is written; errors as of ``presented``."""
    draft, coming = Draft(job.instruction), asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait([coming], timeout=TOLD_EVERY_S))[0]:
            if piece := draft.more(written.words):
                yield piece
        yield draft.rest(presented(job, coming.result()))
    finally:
        coming.cancel()


class OtherDesigners:
    """Asks designers that are no models of ours: over HTTP, from a file, by rule.

    A deployment of one replica: what a designer may cost and how often it may be asked is counted
    here, and so are the answers kept that were paid for.

    Args:
        config: of the server.
        names: of the designers of ``config.designers`` that this pool asks.
    """

    def __init__(self, config: ServingConfig, names: Sequence[str]) -> None:
        self._askers = {
            name: Asker(config.designers[name], config.request_timeout_s, config.kept_blueprints)
            for name in names
        }

    async def write(self, job: DesignJob) -> AsyncIterator[str]:
        """As of ``OwnDesigner.write``; in one piece where the designer does not stream."""
        async with aclosing(self._askers[job.designer].write(job)) as pieces:
            async for piece in pieces:
                yield piece

    async def review(self, job: ReviewJob) -> Reply:
        """What the designer says of a painted image, or why it says nothing that can be read."""
        return await self._askers[job.designer].review(job)


class Asker:
    """One designer: asked by so many at a time, and never twice for what it was paid for.

    Args:
        settings: which designer, and how much it may be asked.
        request_timeout_s: how long a request waits for everything.
        kept: how many answers.
    """

    def __init__(self, settings: DesignerConfig, request_timeout_s: float, kept: int) -> None:
        self._patience_s = settings.patience_s(request_timeout_s)
        self._designer = create(settings.spec, calls=call_options(settings, self._patience_s))
        self._threads = ThreadPoolExecutor(settings.concurrency)
        self._kept = kept if self._designer.costly else 0
        # What was answered, and what is being asked: a client that asks again joins it.
        self._known: OrderedDict[tuple[str, str], Question] = OrderedDict()

    async def write(self, job: DesignJob) -> AsyncGenerator[str, None]:
        """As of ``OwnDesigner.write``."""
        image = await received(job.image)
        request = DesignRequest(job.instruction, image)
        key = (digest(image), job.instruction)
        question = self._asked(key, partial(self._design, request, job.streamed))
        # Shielded: who stops waiting leaves an answer that is paid for to whoever asks again.
        answer = in_time(job, asyncio.shield(question.answer), self._patience_s)
        async with aclosing(as_written(job, question, answer)) as pieces:
            async for piece in pieces:
                yield piece

    def _design(
        self, request: DesignRequest, streamed: bool, question: Question
    ) -> Sequence[Reply]:
        if not (streamed and isinstance(self._designer, OpenAIModel)):
            return self._designer.design([request])

        def told(_place: int, words: str) -> None:
            question.words = words

        return self._designer.design([request], on_text=told)

    async def review(self, job: ReviewJob) -> Reply:
        """What the designer says of a painted image, or an error that a client may read."""
        reviewer = require_reviews(self._designer)
        image = await received(job.image)
        request = ReviewRequest(job.instruction, job.plan, image, job.painted)
        key = (digest(image, job.painted), f"{job.instruction}\0{job.plan}")
        question = self._asked(key, lambda _: reviewer.review([request]))
        try:
            answer = await in_time(job, asyncio.shield(question.answer), self._patience_s)
        except DesignerError as error:
            return error
        return presented_review(job, answer)

    def _asked(self, key: tuple[str, str], ask: Callable[[Question], Sequence[Reply]]) -> Question:
        """The question of ``key``, which ``ask`` asks unless somebody has."""
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        question = Question(ask, self._threads)
        if self._kept:
            self._known[key] = question
            question.answer.add_done_callback(lambda _: self._settle(key, question))
        return question

    def _settle(self, key: tuple[str, str], question: Question) -> None:
        """Keep what was paid for, such as an answer that is no blueprint; not what may yet come."""
        done = question.answer
        answered = not done.cancelled() and done.exception() is None
        if not answered or not is_paid(done.result()):
            self._known.pop(key, None)
        settled = [each for each, question in self._known.items() if question.answer.done()]
        for each in settled[: max(0, len(settled) - self._kept)]:
            del self._known[each]


def the_only(ask: Callable[[], Sequence[Reply]]) -> Reply:
    """The answer to one question."""
    try:
        (answer,) = ask()
    except DesignerError as error:  # nobody may ask it anything now
        return error
    return answer


def digest(*parts: bytes) -> str:
    """The same for the same bytes."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()


def is_paid(answer: Reply) -> bool:
    """Whether the designer said something, and would say it again."""
    return isinstance(answer, str) or (isinstance(answer, Unusable) and answer.final)


async def in_time(
    job: DesignJob | ReviewJob, answer: Awaitable[AnswerT], patience_s: float
) -> AnswerT:
    """Wait for an answer as long as its designer may take, and its request has.

    Raises:
        DesignerError: it did not come.
    """
    if job.deadline is not None:
        patience_s = min(patience_s, job.deadline - time.time())
    try:
        async with asyncio.timeout(patience_s):
            return await answer
    except TimeoutError:
        raise DesignerError(
            f"designer {job.designer!r} did not answer in {max(0.0, patience_s):.3g} s"
        ) from None


def presented(job: DesignJob, answer: Reply) -> str:
    """A designer's answer as a clean blueprint.

    Raises:
        DesignerError: it is none. Addresses and what others wrote stay in the log.
    """
    said, why = "did not answer", str(answer)
    if isinstance(answer, str):
        try:
            return Blueprint.parse(answer, instruction=job.instruction).render()
        except BlueprintError as error:
            said, why = "did not answer with a blueprint", str(error)
    elif isinstance(answer, CallsStopped):
        said = "takes no more questions for now"
    logger.warning("designer %s %s: %s", job.designer, said, why)
    raise DesignerError(f"designer {job.designer!r} {said}; the server's log says why")


def presented_review(job: ReviewJob, answer: Reply) -> Reply:
    """A designer's review where it can be read; else an error, of which the log has the rest."""
    said, why = "gave no review", str(answer)
    if isinstance(answer, str):
        try:
            parse_review(answer, instruction=job.instruction)
        except BlueprintError as error:
            said, why = "gave no review that can be read", str(error)
        else:
            return answer
    logger.warning("designer %s %s: %s", job.designer, said, why)
    return DesignerError(f"designer {job.designer!r} {said}; the server's log says why")


def call_options(settings: DesignerConfig, patience_s: float) -> CallOptions:
    """How a designer over HTTP is called for somebody who waits."""
    return CallOptions(
        in_flight=settings.concurrency,
        # Longer than anybody waits: an answer under way is paid for, and kept when it comes.
        timeout_s=2 * patience_s,
        busy_s=patience_s,
        retries=1,
        requests_per_minute=settings.requests_per_minute,
        tokens_per_minute=settings.tokens_per_minute,
        input_price=settings.input_price,
        output_price=settings.output_price,
        budget=settings.budget_usd,
        breaker=SOMEBODY_WAITS.breaker,
    )
