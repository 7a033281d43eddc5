"""A worker without a cluster, and one tracker for all training tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import ray.train
import ray.train.torch
import torch
from PIL import Image
from ray.train import PreemptionInfo

from infra.tracking import TrackingError


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
