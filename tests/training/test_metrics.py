from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dim import model as models
from dim.gpus import GPUS
from dim.learning.batch import draw
from dim.model.config import ModelConfig
from dim.model.flow import LEVELS, quartile_of
from training import metrics
from training.estimate import sample_flops
from training.log import RunLog
from training.metrics import Breakdown, StepLog, Throughput
from training.plan import Plan
from training.stage import StageConfig

CPU = torch.device("cpu")


def steps_of(log: RunLog) -> StepLog:
    config = StageConfig(
        stage="edit1", init="m", data=["d"], out="o", steps=40, batch_size=8, learning_rate=2
    )
    plan = Plan(config=config, steps=40, rows=80, tracking_uri="", run_id="")
    return StepLog(log, plan, ModelConfig(), CPU, live=False)


def rows_of(*rows: tuple[float, bool, int, int]) -> tuple[torch.Tensor, ...]:
    """Losses, whether they count, places in the table and sources, a row each."""
    losses, counted, index, source = zip(*rows, strict=True)
    kinds = (torch.float32, torch.bool, torch.int64, torch.int64)
    return tuple(
        torch.tensor(values, dtype=kind)
        for values, kind in zip((losses, counted, index, source), kinds, strict=True)
    )


def test_memory_is_what_the_process_has_held() -> None:
    held = torch.ones(50_000_000)  # 200 MB
    most = metrics._most_memory(CPU)
    assert held.nbytes < most < 64e9


def test_losses_are_averaged_and_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    monkeypatch.setattr(metrics, "_most_memory", lambda device: 3e9)
    steps = steps_of(RunLog(None))
    mask = torch.ones(2, 8, dtype=torch.bool)
    steps.add_pass(*rows_of((1.0, True, 0, 0), (9.0, False, 999, 0)), mask)
    steps.add(torch.tensor(1.0), torch.tensor(0.1), waited=0.5)
    steps.add(torch.tensor(2.0), torch.tensor(0.25), waited=0.5)
    now = 104.0
    assert steps.read(20) == {
        "loss": 1.5,
        "loss/sigma_q1": 1.0,
        "samples_per_second": 2 * 8 / 4.0,
        "tokens_per_second": 8 / 4.0,
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
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now)
    log = RunLog(store)
    steps = steps_of(log)
    for done, seconds in ((10, 1.0), (11, 15.5), (12, 16.0), (40, 17.0)):
        now = seconds
        steps.write(done, {"loss": 0.5, "samples_per_second": 4.0})
    assert capfd.readouterr().out.splitlines() == [
        "edit1 step 11/40: loss 0.5000, 4 samples/s, 1.0 minutes left",
        "edit1 step 40/40: loss 0.5000, 4 samples/s, 0.0 minutes left",
    ]
    log.flush()
    assert [step for step, _ in store.rows] == [10, 11, 12, 40]


def test_losses_are_averaged_by_source_and_by_quartile() -> None:
    parts = Breakdown(["photos", "drawings", "nothing"], CPU)
    parts.add(*rows_of((1.0, True, 0, 0), (2.0, True, 337, 1), (50.0, False, 999, 2)))
    parts.add(*rows_of((6.0, True, 999, 0)))
    parts.end_step(skipped=False)
    parts.add(*rows_of((5.0, True, 499, 1)))
    parts.end_step(skipped=False)
    parts.add(*rows_of((math.nan, True, 500, 2), (1.0, True, 0, 0)))
    parts.end_step(skipped=True)
    assert parts.read() == {
        "loss/photos": 3.5,
        "loss/drawings": 3.5,
        "loss/sigma_q1": 1.5,
        "loss/sigma_q2": 5.0,
        "loss/sigma_q4": 6.0,
    }
    assert parts.read() == {}
    parts.add(*rows_of((3.0, True, 500, 2)))
    parts.restart()
    parts.end_step(skipped=False)
    assert parts.read() == {}


def test_a_single_source_has_no_loss_of_its_own() -> None:
    parts = Breakdown(["photos"], CPU)
    parts.add(*rows_of((1.0, True, 662, 0)))
    parts.end_step(skipped=False)
    assert parts.read() == {"loss/sigma_q4": 1.0}


def test_each_quartile_has_a_quarter_of_the_draws() -> None:
    index = draw(0, 0, range(20_000), (1, 1, 1), dropout=0.0).index
    shares = np.bincount(quartile_of(index).numpy(), minlength=4) / len(index)
    assert shares == pytest.approx([0.25] * 4, abs=0.01)
    every = quartile_of(torch.arange(LEVELS))
    assert np.bincount(every.numpy()).tolist() == [338, 162, 162, 338]
    assert torch.equal(every, every.sort().values)


def plan_of(**changes: Any) -> Plan:
    values = {"stage": "edit1", "init": "m", "data": ["d"], "out": "o", "steps": 4}
    config = StageConfig.model_validate(values | {"batch_size": 8, "learning_rate": 1} | changes)
    return Plan(config=config, steps=4, rows=80, tracking_uri="", run_id="")


def add(rates: Throughput, lengths: list[int], counted: list[bool]) -> None:
    mask = torch.arange(40) < torch.tensor(lengths)[:, None]
    rates.add(mask, torch.tensor(counted))


def test_tokens_are_those_that_count_since_the_last_line() -> None:
    rates = Throughput(plan_of(), ModelConfig(), CPU, live=True)
    add(rates, [10, 20, 40], [True, True, False])
    add(rates, [6, 0, 0], [True, False, False])
    assert rates.read(8, 4.0) == {"tokens_per_second": 9.0}
    add(rates, [10, 10, 10], [True] * 3)
    rates.restart()
    assert rates.read(8, 4.0) == {"tokens_per_second": 0.0}


def test_samples_cost_what_the_workers_do_meanwhile() -> None:
    rates = Throughput(plan_of(price_per_hour=3.6), ModelConfig(), CPU, live=True)
    add(rates, [8], [True])
    # 500 samples in 10 seconds are 1,000 in 20, at a tenth of a cent a second.
    assert rates.read(500, 10.0)["dollars_per_1000_samples"] == pytest.approx(0.02)


@pytest.mark.parametrize("live", [True, False])
def test_the_share_of_a_known_gpu_s_peak(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, live: bool
) -> None:
    monkeypatch.setattr(metrics, "_gpu_at", lambda device: GPUS["a100"])
    plan, config = plan_of(), models.load(tiny_model_dir).config
    rates = Throughput(plan, config, CPU, live=live)
    add(rates, [20, 30], [True, True])
    wanted = sample_flops(plan.config, config, 25, live=live) * 2 / 0.5 / 312e12
    assert rates.read(2, 0.5)["mfu"] == pytest.approx(wanted) and wanted > 0


def test_an_adapter_s_work_is_that_of_two_passes_and_not_of_three(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_gpu_at", lambda device: GPUS["a100"])
    config = models.load(tiny_model_dir).config
    shares = []
    for settings in ({}, {"lora": {"rank": 1, "alpha": 1}}):
        rates = Throughput(plan_of(**settings), config, CPU, live=False)
        add(rates, [20], [True])
        shares.append(rates.read(1, 1.0)["mfu"])
    assert shares[1] == pytest.approx(shares[0] * 2 / 3, rel=0.05)


def test_where_the_model_s_sizes_are_not_said_there_is_no_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "_gpu_at", lambda device: GPUS["a100"])
    rates = Throughput(plan_of(), ModelConfig(), CPU, live=False)
    add(rates, [20], [True])
    assert set(rates.read(1, 1.0)) == {"tokens_per_second"}
