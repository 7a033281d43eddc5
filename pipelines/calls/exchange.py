"""One meter for all workers of a cluster that call the same server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError

from dim import designers
from dim.designers import CallOptions
from dim.designers.calls.chat import limits_of
from dim.designers.calls.meter import Grant, Limits, Meter, Settled, Want
from dim.records import sha256_hex
from infra.storage import Store
from pipelines.calls.bill import total_cost

_NAMESPACE = "dim-calls"


class SharedMeter:
    """Rates of one server, and the budget of every job that calls it. Runs as a Ray actor.

    The rates are those of the job that came last: a server has one limit, whoever calls.
    """

    def __init__(self) -> None:
        self._limits = Limits()
        self._rates = Meter(self._limits, time.monotonic())
        self._jobs: dict[str, Meter] = {}

    def open(self, job: str, limits: Limits, spent: float) -> None:
        """A job begins, or finds its meter gone; what it has under way goes on counting."""
        now = time.monotonic()
        rates = replace(limits, budget=None)
        if rates != self._limits:
            self._limits, self._rates = rates, Meter(rates, now)
        self._jobs[job] = Meter(Limits(budget=limits.budget), now, spent)

    def exchange(
        self, job: str, settled: Sequence[Settled], wants: Sequence[Want], hold_s: float
    ) -> list[Grant]:
        """As of :class:`dim.designers.calls.meter.Meter`; both money and time must be there."""
        now = time.monotonic()
        grants = self._jobs[job].exchange(settled, wants, now)
        paid = [want for want, grant in zip(wants, grants, strict=True) if grant.granted]
        turns = iter(self._rates.exchange(settled, paid, now, hold_s))
        return [next(turns) if grant.granted else grant for grant in grants]


@dataclass
class ClusterExchange:
    """The way to a :class:`SharedMeter` from any worker, as ``dim.designers.calls.gate`` takes it.

    The meter lives as long as somebody holds this. Should it die with its node, the next call
    makes a new one, which reads from the answers what the job has spent.
    """

    name: str
    limits: Limits
    store: Store
    meter: Any = None

    def open(self) -> None:
        """Make the meter, or join the one that is there.

        Raises:
            StorageError: what was spent cannot be read.
        """
        spent = total_cost(self.store).usd if self.limits.budget is not None else 0.0
        actor = ray.remote(SharedMeter).options(
            name=self.name, namespace=_NAMESPACE, get_if_exists=True, num_cpus=0
        )
        self.meter = actor.remote()
        ray.get(self.meter.open.remote(self.store.uri, self.limits, spent))

    async def __call__(
        self, settled: Sequence[Settled], wants: Sequence[Want], hold_s: float
    ) -> list[Grant]:
        """See :class:`dim.designers.calls.gate.Exchange`."""
        job, wanted = self.store.uri, list(wants)
        try:
            return await self.meter.exchange.remote(job, list(settled), wanted, hold_s)
        except RayActorError:
            await asyncio.to_thread(self.open)  # which reads all answers
            return await self.meter.exchange.remote(job, [], wanted, hold_s)


def share_meter(spec: str, calls: CallOptions, store: Store) -> ClusterExchange | None:
    """The meter of all workers that call the model ``spec``, where there is anything to keep to.

    Args:
        spec: of a designer or captioner.
        calls: its limits.
        store: the output folder of the job, whose answers say what was spent before.
    """
    limits = limits_of(calls)
    if not limits or not designers.calls_a_server(spec):
        return None
    shared = ClusterExchange(f"meter-{sha256_hex(spec.encode())[:16]}", limits, store)
    shared.open()
    return shared
