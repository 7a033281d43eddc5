"""What a worker holds after the first checkpoint it holds after all updates."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dim.config import dump_config
from infra.tracking import Tracking
from training import loop
from training.plan import Plan
from training.stage import StageConfig

STEPS = 12


def held() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    found = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in gc.get_objects()
        if type(each) in (torch.Tensor, nn.Parameter) and each.layout == torch.strided
    }
    return sum(found.values())


def test_memory_does_not_grow_with_updates(
    alone: Any,
    tiny_model_dir: Path,
    edit_data: str,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"stage": "edit1", "init": str(tiny_model_dir), "data": [edit_data], "batch_size": 4}
    values |= {"steps": STEPS, "learning_rate": 1e-3, "ema_decay": 0.9, "checkpoint_every": 2}
    config = StageConfig.model_validate(values | {"out": str(tmp_path / "out"), "log_every": 3})
    update, sizes = loop.update, []

    def weighed(worker: Any, step: int) -> Any:
        done = update(worker, step)
        # Moments come with the first update, the copy that is written with the first checkpoint.
        if step in (3, STEPS - 1):
            sizes.append(held())
        return done

    monkeypatch.setattr(loop, "update", weighed)
    with Tracking(tracking_uri, "test").run("edit1") as run:
        plan = Plan(config=config, steps=STEPS, rows=20, tracking_uri=tracking_uri, run_id=run.id)
        assert loop.train_loop_per_worker(dump_config(plan))["error"] is None
    assert sizes[0] > 0 and sizes == [sizes[0]] * 2
