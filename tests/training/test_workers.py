"""The same stage on other numbers of workers and in other pieces: the same numbers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dim import model
from tests.feature_shards import cut_latents, write_features
from tests.training.workers import train_together
from training import loop
from training.stage import StageConfig

MakeStage = Callable[..., StageConfig]

# (h, w) of latents: 12 squares, 5 of another shape and 3 that have to repeat in a batch of 5
CELLS = [*[(8, 8)] * 12, *[(8, 6)] * 5, *[(6, 8)] * 3]


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
    make_stage: MakeStage, features: str, tracking_uri: str, tmp_path: Path
) -> None:
    # 5 slots: 5; 2 + 2 + 1; 3 + 2; 2 + 1 and 2; 1 + 1 and 1 and nothing new
    ways = [(1, None), (1, 2), (2, None), (2, 2), (3, 1)]
    stages = [
        make_stage(f"{workers}-{micro_batch}", workers=workers, micro_batch=micro_batch)
        for workers, micro_batch in ways
    ]
    mixed = cut_latents(features, tmp_path / "mixed", CELLS)
    shaped = [(1, None, {}), (2, 2, {}), (2, 1, {"parallelism": {"strategy": "fsdp"}})]
    stages += [
        make_stage(
            f"shapes-{number}",
            workers=workers,
            micro_batch=micro_batch,
            data=[mixed],
            buckets=True,
            **others,
        )
        for number, (workers, micro_batch, others) in enumerate(shaped)
    ]
    runs = train_together(stages, tracking_uri, tmp_path / "processes")
    assert all(answer["error"] is None for answer, _ in runs)
    for alike in (runs[: len(ways)], runs[len(ways) :]):
        first, *others = (losses_of(history) for _, history in alike)
        assert len(first) == 4 and len(set(first)) == 4  # of 4 shapes' steps in an epoch
        for losses in others:
            assert losses == pytest.approx(first, abs=1e-5)
        norms = [
            [metrics["grad_norm"] for metrics in history.values() if "grad_norm" in metrics]
            for _, history in alike
        ]
        for other in norms[1:]:
            assert other == pytest.approx(norms[0], rel=1e-3)
        assert [history[4]["epoch"] for _, history in alike] == [1.0] * len(alike)


def test_sharded_weights_train_as_whole_ones_do(
    make_stage: MakeStage,
    held_out_data: str,
    tiny_model_dir: Path,
    tracking_uri: str,
    tmp_path: Path,
) -> None:
    settings = {
        "steps": 20,
        "micro_batch": 2,
        "ema_decay": 0.9,
        "warmup_steps": 2,
        "checkpoint_every": 8,
        # of 3 samples, one at a time, the workers have unequal numbers of passes
        "validation": {
            "data": [held_out_data],
            "samples": 3,
            "steps": 2,
            "every": 6,
            "batch_size": 1,
        },
    }
    fsdp, hsdp = {"strategy": "fsdp"}, {"strategy": "hsdp", "shard": 2}
    stages = [
        make_stage("alone", **settings),
        make_stage("ddp", **settings, workers=2),
        make_stage("fsdp", **settings, workers=2, parallelism=fsdp),
        make_stage(
            "hsdp",
            **settings | {"micro_batch": 1},
            workers=4,
            parallelism=hsdp,
            gradient_checkpointing=True,
        ),
    ]
    runs = train_together(stages, tracking_uri, tmp_path / "processes")
    assert all(answer["error"] is None for answer, _ in runs)
    alone, *others = (history for _, history in runs)
    names = ("loss", "grad_norm", "validation_loss", "validation_distance")
    assert all({*names} <= alone[step].keys() for step in (6, 12, 18, 20))
    for other in others:
        for name in names:
            one, two = (
                [metrics[name] for _, metrics in sorted(history.items()) if name in metrics]
                for history in (alone, other)
            )
            assert len(one) == len(two) and two == pytest.approx(one, rel=1e-4, abs=1e-4), name
    expected = weights_of(tmp_path / "alone")
    assert apart(weights_of(tiny_model_dir.parent), expected) > 1e-2
    for name in ("ddp", "fsdp", "hsdp"):
        assert apart(weights_of(tmp_path / name), expected) < 1e-4, name


def test_checkpoints_load_whoever_saved_them(
    make_stage: MakeStage, tracking_uri: str, tmp_path: Path
) -> None:
    settings = {"steps": 6, "checkpoint_every": 3, "ema_decay": 0.9, "optimizer": "muon"}
    sharded = {"workers": 2, "parallelism": {"strategy": "fsdp"}}
    ways = {"whole": settings, "sharded": settings | sharded}
    stages = [make_stage(name, **way) for name, way in ways.items()]
    runs = train_together(stages, tracking_uri, tmp_path / "first")
    assert all(answer["error"] is None for answer, _ in runs)
    whole, parts = (losses_of(history) for _, history in runs)
    assert parts == pytest.approx(whole, rel=1e-3)  # Muon computes in bfloat16

    half = "checkpoints/step-00000003"
    shutil.copytree(tmp_path / "sharded" / half, tmp_path / "whole again" / half)
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "sharded again" / half)
    stages = [make_stage(f"{name} again", **way) for name, way in ways.items()]
    runs = train_together(stages, tracking_uri, tmp_path / "second")
    assert all(answer["error"] is None for answer, _ in runs)
    for _, history in runs:
        assert losses_of(history) == pytest.approx(whole[3:], rel=1e-3)
    expected = weights_of(tmp_path / "whole")
    for name in ("sharded", "whole again", "sharded again"):
        assert apart(weights_of(tmp_path / name), expected) < 1e-3, name


def weights_of(out: Path) -> torch.Tensor:
    saved = model.load(out / "model")
    parts = (*saved.connector.parameters(), *saved.painter.parameters())
    return torch.cat([part.detach().flatten() for part in parts])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


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
