from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from dim.model.config import ModelConfig
from infra.tracking import TrackingError
from training import log as training_log
from training.breakdown import Breakdown
from training.log import SAID, RunLog, StepLog
from training.plan import Plan
from training.stage import StageConfig
from training.throughput import Throughput


class Store:
    """Stands in for an MLflow run that can be away for a while."""

    id = "run-1"

    def __init__(self) -> None:
        self.away = False
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.tags: dict[str, str] = {}
        self.figures: list[str] = []

    def log_metric_rows(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        self._check()
        self.rows += rows

    def set_tags(self, tags: dict[str, str]) -> None:
        self._check()
        self.tags |= tags

    def log_figure(self, image: Image.Image, name: str) -> None:
        self._check()
        self.figures.append(name)

    def _check(self) -> None:
        if self.away:
            raise TrackingError("MLflow at there cannot log")


@pytest.fixture
def store() -> Any:
    return Store()


def test_rows_wait_until_the_tracker_is_back(store: Any, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog(store)
    store.away = True
    log.add(1, {"loss": 1.0})
    log.flush()
    log.add(2, {"loss": 0.5})
    log.flush()
    log.picture(Image.new("RGB", (2, 2)), "a.png")
    assert store.rows == []
    assert capfd.readouterr().out.count("training goes on, metrics are kept") == 1
    store.away = False
    log.flush()
    assert store.rows == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]


def test_a_tracker_that_stays_away_is_an_error_in_the_end(store: Any) -> None:
    log = RunLog(store)
    log.add(1, {"loss": 1.0})
    store.away = True
    with pytest.raises(TrackingError):
        log.close()
    store.away = False
    log.close()
    assert store.rows == [(1, {"loss": 1.0})]


def test_the_last_lines_said_are_a_tag(store: Any) -> None:
    log = RunLog(store)
    for number in range(30):
        log.say(f"line {number}\nand more")
    lines = store.tags[SAID].splitlines()
    assert len(lines) == 20 and lines[-2].endswith("line 29") and lines[-1].endswith("and more")


def test_other_ranks_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog(None)
    log.add(1, {"loss": 1.0})
    log.say("nothing")
    log.picture(Image.new("RGB", (2, 2)), "a.png")
    log.close()
    assert capfd.readouterr().out == ""


def steps_of(log: RunLog) -> StepLog:
    config = StageConfig(
        stage="edit1", init="m", data=["d"], out="o", steps=40, batch_size=8, learning_rate=2
    )
    plan = Plan(config=config, steps=40, rows=80, tracking_uri="", run_id="")
    device = torch.device("cpu")
    throughput = Throughput(plan, ModelConfig(), device, live=False)
    return StepLog(log, plan, device, Breakdown([], device), throughput)


def test_memory_is_what_the_process_has_held() -> None:
    held = torch.ones(50_000_000)  # 200 MB
    most = training_log._most_memory(torch.device("cpu"))
    assert held.nbytes < most < 64e9


def test_losses_are_averaged_and_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(training_log.time, "perf_counter", lambda: now)
    monkeypatch.setattr(training_log, "_most_memory", lambda device: 3e9)
    steps = steps_of(RunLog(None))
    steps.add(torch.tensor(1.0), torch.tensor(0.1), waited=0.5)
    steps.add(torch.tensor(2.0), torch.tensor(0.25), waited=0.5)
    now = 104.0
    assert steps.read(20) == {
        "loss": 1.5,
        "samples_per_second": 2 * 8 / 4.0,
        "tokens_per_second": 0.0,
        "learning_rate": 2.0,
        "grad_norm": 0.25,
        "data_wait": 0.25,
        "memory_gb": 3.0,
        "epoch": 2.0,
        "progress": 0.5,
    }
    steps.add(torch.tensor(5.0), torch.tensor(0.5))
    read = steps.read(21)
    assert read["loss"] == 5.0 and read["data_wait"] == 0
    steps.add(torch.tensor(7.0), torch.tensor(0.5))
    now = 1000.0
    steps.restart()
    steps.add(torch.tensor(9.0), torch.tensor(0.5))
    now = 1001.0
    with steps.aside():  # validation, or a checkpoint
        now = 2000.0
    steps.add(torch.tensor(11.0), torch.tensor(0.5))
    now = 2001.0
    read = steps.read(22)
    assert read["loss"] == 10.0 and read["samples_per_second"] == 8.0
    nothing = torch.tensor(float("nan"))
    steps.add(nothing, nothing, skipped=True)
    steps.add(torch.tensor(4.0), torch.tensor(0.5))
    assert steps.read(24)["loss"] == 4.0
    steps.add(nothing, nothing, skipped=True)
    assert math.isnan(steps.read(25)["loss"])


def test_steps_are_said_now_and_then_and_in_the_end(
    store: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now)
    log = RunLog(store)
    steps = steps_of(log)
    metrics = {"loss": 0.5, "samples_per_second": 4.0}
    for done, seconds in ((10, 1.0), (11, 15.5), (12, 16.0), (40, 17.0)):
        now = seconds
        steps.write(done, metrics)
    assert capfd.readouterr().out.splitlines() == [
        "edit1 step 11/40: loss 0.5000, 4 samples/s, 1.0 minutes left",
        "edit1 step 40/40: loss 0.5000, 4 samples/s, 0.0 minutes left",
    ]
    log.flush()
    assert [step for step, _ in store.rows] == [10, 11, 12, 40]


def test_what_validation_found_is_noted_and_said(
    store: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(store)
    found = {"validation_loss": 0.25, "validation_exact": 1.0}
    log.validation(7, found, Image.new("RGB", (2, 2)))
    log.close()
    assert store.rows == [(7, found)] and store.figures == ["validation/step-00000007.png"]
    assert capfd.readouterr().out == "validation after step 7: loss 0.250, exact 1.000\n"
