from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dim import model as models
from dim.gpus import GPUS
from dim.model.config import ModelConfig
from training import throughput
from training.estimate import sample_flops
from training.plan import Plan
from training.stage import StageConfig
from training.throughput import Throughput

CPU = torch.device("cpu")


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
    monkeypatch.setattr(throughput, "_gpu_at", lambda device: GPUS["a100"])
    plan, config = plan_of(), models.load(tiny_model_dir).config
    rates = Throughput(plan, config, CPU, live=live)
    add(rates, [20, 30], [True, True])
    wanted = sample_flops(plan.config, config, 25, live=live) * 2 / 0.5 / 312e12
    assert rates.read(2, 0.5)["mfu"] == pytest.approx(wanted) and wanted > 0


def test_an_adapter_s_work_is_that_of_two_passes_and_not_of_three(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "_gpu_at", lambda device: GPUS["a100"])
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
    monkeypatch.setattr(throughput, "_gpu_at", lambda device: GPUS["a100"])
    rates = Throughput(plan_of(), ModelConfig(), CPU, live=False)
    add(rates, [20], [True])
    assert set(rates.read(1, 1.0)) == {"tokens_per_second"}
