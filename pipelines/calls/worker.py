"""A worker of a job that asks a model: it holds the model, and its steps ask it in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from pipelines.calls.answers import Answers
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
    """

    spec: str
    create: Callable[..., Any]
    calls: CallOptions
    store: Store
    exchange: Exchange | None = None

    @classmethod
    def metered(
        cls, spec: str, create: Callable[..., Any], calls: CallOptions, store: Store
    ) -> CalledModel:
        """The model with the meter of all workers, made here where there is anything to keep to."""
        return cls(spec, create, calls, store, share_meter(spec, calls, store))

    def open(self) -> tuple[Any, Answers | None]:
        """Who answers, and where the answers are kept if they are worth it.

        A local model is not loaded: its answers were made beforehand, and are looked up.
        """
        local = designers.engine_model(self.spec)
        if local is not None:
            return PreparedModel(local, self.calls, Answers(self.store).get), None
        model = self.create(self.spec, calls=self.calls, exchange=self.exchange)
        return model, Answers(self.store) if model.costly else None


class AskInTurn:
    """The steps of a job that ask one model, one after another on each batch.

    They share a process, so that the model is there once, its limits hold for all steps together,
    and no picture goes through Ray's object store on the way from one to the next.

    Args:
        steps: make the stages, in order.
        open_model: gives who is asked and the answers that are kept.
    """

    def __init__(
        self, steps: Sequence[Step], open_model: Callable[[], tuple[Any, Answers | None]]
    ) -> None:
        stop_after_restarts()
        model, answers = open_model()
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
