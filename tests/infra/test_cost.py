"""What a job costs: node hours by a table of prices, and what was paid for calls."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from infra import cost, runs
from infra.cost import NodeHours, NodeKind, counted_cost
from infra.tracking import Tracking, TrackingError
from pipelines.job import TrackingConfig

CPUS = NodeKind("", "", 0.0, 4.0)
GPUS = NodeKind("", "H100", 8.0, 96.0)
WORKERS = NodeKind("spot-workers", "", 0.0, 16.0)


def hours(*looks: tuple[float, list[NodeKind]]) -> NodeHours:
    counted = NodeHours()
    counted._looked = 0.0
    for now, nodes in looks:
        counted.add(nodes, now)
    return counted


def test_nodes_count_while_they_are_there() -> None:
    counted = hours((0, [CPUS]), (3600, [CPUS, GPUS]), (5400, [CPUS]), (7200, []), (9000, []))
    assert counted.metrics({}) == pytest.approx(
        {"cost/node_hours": 2.5, "cost/cpu_hours": 4 * 2 + 48, "cost/gpu_hours": 4.0}
    )


def test_a_cluster_that_is_reached_late_counts_from_the_beginning() -> None:
    assert hours((360, [CPUS])).metrics({})["cost/node_hours"] == pytest.approx(0.1)


def test_prices_are_of_groups_accelerators_and_cores() -> None:
    counted = hours((0, [CPUS, GPUS, WORKERS]), (3600, []))
    counted.calls_usd = 7.0
    found = counted.metrics({"cpu": 0.05, "H100": 3.0, "spot-workers": 0.3})
    assert found["cost/nodes_usd"] == pytest.approx(4 * 0.05 + 8 * 3 + 0.3)
    assert found["cost/total_usd"] == pytest.approx(4 * 0.05 + 8 * 3 + 0.3 + 7)
    assert found["cost/usd"] == 7.0


def test_no_sum_is_told_that_leaves_a_node_out() -> None:
    counted = hours((0, [CPUS, GPUS]), (3600, []))
    found = counted.metrics({"cpu": 0.05})
    assert "cost/nodes_usd" not in found and "cost/total_usd" not in found
    assert counted.unpriced({"cpu": 0.05}) == ["H100"]
    assert NodeKind("", "", 1.0, 4.0).name == "an unknown GPU"


def test_a_price_is_no_less_than_nothing() -> None:
    with pytest.raises(ValidationError, match=r"prices\.cpu"):
        TrackingConfig(prices={"cpu": -1.0})


def test_a_node_says_what_it_is() -> None:
    node = {
        "Labels": {"ray.io/node-group": "gpus"},
        "Resources": {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A100": 1.0},
    }
    assert cost._kind(node) == NodeKind("gpus", "A100", 2.0, 8.0)
    assert cost._kind({"Resources": {"CPU": 2.0}}) == NodeKind("", "", 0.0, 2.0)


@pytest.fixture
def tracking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    monkeypatch.setattr(cost, "_nodes", lambda: [CPUS])
    return Tracking(f"sqlite:///{tmp_path}/mlflow.db")


def test_a_run_has_its_cost_and_the_list_of_runs_shows_it(tracking: Tracking) -> None:
    with tracking.run("data edit") as run, counted_cost(run, {"cpu": 0.05}) as counted:
        counted.calls_usd = 2.5
        counted._looked -= 3600
    found = run.metrics()
    assert found["cost/nodes_usd"] == pytest.approx(0.2, rel=0.01)
    assert found["cost/total_usd"] == pytest.approx(2.7, rel=0.01)
    kept = tracking._client.get_run(run.id)
    assert kept.data.tags["cost.prices"] == '{"cpu": 0.05}'
    table = runs.list_table([kept], {})
    shown = {str(each.header): next(iter(each.cells)) for each in table.columns}
    assert shown["cost/total_usd"] == f"{found['cost/total_usd']:.4g}"


def test_a_run_that_failed_has_its_cost_too_and_one_that_goes_on_adds(tracking: Tracking) -> None:
    with (
        pytest.raises(RuntimeError, match="broken"),
        tracking.run("train") as run,
        counted_cost(run, {"cpu": 0.05}) as counted,
    ):
        counted._looked -= 3600
        raise RuntimeError("broken")
    assert run.metrics()["cost/node_hours"] == pytest.approx(1, rel=0.01)
    with (
        tracking.run("train", run_id=run.id) as again,
        counted_cost(again, {"cpu": 0.05}) as counted,
    ):
        counted._looked -= 7200
    assert again.metrics()["cost/node_hours"] == pytest.approx(3, rel=0.01)
    assert again.metrics()["cost/total_usd"] == pytest.approx(0.6, rel=0.01)


def test_what_has_no_price_is_named(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_nodes", lambda: [CPUS, GPUS])
    with tracking.run("train") as run, counted_cost(run, {"cpu": 0.05}):
        pass
    tags = tracking._client.get_run(run.id).data.tags
    assert tags["cost.unpriced"] == "H100"
    assert "cost/total_usd" not in run.metrics()


def test_a_tracker_that_is_gone_costs_no_output(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tracking.run("data edit") as run:

        def gone() -> dict[str, float]:
            raise TrackingError("MLflow cannot be read: it is gone")

        monkeypatch.setattr(run, "metrics", gone)
        with counted_cost(run, {}):
            pass
    assert "the cost is not logged: MLflow cannot be read" in caplog.text
