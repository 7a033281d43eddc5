"""Whether a demand that can never be met is told from one that waits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from infra import capacity
from infra.capacity import (
    CapacityError,
    ClusterState,
    Demand,
    Kind,
    Outlook,
    Watch,
    explained,
    outlook,
)

HEAD = ("head", {"CPU": 4.0, "memory": 1e9, "node:10.0.0.1": 1.0})
GPUS = ("training-gpu", {"CPU": 16.0, "GPU": 2.0})
WORKERS = Demand("features", 2, {"CPU": 8, "GPU": 1})
KIND: Kind = frozenset({("CPU", 8.0), ("GPU", 1.0)})
OTHERS: Kind = frozenset({("CPU", 99.0)})


def scaling(
    asked: int = 0, refused: int = 0, on_their_way: int = 0, together: tuple[Kind, ...] = ()
) -> ClusterState:
    """What an autoscaler says that begins with a head alone."""
    counts: tuple[Mapping[Kind, int], ...] = (
        {KIND: asked},
        {KIND: refused},
    )
    return ClusterState(
        (HEAD,), on_their_way, *counts, (frozenset(together),) if together else (), True, True
    )


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (ClusterState((HEAD, GPUS)), Outlook.ROOM),
        (ClusterState((HEAD, GPUS, GPUS)), Outlook.ROOM),
        (ClusterState((HEAD,)), Outlook.NONE),
        (ClusterState(()), Outlook.NONE),
        # Each alone is there, and no node has both.
        (ClusterState((("a", {"CPU": 16.0}), ("b", {"GPU": 8.0, "CPU": 1.0}))), Outlook.NONE),
        # One of two workers has room.
        (ClusterState((("gpu", {"CPU": 8.0, "GPU": 8.0}),)), Outlook.NONE),
        (ClusterState((HEAD,), autoscaler=True), Outlook.COMING),  # it does not tell
        (scaling(), Outlook.UNKNOWN),
        (scaling(asked=2), Outlook.COMING),
        (scaling(asked=4, refused=2), Outlook.COMING),  # more than its nodes may be
        (scaling(asked=2, refused=2), Outlook.NONE),
        (scaling(asked=2, refused=2, on_their_way=1), Outlook.COMING),
        (scaling(together=(KIND,)), Outlook.NONE),
        (scaling(together=(KIND, OTHERS)), Outlook.UNKNOWN),
        (scaling(asked=2, together=(OTHERS,)), Outlook.COMING),
    ],
)
def test_what_a_job_may_expect(state: ClusterState, expected: Outlook) -> None:
    assert outlook(WORKERS, state) is expected


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        (
            ClusterState((HEAD, HEAD)),
            "features wants 2 workers of {CPU: 8, GPU: 1}, and no node has CPU 4 of 8, GPU; no "
            "autoscaler adds any (nodes: 2 x head {CPU: 4}; waited 0 s, nodes_wait_s)",
        ),
        (
            ClusterState((("", {"CPU": 8.0, "GPU": 8.0}),)),
            "features wants 2 workers of {CPU: 8, GPU: 1}, and its nodes take 1 of them; no "
            "autoscaler adds any (nodes: 1 x {CPU: 8, GPU: 8}; waited 0 s, nodes_wait_s)",
        ),
        (
            scaling(asked=2, refused=2),
            "features wants 2 workers of {CPU: 8, GPU: 1}, and no node has CPU 4 of 8, GPU; its "
            "autoscaler has no kind of node that would do (nodes: 1 x head {CPU: 4}; waited 0 s, "
            "nodes_wait_s)",
        ),
    ],
)
def test_one_sentence_says_what_is_missing(
    state: ClusterState, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capacity, "_state", lambda: state)
    with pytest.raises(CapacityError) as error:
        Watch(0).check([WORKERS])
    assert str(error.value) == sentence


def test_who_would_take_more_than_there_can_be_is_told_so() -> None:
    elastic = Demand("stage t2i", 1, WORKERS.each, most=8)
    said = explained(elastic, scaling(together=(KIND,)), 45)
    assert "its autoscaler cannot have all 8 that it would take, and adds none" in said


def test_only_a_wait_without_any_hope_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(capacity.time, "monotonic", lambda: clock[0])
    seen: list[ClusterState | None] = []
    monkeypatch.setattr(capacity, "_state", lambda: seen[-1])
    watch = Watch(30)

    def look(at: float, state: ClusterState | None) -> bool:
        clock[0] = at
        seen.append(state)
        watch.check([WORKERS])
        return watch.is_without_hope

    refused = scaling(asked=2, refused=2)
    assert look(0, refused)
    assert look(20, scaling(asked=2, on_their_way=1)) is False  # hope, and so it begins anew
    assert look(40, refused)
    assert look(60, None) and look(65, scaling())  # nobody knows: neither hope nor its end
    with pytest.raises(CapacityError):
        look(71, refused)


def test_the_cluster_is_not_asked_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def state() -> ClusterState:
        asked.append(1)
        return ClusterState((HEAD, GPUS))

    monkeypatch.setattr(capacity, "_state", state)
    watch = Watch(30)
    for _ in range(50):
        watch.check([WORKERS])
    assert len(asked) == 1
