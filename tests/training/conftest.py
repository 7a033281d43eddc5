"""A worker without a cluster, and one tracker for all training tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.train
import ray.train.torch
import torch


class Alone:
    """Stands in for Ray Train around one worker in this process, and keeps what it reports."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.folder = Path()  # what is reported is kept here, one folder for each run

    @property
    def checkpoint(self) -> ray.train.Checkpoint | None:
        """The latest of the run."""
        kept = sorted(self.folder.glob("step-*"))
        return ray.train.Checkpoint.from_directory(kept[-1]) if kept else None

    def get_world_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1

    def report(
        self,
        metrics: dict[str, Any],
        checkpoint: ray.train.Checkpoint,
        checkpoint_dir_name: str,
    ) -> None:
        self.reports.append(metrics)
        checkpoint.to_directory(self.folder / checkpoint_dir_name)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Alone:
    """Lets ``train_loop_per_worker`` run in this process, as the only worker, without a Ray."""
    stand_in = Alone()
    monkeypatch.setattr(ray.train, "get_context", lambda: stand_in)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: stand_in.checkpoint)
    monkeypatch.setattr(ray.train, "report", stand_in.report)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model, **options: model)
    return stand_in


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all training tests."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
