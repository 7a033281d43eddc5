"""The same stage on other numbers of workers and in other pieces: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.feature_shards import write_features
from tests.training.workers import train_together
from training import loop
from training.stage import StageConfig

MakeStage = Callable[..., StageConfig]


@pytest.fixture(scope="module")
def features(edit_data: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Features that do not depend on which samples are encoded together."""
    return write_features(edit_data, tmp_path_factory.mktemp("features"), tiny_model_dir)


@pytest.fixture
def make_stage(features: str, tiny_model_dir: Path, tmp_path: Path) -> MakeStage:
    """``make_stage("name", key=value, …)``: a stage that writes to a folder of that name."""

    def make(name: str, **settings: Any) -> StageConfig:
        values = {
            "stage": "edit2",
            "text_mix": {"blueprint": 1, "instruction": 1},
            "init": str(tiny_model_dir),
            "data": [features],
            "out": str(tmp_path / name),
            "steps": 4,
            "batch_size": 5,
            "learning_rate": 1e-3,
            "condition_dropout": 0.4,
            "changed_cell_weight": 5.0,
            "log_every": 1,
        }
        return StageConfig.model_validate(values | settings)

    return make


def losses_of(history: dict[int, dict[str, float]]) -> list[float]:
    return [metrics["loss"] for _, metrics in sorted(history.items()) if "loss" in metrics]


def test_any_number_of_workers_and_any_micro_batch_have_equal_losses(
    make_stage: MakeStage, tracking_uri: str, tmp_path: Path
) -> None:
    # 5 slots: 5; 2 + 2 + 1; 3 + 2; 2 + 1 and 2; 1 + 1 and 1 and nothing new
    ways = [(1, None), (1, 2), (2, None), (2, 2), (3, 1)]
    stages = [
        make_stage(f"{workers}-{micro_batch}", workers=workers, micro_batch=micro_batch)
        for workers, micro_batch in ways
    ]
    runs = train_together(stages, tracking_uri, tmp_path / "processes")
    assert all(answer["error"] is None for answer, _ in runs)
    first, *others = (losses_of(history) for _, history in runs)
    assert len(first) == 4 and len(set(first)) == 4
    for losses in others:
        assert losses == pytest.approx(first, abs=1e-5)
    norms = [
        [metrics["grad_norm"] for metrics in history.values() if "grad_norm" in metrics]
        for _, history in runs
    ]
    for other in norms[1:]:
        assert other == pytest.approx(norms[0], rel=1e-3)


def spoil_the_second_worker(rank: int) -> None:
    """Its loss is no number in steps 5 and 6, until the run has gone back."""
    flow_matching = loop.flow_matching

    def spoiled(worker: Any, step: int, number: int) -> torch.Tensor:
        loss = flow_matching(worker, step, number)
        bad = rank == 1 and step in (4, 5) and not worker.state.salt
        return loss * float("nan") if bad else loss

    loop.flow_matching = spoiled


def test_a_bad_gradient_of_one_worker_takes_both_back_to_what_the_first_saved(
    make_stage: MakeStage, tracking_uri: str, tmp_path: Path
) -> None:
    settings = {"steps": 7, "checkpoint_every": 3, "max_skips": 2, "workers": 2}
    stages = [make_stage("both", **settings)]
    ((both, history),) = train_together(
        stages, tracking_uri, tmp_path / "processes", spoil_the_second_worker
    )
    assert both["error"] is None
    assert both["events"] == [{"step": 6, "back_to": 3, "salt": 1}]
    assert all(np.isfinite(metrics["loss"]) for metrics in history.values() if "loss" in metrics)
    assert both["metrics"]["skipped_updates"] == 0
