from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import training.loop
import training.train
from benchmarks import train
from benchmarks.gpu import UNDERSTANDING
from benchmarks.train import APART, ONE, PLAIN, TWO, Bar, Cores, Steps
from dim.config import load_config
from dim.model import parts
from dim.model.config import ModelConfig


def steps(seconds: float, loss: float = 0.5) -> Steps:
    return Steps([0.0, seconds, 2 * seconds, 9 * seconds], [loss, loss])


GOOD = {PLAIN: [steps(1.0), steps(1.2)], ONE: [steps(1.3), steps(1.04)], TWO: [steps(0.6)]}
GOOD[TWO][0] = replace(GOOD[TWO][0], cores=Cores(9.0, 0.88, 1.86, 0.01))
GOOD[APART] = [replace(steps(0.56), in_step=0.65), steps(0.7)]


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({ONE: [steps(1.06)]}, ["a step through Ray Train at most 1.05 x plain PyTorch"]),
        ({PLAIN: [steps(1.0, 0.6)]}, ["their losses at most 1e-05 apart"]),
        ({PLAIN: [steps(1.0, float("nan"))]}, ["their losses at most 1e-05 apart"]),
        ({TWO: [steps(0.612)]}, ["two one-thread workers at least 1.7 x one"]),
        ({APART: [steps(0.5)]}, ["two workers at least 0.85 x two processes apart"]),
    ],
)
def test_a_bar_that_is_missed_fails(
    capsys: pytest.CaptureFixture[str], changes: dict[str, list[Steps]], missed: list[str]
) -> None:
    assert train.report(train.judge(GOOD | changes, batch=8)) == (1 if missed else 0)
    said, failed = capsys.readouterr()
    assert "plain PyTorch          1000.0 ms a step      8.0 samples/s" in said
    if not changes:
        assert "ms a step     13.3 samples/s\n    cores at a time: 0.88 by one of its " in said
        assert (
            "exchange nothing: 1.86 x one worker\n    in step, by their own times: 1.60 x" in said
        )
    assert [line for line in said.splitlines() if line.startswith("MISSED")] == [
        line for line in said.splitlines() for name in missed if f"MISSED {name}: " in line
    ]
    assert failed.splitlines() == [f"FAILED: {name}" for name in missed]


def test_the_bar_of_another_benchmark_is_its_exit_status(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = []

    def run(command: list[str], check: bool) -> SimpleNamespace:
        ran.append(command)
        return SimpleNamespace(returncode=int("benchmarks.features" in command))

    monkeypatch.setattr(train.subprocess, "run", run)
    assert train.elsewhere("wait") == Bar(train.ELSEWHERE["wait"][1], "as above", True)
    assert train.elsewhere("cached") == Bar(train.ELSEWHERE["cached"][1], "status 1", False)
    assert [command[:3] for command in ran] == [
        [sys.executable, "-m", "benchmarks.feed"],
        [sys.executable, "-m", "benchmarks.features"],
    ]
    assert ran[1][ran[1].index("--target") + 1] == "2.5"


def test_cores_are_told_by_how_many_were_at_work_at_a_time() -> None:
    later = Cores(12.0, 6.0, 109.0, 1.0).since(Cores(2.0, 1.0, 90.0, 0.5))
    assert later == Cores(10.0, 0.5, 1.9, 0.05)
    before = Cores.now()
    sum(range(3_000_000))
    done = Cores.now().since(before)
    assert 0 < done.own <= 1.1 and done.all >= 0


def test_only_what_the_bars_need_is_measured() -> None:
    assert train._ways(["wait", "cached"]) == []
    assert train._ways(["step"]) == [PLAIN, ONE]
    assert train._ways(["workers"]) == [ONE, TWO, APART]
    assert train._ways(["workers", "step"]) == [PLAIN, ONE, TWO, APART]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_plain_loop_takes_the_steps_of_the_trainer(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    options = argparse.Namespace(
        model=str(tiny_model_dir), samples=16, side=64, batch=8, micro_batch=4, steps=3, rounds=1
    )
    taken = train.measure(options, str(tmp_path), [PLAIN, ONE, APART])
    (plain,), (through_ray,), (apart,) = taken[PLAIN], taken[ONE], taken[APART]
    assert len(through_ray.begins) == len(plain.begins) == 3
    assert through_ray.losses == pytest.approx(plain.losses, rel=train.SAME)
    assert len(set(plain.losses)) == 3
    assert all(0 < way.seconds < 60 for way in (through_ray, plain, apart))
    assert len(apart.losses) == 3 and apart.losses != plain.losses  # of half of the batch
    assert apart.in_step is not None and apart.in_step >= min(np.diff(apart.begins))
    assert training.train.train_loop_per_worker is training.loop.train_loop_per_worker


def test_widths_are_the_published_ones() -> None:
    configs = Path(train.HERE).parent / "configs"
    widths = load_config(ModelConfig, Path(train.HERE) / "published_widths.yaml")
    published = load_config(ModelConfig, configs / "dim-4.6b.yaml")
    fewer = {"num_layers": 2, "sample_size": 8}
    assert widths.painter.architecture == published.painter.architecture | fewer
    assert widths.connector.out_features == published.connector.out_features
    with torch.device("meta"):
        latent = parts.autoencoder(widths.autoencoder).encode(torch.empty(1, 3, 256, 256))
        qwen = parts.conditioner(widths.understanding).model
    assert latent.shape == (1, 32, 8, 8)
    of, its = UNDERSTANDING["text_config"], qwen.config.text_config
    same = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    assert {name: getattr(its, name) for name in same} == {name: of[name] for name in same}
    assert (its.num_hidden_layers, qwen.config.vision_config.depth) == (4, 3)
