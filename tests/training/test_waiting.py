"""What ends a stage whose workers can never start, as Ray Train's controller calls it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from infra import capacity
from infra.capacity import CapacityError, ClusterState, Demand
from training.waiting import EndHopelessWait

DEMAND = Demand("stage edit2", 2, {"CPU": 8, "GPU": 1})
ANY: Any = None
SMALL, LARGE = ClusterState((("", {"CPU": 4.0}),)), ClusterState((("", {"CPU": 16.0, "GPU": 2.0}),))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ClusterState]]:
    """What the cluster is, the last one now; what Ray Train says is as before afterwards."""
    states = [SMALL]
    monkeypatch.setattr(capacity, "_state", lambda: states[-1])
    level = logging.getLogger("ray.train").level
    yield states
    logging.getLogger("ray.train").setLevel(level)


def test_workers_that_no_node_takes_are_waited_for_and_then_given_up(
    cluster: list[ClusterState],
) -> None:
    callback = EndHopelessWait(DEMAND, wait_s=0.3)
    callback.after_controller_start(ANY)
    with pytest.raises(CapacityError, match="stage edit2 wants 2 workers of {CPU: 8, GPU: 1}, and"):
        callback.before_controller_execute_resize_decision(ANY)
    callback.after_controller_state_update(ANY, ANY)  # what comes after it is Ray Train's


def test_workers_begin_as_soon_as_there_is_a_node(cluster: list[ClusterState]) -> None:
    callback = EndHopelessWait(DEMAND, wait_s=60)
    callback.after_controller_start(ANY)
    assert callback._watch.is_without_hope
    cluster.append(LARGE)
    callback.before_controller_execute_resize_decision(ANY)
    callback.after_controller_state_update(ANY, ANY)
    callback._error = CapacityError("the end of the look")


def test_a_stage_that_waits_for_a_group_ends_at_the_next_turn(cluster: list[ClusterState]) -> None:
    callback = EndHopelessWait(DEMAND, wait_s=0)
    callback.after_controller_start(ANY)
    with pytest.raises(CapacityError):
        callback.after_controller_state_update(ANY, ANY)
