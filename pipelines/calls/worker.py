"""A worker of a job that asks a model: it holds the model, and its steps ask it in turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from dim import designers
from dim.designers import CallOptions
from dim.designers.calls.gate import Exchange
from dim.designers.prepared import PreparedModel
from infra.storage import Store
from infra.tracing import span
from pipelines.attempts import given_up, is_given_up, stop_after_restarts
from pipelines.calls.answers import Answers, Earlier, gather_earlier
from pipelines.calls.exchange import share_meter
from pipelines.outcome import failed

_BATCHES_AT_ONCE = 3

Stage = Callable[[pa.Table], pa.Table]
Step = Callable[[Any, Answers | None], Stage]
"""Makes a stage of the designer or captioner that it asks and the answers that are kept."""


@dataclass(frozen=True)
class CalledModel:
    """The model that a job asks, as each of its workers opens it.

    Attributes:
        spec: of a designer or captioner.
        create: makes one: ``dim.designers.create`` or ``create_captioner``.
        calls: how it is called, if over HTTP.
        store: the job's output folder, where answers that were paid for are kept.
        exchange: the meter of all workers, where calls have a limit.
        earlier: answers that are kept for none of the ranges that there are now.
    """

    spec: str
    create: Callable[..., Any]
    calls: CallOptions
    store: Store
    exchange: Exchange | None = None
    earlier: Earlier | None = None

    @classmethod
    def metered(
        cls,
        spec: str,
        create: Callable[..., Any],
        calls: CallOptions,
        store: Store,
        ranges: Collection[str],
    ) -> CalledModel:
        """The model with the meter of all workers, made here where there is anything to keep to.

        ``ranges`` are the names of all ranges that there are.
        """
        exchange, earlier = share_meter(spec, calls, store), gather_earlier(store, ranges)
        return cls(designers.from_anywhere(spec), create, calls, store, exchange, earlier)

    def answers(self, name: str) -> Answers:
        """Those that are kept about a range."""
        return Answers(self.store, name, self.earlier)


class AskingWorker:
    """A process that asks a model about one range after another, or about several at a time.

    A local model is not loaded: its answers were made beforehand, and are looked up.

    Args:
        steps: as of :class:`AskInTurn`.
        called: the model.
    """

    def __init__(self, steps: Sequence[Step], called: CalledModel) -> None:
        stop_after_restarts()
        self._steps, self._called = steps, called
        self._local = designers.engine_model(called.spec)
        if self._local is None:
            self._model = called.create(called.spec, calls=called.calls, exchange=called.exchange)

    @contextmanager
    def of_range(self, name: str) -> Iterator[AskInTurn]:
        """The steps for the records of a range; at the end all answers about it are stored."""
        if self._local is None and not self._model.costly:
            yield AskInTurn(self._steps, self._model, None)
            return
        with self._called.answers(name) as kept:
            if self._local is None:
                yield AskInTurn(self._steps, self._model, kept)
            else:
                prepared = PreparedModel(self._local, self._called.calls, kept.get)
                yield AskInTurn(self._steps, prepared, None)


class AskInTurn:
    """The steps of a job that ask one model, one after another on each batch.

    They share a process, so that the model is there once, its limits hold for all steps together,
    and no picture goes through Ray's object store on the way from one to the next.

    Args:
        steps: make the stages, in order.
        model: who is asked.
        answers: where the answers are kept; ``None`` keeps none.
    """

    def __init__(self, steps: Sequence[Step], model: Any, answers: Answers | None) -> None:
        self._stages = [step(model, answers) for step in steps]

    def __call__(self, batch: pa.Table) -> pa.Table:
        """What the stages make of a batch; safe for several threads, as the stages are."""
        if is_given_up():
            rows = failed(batch, "ask", given_up())
            batch = pa.Table.from_pylist(rows, schema=batch.schema)
        for stage in self._stages:
            with span(type(stage).__name__, records=batch.num_rows):
                batch = stage(batch)
        return batch


def batches_at_once(spec: str) -> int:
    """How many ranges a worker that asks ``spec`` works on, a batch of each: while one waits for
    its last answer, the others keep the server busy. Calls in flight are counted over all."""
    return _BATCHES_AT_ONCE if designers.calls_a_server(spec) else 1
