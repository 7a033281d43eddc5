"""Asking: what is stored is not asked again, equal questions are one, useless answers go back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeGuard, TypeVar

from dim.designers import OnAnswer, Question, Reply
from dim.designers.calls.usage import Answer, Unusable
from dim.designers.calls.wire import sent_as
from dim.errors import DimError
from infra import metrics
from pipelines.calls.answers import Answers, answer_key
from pipelines.outcome import Rejection, Row

RequestT = TypeVar("RequestT", contravariant=True)
ReadT = TypeVar("ReadT")

_AGAIN = """\
{text}

You were asked this before, and your answer could not be used: {fault}. Answer again, completely \
and in the form that is asked for."""


def shown_key(model: Any, row: Row, column: str) -> str:
    """What stands for an image in the key of an answer: its hash and, where a model is not shown
    the file itself, what is made of it.

    Args:
        model: who is shown it; a model over HTTP says how large an image it is sent at most.
        row: a record with the hash of its image in ``{column}_hash``.
        column: of the image.
    """
    most = getattr(model, "max_pixels", None)
    return f"{row[f'{column}_hash']} {sent_as(row[column], most)}".rstrip()


class Ask(Protocol[RequestT]):
    """The method of a designer or captioner that answers many requests."""

    def __call__(
        self, requests: Sequence[RequestT], /, *, on_answer: OnAnswer | None = None
    ) -> list[Reply]: ...


class Answering(Protocol):
    """A designer or captioner that answers any question put to it."""

    def ask(
        self, questions: Sequence[Question], /, *, on_answer: OnAnswer | None = None
    ) -> list[Reply]: ...


def answers_questions(designer: Any) -> TypeGuard[Answering]:
    """Whether a designer is a model that can be asked anything; others only do their one task."""
    return hasattr(designer, "ask")


@dataclass(frozen=True)
class Asked(Generic[ReadT]):
    """A question on its way: how it was first put, under which key, how its answer is read, and
    the id of the record it is for.

    ``read`` raises a :class:`dim.errors.DimError` or a :class:`Rejection` for an answer that
    cannot be used; its text tells the model what to do better.
    """

    question: Question
    key: str
    read: Callable[[str], ReadT]
    record: str = ""


def ask_once(
    ask: Ask[RequestT],
    requests: Sequence[RequestT],
    keys: Sequence[str],
    answers: Answers | None,
    records: Sequence[str] | None = None,
) -> list[Reply]:
    """One reply per request, in order.

    Args:
        ask: answers what is not known.
        requests: what to ask.
        keys: one per request; equal keys mean equal answers.
        answers: where answers are kept the moment they arrive; ``None`` keeps none.
        records: the id of the record that each request is for, which the bill names.
    """
    replies = answers.find(keys) if answers is not None else {}
    open_requests = {k: r for k, r in zip(keys, requests, strict=True) if k not in replies}
    open_keys = list(open_requests)
    # of equal requests the first record pays
    payers = dict(zip(reversed(keys), reversed(records or [""] * len(keys)), strict=True))

    def store(place: int, answer: str | Unusable) -> None:
        _count(answer)
        if answers is not None:
            key = open_keys[place]
            answers.add(key, answer, payers[key])

    if open_keys:
        fresh = ask(list(open_requests.values()), on_answer=store)
        replies.update(zip(open_keys, fresh, strict=True))
    return [replies[key] for key in keys]


def _count(answer: str | Unusable) -> None:
    """Count an answer that has just come."""
    if isinstance(answer, Answer | Unusable):
        outcome = "unusable" if isinstance(answer, Unusable) else "answered"
        used = answer.usage
        tokens = (used.input_tokens, used.output_tokens)
        metrics.of_calls().answered(outcome, tokens, used.usd, used.seconds)


def ask_until_read(
    ask: Ask[Question], asked: Sequence[Asked[ReadT]], answers: Answers | None, reasks: int
) -> list[ReadT | Exception]:
    """What was read from each answer, or why there is nothing, in order.

    Every answer is kept under a key of its own, the useless ones too: a rerun goes the same way
    through the answers it has, and pays only for what is missing.

    Args:
        ask: answers questions.
        asked: what to ask.
        answers: where answers are kept the moment they arrive; ``None`` keeps none.
        reasks: how often a question is asked again because its answer could not be used. One
            that got no answer at all is not: whoever calls has tried that often enough.
    """
    results: dict[int, ReadT | Exception] = {}
    current = {place: (one.question, one.key) for place, one in enumerate(asked)}
    for attempt in range(reasks + 1):
        places = list(current)
        questions, keys = [current[p][0] for p in places], [current[p][1] for p in places]
        records = [asked[place].record for place in places]
        replies = ask_once(ask, questions, keys, answers, records) if places else []
        current = {}
        for place, reply in zip(places, replies, strict=True):
            one = asked[place]
            results[place] = result = read_reply(one.read, reply)
            if isinstance(reply, str) and isinstance(result, Exception) and attempt < reasks:
                current[place] = _again(one, result, attempt)
    return [results[place] for place in range(len(asked))]


def read_reply(read: Callable[[str], ReadT], reply: Reply) -> ReadT | Exception:
    """What ``read`` makes of an answer, or why there is nothing."""
    if not isinstance(reply, str):
        return reply
    try:
        return read(reply)
    except (DimError, Rejection) as fault:
        return fault


def _again(one: Asked[ReadT], fault: Exception, attempt: int) -> tuple[Question, str]:
    said = _in_words(fault)
    text = _AGAIN.format(text=one.question.text, fault=said.rstrip("."))
    return replace(one.question, text=text), answer_key(one.key, str(attempt + 1), said)


def _in_words(fault: Exception) -> str:
    if not isinstance(fault, Rejection):
        return str(fault)
    if fault.value is None or fault.threshold is None:
        return fault.detail
    return f"{fault.detail} ({fault.value:.3g}, and the limit is {fault.threshold:.3g})"
