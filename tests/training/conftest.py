"""A worker without a cluster, and one tracker for all training tests."""

from __future__ import annotations

import pytest
import ray.train
import ray.train.torch
import torch
from ray.train import PreemptionInfo


class Alone:
    """Stands in for Ray Train around one worker in this process."""

    def __init__(self) -> None:
        self.preemption: PreemptionInfo | None = None

    def get_world_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Alone:
    """Lets ``train_loop_per_worker`` run in this process, as the only worker, without a Ray."""
    stand_in = Alone()
    monkeypatch.setattr(ray.train, "get_context", lambda: stand_in)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: stand_in.preemption)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model, **options: model)
    return stand_in


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all training tests."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
