"""Whether a cluster can come to have what a job's workers want, so that none waits for ever."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dim.errors import DimError

WAIT_S = 30.0
"""For nodes that may be on their way, where no autoscaler says that they are."""
_TIMEOUT_S = 10
_SOON_S, _LATER_S = 1.0, 10.0  # between two looks, while there is no hope and while there is

Resources = Mapping[str, float]
Kind = frozenset[tuple[str, float]]
"""What a worker asks for, as a key."""


class CapacityError(DimError):
    """No node has what a worker wants, and none will come that has."""


@dataclass(frozen=True)
class Demand:
    """What a job cannot do without.

    Attributes:
        who: whose workers they are, as one would say it.
        count: the fewest that it can work with.
        each: Ray's resources of a worker, such as ``{"CPU": 8, "GPU": 1}``.
        most: that it would take; 0: no more than ``count``.
    """

    who: str
    count: int
    each: Resources
    most: int = 0

    def __str__(self) -> str:
        workers = "a worker" if self.count == 1 else f"{self.count} workers"
        return f"{self.who} wants {workers} of {_in_words(self.each)}"


class Outlook(Enum):
    """What is to be expected of a cluster.

    ``ROOM``: its nodes have it, be it that others use it. ``COMING``: nodes that have it are on
    their way, or may be. ``NONE``: no node has it, and none that has will be started.
    ``UNKNOWN``: its autoscaler has not looked at the demand yet.
    """

    ROOM = "room"
    COMING = "coming"
    NONE = "none"
    UNKNOWN = "unknown"


class Watch:
    """Ends a wait that cannot end well.

    Args:
        wait_s: for how long there may be no hope.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._next_look = -math.inf
        self._since: dict[str, float] = {}  # there is no hope for whose workers

    def check(self, demands: Iterable[Demand]) -> None:
        """Ask the cluster, unless it was asked a moment ago.

        Raises:
            CapacityError: for ``wait_s`` there has been no hope for some; says what is missing.
        """
        now = time.monotonic()
        if now < self._next_look:
            return
        if (state := _state()) is not None:
            for each in demands:
                self._judge(each, state, now)
        pause = _SOON_S if self.is_without_hope else _LATER_S
        self._next_look = time.monotonic() + min(pause, self._wait_s)

    def _judge(self, demand: Demand, state: ClusterState, now: float) -> None:
        expected = outlook(demand, state)
        if expected in (Outlook.ROOM, Outlook.COMING):
            self._since.pop(demand.who, None)
            return
        if expected is Outlook.NONE:
            self._since.setdefault(demand.who, now)
        if now - self._since.get(demand.who, now) >= self._wait_s:
            raise CapacityError(explained(demand, state, self._wait_s))

    @property
    def is_without_hope(self) -> bool:
        """Whether somebody waits in vain, as things stand."""
        return bool(self._since)


@dataclass(frozen=True)
class ClusterState:
    """What Ray's control knows.

    Attributes:
        nodes: the resources of each that is alive, with the name of its group, if it has one.
        on_their_way: nodes that the autoscaler is starting.
        asked, refused: how many workers of each kind are waited for, alone, and of how many the
            autoscaler says that no node that it may start takes them.
        refused_together: what is asked for in each group that is to start together, of which the
            autoscaler says so. What elastic stages would take, of all jobs, is one such group.
        autoscaler: whether there is one that may start nodes.
        tells: whether it says what it refuses: Ray's first autoscaler does not.
    """

    nodes: tuple[tuple[str, Resources], ...]
    on_their_way: int = 0
    asked: Mapping[Kind, int] | None = None
    refused: Mapping[Kind, int] | None = None
    refused_together: tuple[frozenset[Kind], ...] = ()
    autoscaler: bool = False
    tells: bool = False


def outlook(demand: Demand, state: ClusterState) -> Outlook:
    """What a job may expect of a cluster."""
    if sum(_workers_on(node, demand.each) for _, node in state.nodes) >= demand.count:
        return Outlook.ROOM
    if not state.autoscaler:
        return Outlook.NONE
    if state.on_their_way or not state.tells:
        return Outlook.COMING
    kind = _kind(demand.each)
    if frozenset({kind}) in state.refused_together:
        return Outlook.NONE
    if any(kind in group for group in state.refused_together):
        return Outlook.UNKNOWN  # it may be somebody else's part that cannot be had
    asked, refused = (state.asked or {}).get(kind, 0), (state.refused or {}).get(kind, 0)
    if not asked:
        return Outlook.UNKNOWN
    return Outlook.NONE if refused >= asked else Outlook.COMING


