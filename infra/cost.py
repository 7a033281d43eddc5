"""What a job costs: hours of the cluster's nodes at the prices of a table, and calls to models."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from infra.tracking import Run, TrackingError

Prices = dict[str, Annotated[float, Field(ge=0)]]
"""US dollars an hour. A key is a group of nodes as the cluster's file calls it (a node of it), the
name of an accelerator as Ray does, such as ``H100`` (one of them), or ``cpu`` (a core)."""

TOTAL = "cost/total_usd"
"""The metric that `dim runs` shows: nodes and calls."""

NODES, CALLS = "cost/nodes_usd", "cost/usd"
HOURS = ("cost/node_hours", "cost/cpu_hours", "cost/gpu_hours")

_LOOK_S = 5.0
_GROUP, _ACCELERATOR = "ray.io/node-group", "ray.io/accelerator-type"


class NodeKind(NamedTuple):
    """What nodes are priced by: ``group`` and ``accelerator`` are empty where there are none."""

    group: str
    accelerator: str
    gpus: float
    cpus: float

    def price(self, prices: Mapping[str, float]) -> float | None:
        """Of an hour of such a node; ``None`` if the table has none for it."""
        if self.group in prices:
            return prices[self.group]
        if self.gpus:
            found = prices.get(self.accelerator)
            return None if found is None else found * self.gpus
        return prices["cpu"] * self.cpus if "cpu" in prices else None

    @property
    def name(self) -> str:
        """What a table of prices would call it."""
        return self.group or (self.accelerator or "an unknown GPU" if self.gpus else "cpu")


class NodeHours:
    """How long a cluster has had which nodes, as looked at now and then.

    Attributes:
        calls_usd: what was paid to models meanwhile, for whoever knows to say.
    """

    def __init__(self) -> None:
        self.calls_usd = 0.0
        self._seconds: dict[NodeKind, float] = {}
        self._before: Sequence[NodeKind] = ()
        self._looked = time.monotonic()
        self._lock = threading.Lock()

    def look(self) -> None:
        """Count the time since the last look for the nodes that are there now, or were then.

        Those of now, where there were none: Ray was reached in between.
        """
        nodes = _nodes()
        with self._lock:
            self.add(nodes, time.monotonic())

    def add(self, nodes: Sequence[NodeKind], now: float) -> None:
        """The same with ``nodes`` there at ``now``, in seconds of one monotonic clock."""
        passed, self._looked = now - self._looked, now
        for node in self._before or nodes:
            self._seconds[node] = self._seconds.get(node, 0.0) + passed
        self._before = nodes

    def metrics(self, prices: Mapping[str, float]) -> dict[str, float]:
        """What is known, by the name of the metric; dollars only where every node has a price."""
        with self._lock:
            hours = {kind: seconds / 3600 for kind, seconds in self._seconds.items()}
        each = (
            sum(hours.values()),
            sum(kind.cpus * found for kind, found in hours.items()),
            sum(kind.gpus * found for kind, found in hours.items()),
        )
        known = dict(zip(HOURS, each, strict=True))
        if self.calls_usd:
            known[CALLS] = self.calls_usd
        if prices and not self.unpriced(prices):
            known[NODES] = sum(found * (kind.price(prices) or 0.0) for kind, found in hours.items())
            known[TOTAL] = known[NODES] + self.calls_usd
        return known

    def unpriced(self, prices: Mapping[str, float]) -> list[str]:
        """The kinds of nodes that the table has no price for."""
        return sorted({kind.name for kind in list(self._seconds) if kind.price(prices) is None})


@contextmanager
def counted_cost(run: Run, prices: Mapping[str, float]) -> Iterator[NodeHours]:
    """Count the nodes inside, and log to ``run`` what they and the calls cost, however it ends.

    All nodes of the cluster count, whoever uses them: jobs that run side by side each have them.
    A run that goes on adds to what it had.
    """
    counted, stopped = NodeHours(), threading.Event()

    def watch() -> None:
        while not stopped.wait(_LOOK_S):
            counted.look()

    thread = threading.Thread(target=watch, name="cost", daemon=True)
    thread.start()
    try:
        yield counted
    finally:
        stopped.set()
        thread.join()
        counted.look()
        try:
            _log(run, counted, prices)
        except TrackingError as error:  # what was made stands, and its own error says more
            logging.getLogger(__name__).warning("the cost is not logged: %s", error)


def _log(run: Run, counted: NodeHours, prices: Mapping[str, float]) -> None:
    found, before = counted.metrics(prices), run.metrics()
    for name in (*HOURS, NODES):
        if name in found:
            found[name] += before.get(name, 0.0)
    if NODES in found:
        found[TOTAL] = found[NODES] + counted.calls_usd
    run.log_metrics(found)
    if prices:
        run.set_tags({"cost.prices": json.dumps(dict(prices), sort_keys=True)})
    if prices and (missing := counted.unpriced(prices)):
        run.set_tags({"cost.unpriced": ", ".join(missing)})


def _nodes() -> list[NodeKind]:
    """The nodes of the cluster that this process is connected to; none if it is to none."""
    import ray
    from ray.exceptions import RayError

    try:
        return [_kind(node) for node in ray.nodes() if node["Alive"]]
    except RayError:  # it is left, or was never reached
        return []


def _kind(node: Mapping[str, Any]) -> NodeKind:
    labels, resources = node.get("Labels") or {}, node.get("Resources") or {}
    return NodeKind(
        group=labels.get(_GROUP, ""),
        accelerator=labels.get(_ACCELERATOR, "") or _accelerator(resources),
        gpus=float(resources.get("GPU", 0)),
        cpus=float(resources.get("CPU", 0)),
    )


def _accelerator(resources: Mapping[str, float]) -> str:
    prefix = "accelerator_type:"
    return next((n.removeprefix(prefix) for n in resources if n.startswith(prefix)), "")
