"""A driver and a node that are really killed: the run goes on, no step is lost or done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
import ray._private.worker
import torch
import yaml
from ray.cluster_utils import Cluster
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)

from dim import model
from dim.config import dump_config
from infra.tracking import Tracking
from tests.conftest import ROOT
from tests.feature_shards import write_features
from training import loop, train
from training.loop import train_loop_per_worker
from training.owner import OutputTakenError
from training.plan import Plan, measure
from training.stage import StageConfig

ROWS, BATCH = 20, 4
EPOCH = ROWS // BATCH  # steps
PATIENCE_S = 120.0

MakeStage = Callable[..., StageConfig]
Undisturbed = Callable[[StageConfig], tuple[torch.Tensor, str]]


@pytest.fixture(scope="module")
def features(edit_data: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Features that do not depend on which samples are encoded together."""
    return write_features(edit_data, tmp_path_factory.mktemp("features"), tiny_model_dir)


@pytest.fixture
def make_stage(features: str, tiny_model_dir: Path, tracking_uri: str, tmp_path: Path) -> MakeStage:
    """``make_stage("name", key=value, …)``: a stage that writes to a folder of that name."""

    def make(name: str, **settings: Any) -> StageConfig:
        values = {
            "stage": "edit2",
            "init": str(tiny_model_dir),
            "data": [features],
            "out": str(tmp_path / name),
            "batch_size": BATCH,
            "learning_rate": 1e-3,
            "ema_decay": 0.9,
            "log_every": 1,
            "registry": None,
            "tracking": {"uri": tracking_uri, "experiment": "test"},
        }
        return StageConfig.model_validate(values | settings)

    return make


@pytest.fixture
def undisturbed(alone: Any) -> Undisturbed:
    """Trains a stage in this process, as the only worker: its weights, and its MLflow run's id."""

    def run(config: StageConfig) -> tuple[torch.Tensor, str]:
        alone.folder = Path(config.out) / "checkpoints"
        steps, rows = measure(config)
        uri = str(config.tracking.uri)
        with Tracking(uri, "test").run(config.stage) as run:
            plan = Plan(config=config, steps=steps, rows=rows, tracking_uri=uri, run_id=run.id)
            assert train_loop_per_worker(dump_config(plan))["error"] is None
        return weights_of(config), run.id

    return run


def weights_of(config: StageConfig) -> torch.Tensor:
    saved = model.load(Path(config.out) / "model")
    parts = (*saved.connector.parameters(), *saved.painter.parameters())
    return torch.cat([part.detach().flatten() for part in parts])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def wait_until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def when(sign: Path, act: Callable[[], object]) -> None:
    wait_until(sign.exists)
    act()


def saved(out: Path, name: str) -> Callable[[], bool]:
    """Tells whether the checkpoint is there that a run would go on from."""
    return (out / "checkpoints" / name / "manifest.json").exists


def loop_that_waits(
    step: int, is_saved: Callable[[], bool], out: Path, node: str
) -> Callable[[dict[str, Any]], Any]:
    """The training loop that writes down the rows of each step, and stops once on ``node``.

    It does so before ``step``, when an earlier checkpoint ``is_saved``; what then happens ends it.
    """

    def train_loop(config: dict[str, Any]) -> Any:
        from training import loop

        update, begun = loop.update, time.time_ns()

        def noted(worker: Any, number: int) -> Any:
            here = ray.get_runtime_context().get_node_id()
            if here == node and number == step and not (out / "now").exists():
                while not is_saved():
                    time.sleep(0.05)
                (out / "now").touch()
                time.sleep(PATIENCE_S)
            done = update(worker, number)
            order = worker.feed._order
            rows = order.rows[order.at(number).positions()].tolist()
            taken = {"begun": begun, "step": number, "rows": rows, "on": here}
            with (out / f"taken-{worker.rank}-{os.getpid()}").open("a") as file:
                file.write(json.dumps(taken) + "\n")
            return done

        loop.update = noted
        return loop.train_loop_per_worker(config)

    return train_loop


@dataclass
class SecondNode:
    """A node beside the first one of the tests' own Ray, and as large."""

    cluster: Cluster
    node: Any = None

    def join(self) -> str:
        """Its id, when workers may be started on it."""
        coordinator = get_or_create_autoscaling_coordinator()
        self.node = self.cluster.add_node(num_cpus=8)
        # What decides how many workers there can be looks at the nodes only every 20 seconds.
        ray.get(coordinator._tick.remote())
        return str(self.node.node_id)

    def kill(self) -> None:
        if self.node in self.cluster.worker_nodes:
            self.cluster.remove_node(self.node, allow_graceful=False)


