"""Asking once: what is stored is not asked again, and equal requests are one request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from dim import designers
from dim.designers import CallOptions, OnAnswer, Reply
from dim.designers.calls.usage import Unusable
from dim.designers.calls.wire import sent_as
from dim.designers.prepared import PreparedModel
from infra.storage import Store
from pipelines.calls.answers import Answers
from pipelines.outcome import Row

RequestT = TypeVar("RequestT", contravariant=True)


_BATCHES_AT_ONCE = 3


def batches_at_once(spec: str) -> int:
    """How many batches a worker that asks ``spec`` works on: while one waits for its last answer,
    the next ones keep the server busy. Calls in flight are counted over all of them."""
    return _BATCHES_AT_ONCE if designers.calls_a_server(spec) else 1


DesignerT = TypeVar("DesignerT")


def prepared_or_made(
    designer: str | PreparedModel,
    make: Callable[[str], DesignerT],
    calls: CallOptions,
    store: Store,
) -> DesignerT | PreparedModel:
    """What a stage asks.

    Args:
        designer: its spec, or the model itself.
        make: makes those that answer at once.
        calls: the sampling.
        store: where the answers of a local model lie.
    """
    if not isinstance(designer, str):
        return designer
    model = designers.engine_model(designer)
    return make(designer) if model is None else PreparedModel(model, calls, Answers(store).get)


def shown_key(row: Row, column: str, max_pixels: int | None) -> str:
    """What stands for an image in the key of an answer: its hash and, where a model is not shown
    the file itself, what is made of it.

    Args:
        row: a record with the hash of its image in ``{column}_hash``.
        column: of the image.
        max_pixels: as ``CallOptions`` has it.
    """
    return f"{row[f'{column}_hash']} {sent_as(row[column], max_pixels)}".rstrip()


class Ask(Protocol[RequestT]):
    """The method of a designer or captioner that answers many requests."""

    def __call__(
        self, requests: Sequence[RequestT], /, *, on_answer: OnAnswer | None = None
    ) -> list[Reply]: ...


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
    replies: dict[str, Reply] = {}
    for key in keys:
        stored = answers.get(key) if answers else None
        if stored is not None:
            replies[key] = stored
    open_requests = {k: r for k, r in zip(keys, requests, strict=True) if k not in replies}
    open_keys = list(open_requests)
    # of equal requests the first record pays
    payers = dict(zip(reversed(keys), reversed(records or [""] * len(keys)), strict=True))

    def store(place: int, answer: str | Unusable) -> None:
        if answers is not None:
            key = open_keys[place]
            answers.add(key, answer, payers[key])

    if open_keys:
        fresh = ask(list(open_requests.values()), on_answer=store)
        replies.update(zip(open_keys, fresh, strict=True))
    return [replies[key] for key in keys]