def explained(demand: Demand, state: ClusterState, waited_s: float) -> str:
    """One sentence: who wants what, what is missing, and what there is."""
    lacking = [
        f"{name} {most:g} of {amount:g}" if most else name
        for name, amount in demand.each.items()
        if (most := max((node.get(name, 0) for _, node in state.nodes), default=0)) < amount
    ]
    fitting = sum(_workers_on(node, demand.each) for _, node in state.nodes)
    if lacking:
        missing = f"no node has {', '.join(lacking)}"
    elif fitting:
        missing = f"its nodes take {fitting} of them"
    else:
        missing = "no node has all of that"
    groups = Counter((group, _in_words(_shown(node))) for group, node in state.nodes)
    there = ", ".join(
        f"{count} x {group} {resources}".replace("  ", " ")
        for (group, resources), count in groups.most_common(5)
    )
    if not state.autoscaler:
        more = "no autoscaler adds any"
    elif demand.most > demand.count:
        more = f"its autoscaler cannot have all {demand.most} that it would take, and adds none"
    else:
        more = "its autoscaler has no kind of node that would do"
    return (
        f"{demand}, and {missing}; {more} (nodes: {there or 'none'}; waited {waited_s:.0f} s, "
        "nodes_wait_s)"
    )


def _state() -> ClusterState | None:
    """Of the cluster that this process is connected to; ``None`` while its control is away."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
        GetClusterStatusReply,
        NodeStatus,
    )
    from ray.exceptions import RayError

    address = ray.get_runtime_context().gcs_address
    try:
        status = GcsClient(address).get_cluster_status(timeout_s=_TIMEOUT_S)
    except RayError:
        return None
    reply = GetClusterStatusReply.FromString(status)
    cluster, scaling = reply.cluster_resource_state, reply.autoscaling_state
    nodes = tuple(
        (node.ray_node_type_name, dict(node.total_resources))
        for node in cluster.node_states
        if node.status != NodeStatus.DEAD
    )
    if not scaling.autoscaler_state_version:
        return ClusterState(nodes, autoscaler=_first_autoscaler_may_start_nodes())
    together = [_in_gang(gang) for gang in scaling.infeasible_gang_resource_requests] + [
        [counted.request for counted in constraint.resource_requests]
        for constraint in scaling.infeasible_cluster_resource_constraints
    ]
    asked: Counter[Kind] = Counter()
    for counted in cluster.pending_resource_requests:
        asked[_kind(counted.request.resources_bundle)] += counted.count
    starting = sum(each.count for each in scaling.pending_instance_requests)
    return ClusterState(
        nodes,
        on_their_way=starting + len(scaling.pending_instances),
        asked=asked,
        refused=Counter(
            _kind(each.resources_bundle) for each in scaling.infeasible_resource_requests
        ),
        refused_together=tuple(
            frozenset(_kind(each.resources_bundle) for each in group) for group in together
        ),
        autoscaler=True,
        tells=True,
    )


def _in_gang(gang: Any) -> list[Any]:
    """The requests of a placement group, as older and as newer Rays write them."""
    selected = [each for selector in gang.bundle_selectors for each in selector.resource_requests]
    return [*gang.requests, *selected]


def _first_autoscaler_may_start_nodes() -> bool:
    """Whether Ray's first autoscaler runs with a configuration, and not to watch alone.

    It watches every cluster that has no other, and then takes each node for a type of its own.
    """
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    report: dict[str, Any] = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}")
    types: Iterable[str] = (report.get("autoscaler_report") or {}).get("active_nodes") or ()
    return any(not name.startswith("node_") for name in types)


def _workers_on(node: Resources, each: Resources) -> int:
    """How many workers a node takes that nobody else uses."""
    shares = [node.get(name, 0) // amount for name, amount in each.items() if amount]
    return int(min(shares)) if shares else 2**31


def _kind(resources: Resources) -> Kind:
    """What Ray knows a demand by; a placement group's own marks left out."""
    return frozenset(
        (name, float(amount))
        for name, amount in resources.items()
        if amount and "_group_" not in name and name != "bundle"
    )


def _shown(node: Resources) -> dict[str, float]:
    """What distinguishes nodes: not their memory, nor the mark of each one."""
    return {
        name: amount
        for name, amount in node.items()
        if name not in ("memory", "object_store_memory") and not name.startswith("node:")
    }


def _in_words(resources: Resources) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in resources.items()) + "}"