@pytest.fixture
def second_node(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[SecondNode]:
    """A node that is not there yet."""
    # Ray Train's own times are meant for large clusters.
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3")
    cluster = Cluster(shutdown_at_exit=False)  # it ends with the test
    cluster.head_node = ray._private.worker._global_node
    second = SecondNode(cluster)
    yield second
    second.kill()


def rows_by_step(out: Path) -> dict[int, list[int]]:
    """The rows of each step that counts; one that was made again had the same.

    Of two attempts, what the second made counts, and what the first had made before.
    """
    lines = [line for file in out.glob("taken-*") for line in file.read_text().splitlines()]
    ended = (out / "now").stat().st_mtime_ns
    first: dict[int, list[int]] = defaultdict(list)
    second: dict[int, list[int]] = defaultdict(list)
    for taken in map(json.loads, lines):
        attempt = first if taken["begun"] < ended else second
        attempt[taken["step"]] += taken["rows"]
    again = first.keys() & second.keys()
    assert again and all(sorted(first[step]) == sorted(second[step]) for step in again)
    return first | second


def assert_each_epoch_is_whole(rows: dict[int, list[int]], epochs: int) -> None:
    """No sample twice in an epoch, and none missing."""
    for epoch in range(epochs):
        taken = [row for step in range(EPOCH) for row in rows[epoch * EPOCH + step]]
        assert sorted(taken) == list(range(ROWS))


def losses_of(tracking_uri: str, run_id: str) -> dict[int, float]:
    history = mlflow.MlflowClient(tracking_uri).get_metric_history(run_id, "loss")
    latest = sorted(history, key=lambda metric: metric.timestamp)  # a step may be made twice
    return {metric.step: metric.value for metric in latest}


@pytest.mark.slow
def test_a_run_goes_on_with_one_worker_when_the_other_one_s_node_is_lost(
    make_stage: MakeStage,
    undisturbed: Undisturbed,
    second_node: SecondNode,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"steps": 3 * EPOCH, "checkpoint_every": 3}
    out, node = tmp_path / "elastic", second_node.join()
    out.mkdir()
    waiting = loop_that_waits(7, saved(out, "step-00000006"), out, node)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_loop_per_worker", waiting)
        elastic = make_stage(
            "elastic", workers=[1, 2], cpus_per_worker=8, max_failures=1, **settings
        )
        threading.Thread(target=when, args=(out / "now", second_node.kill)).start()
        said: list[str] = []
        result = train.run(elastic, on_progress=lambda lines, metrics: said.extend(lines))
    assert any("resumed after step 6 of 15" in line for line in said)
    assert_each_epoch_is_whole(rows_by_step(out), epochs=3)

    # And no step lost or made twice, which would show: the tolerance is a hundredth of its trace.
    expected, run_id = undisturbed(make_stage("alone", **settings))
    losses = losses_of(tracking_uri, run_id)
    assert losses_of(tracking_uri, result.mlflow_run_id) == pytest.approx(losses, rel=1e-4)
    assert apart(weights_of(elastic), expected) < 1e-5
    update = loop.update
    monkeypatch.setattr(loop, "check_updates", lambda state, steps: None)  # which would tell, too
    for times in (0, 2):

        def wrong(worker: Any, step: int, times: int = times) -> Any:
            made = torch.zeros(()), torch.zeros(())
            for _ in range(times if step == 7 else 1):
                made = update(worker, step)
            worker.state.step = step + 1
            return made

        monkeypatch.setattr(loop, "update", wrong)
        weights, _ = undisturbed(make_stage(f"{times} times", **settings))
        assert apart(weights, expected) > 1e-3


@pytest.mark.slow
def test_a_run_goes_on_with_two_workers_when_a_node_joins(
    make_stage: MakeStage,
    undisturbed: Undisturbed,
    second_node: SecondNode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"steps": 2 * EPOCH, "checkpoint_every": 3}
    out, first = tmp_path / "growing", ray.get_runtime_context().get_node_id()
    out.mkdir()
    waiting = loop_that_waits(4, saved(out, "step-00000003"), out, first)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_loop_per_worker", waiting)
        growing = make_stage(
            "growing", workers=[1, 2], resize_interval_s=0.5, cpus_per_worker=8, **settings
        )
        threading.Thread(target=when, args=(out / "now", second_node.join)).start()
        said: list[str] = []
        train.run(growing, on_progress=lambda lines, metrics: said.extend(lines))
    assert any("resumed after step 3 of 10" in line for line in said)
    rows = rows_by_step(out)
    assert_each_epoch_is_whole(rows, epochs=2)
    steps = [json.loads(line) for file in out.glob("taken-*") for line in file.open()]
    for number in range(2 * EPOCH):
        nodes = {taken["on"] for taken in steps if taken["step"] == number}
        assert first in nodes and len(nodes) == (1 if number < 3 else 2)
    expected, _ = undisturbed(make_stage("alone", **settings))
    assert apart(weights_of(growing), expected) < 1e-5


@pytest.mark.slow
def test_the_same_command_goes_on_after_its_driver_was_killed(
    ray_cluster: None, make_stage: MakeStage, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    settings = {"steps": 60, "checkpoint_every": 5}
    stage, file = make_stage("out", **settings), tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(dump_config(stage)))
    command = [sys.executable, "-m", "training.train", str(file)]
    address = ray.get_runtime_context().gcs_address
    is_saved = saved(tmp_path / "out", "step-00000005")
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"RAY_ADDRESS": address}) as driver:
        wait_until(lambda: driver.poll() is not None or (tmp_path / "out" / "owner.json").exists())
        # Nobody else may begin meanwhile, and nobody may discard it.
        for fresh in (False, True):
            with pytest.raises(OutputTakenError, match=f"trained into by process {driver.pid} on"):
                train.run(stage, fresh=fresh)
        wait_until(lambda: driver.poll() is not None or is_saved())
        driver.send_signal(signal.SIGKILL)
    assert driver.returncode == -signal.SIGKILL
    said: list[str] = []
    result = train.run(stage, on_progress=lambda lines, metrics: said.extend(lines))
    assert any("which is dead: taking over" in line for line in said)
    assert any("resumed after step " in line for line in said)
    expected, _ = undisturbed(make_stage("alone", **settings))
    assert torch.equal(weights_of(stage), expected)
    assert result.metrics["progress"] == 1
