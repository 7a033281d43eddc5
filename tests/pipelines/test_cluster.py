from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray.data
from ray.data._internal.execution.resource_manager import ResourceManager

from pipelines.cluster import connect


def test_all_of_the_cluster_is_used_from_the_start(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By itself Ray Data would not look for the answer again in this test.
    monkeypatch.setattr(ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", 3600)
    connect()

    def meet(batch: dict[str, Any]) -> dict[str, Any]:
        (tmp_path / str(batch["item"][0])).touch()
        end = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2:
            if time.monotonic() > end:
                raise TimeoutError("nobody else came")
            time.sleep(0.01)
        return batch

    tasks = ray.data.from_items([0, 1], override_num_blocks=2)
    assert len(tasks.map_batches(meet, batch_size=1).take_all()) == 2
