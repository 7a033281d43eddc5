"""Several workers without a cluster: processes that train together over gloo.

What Ray Train does for a worker is played here.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dim.config import dump_config
from infra.tracking import Tracking
from training.loop import train_loop_per_worker
from training.mixture import count_sources
from training.plan import Plan, count_samples
from training.shapes import find_shapes
from training.stage import StageConfig

# Imports take longer than the runs here: they are made once, and every process is a fork of that.
multiprocessing.set_forkserver_preload(["training.loop"])

PATIENCE = timedelta(seconds=120)  # with another worker: a run that hangs is a failed test
Hook = Callable[[int], None]
"""Is called with the rank in every process before it trains; a function of a module."""


class Member:
    """Ray Train as one worker of a run sees it."""

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size = rank, world_size

    def get_world_rank(self) -> int:
        return self._rank

    get_local_rank = get_world_rank

    def get_world_size(self) -> int:
        return self._world_size


def start(function: Callable[..., None], arguments: tuple[Any, ...], processes: int) -> None:
    """``function(rank, *arguments)`` in processes of their own, which see this one's environment.

    Raises:
        Exception: one of them failed; the others are ended.
    """
    told = (function, dict(os.environ), *arguments)
    mp.start_processes(_in_environment, told, nprocs=processes, start_method="forkserver")


def _in_environment(
    rank: int, function: Callable[..., None], environment: dict[str, str], *arguments: Any
) -> None:
    os.environ.update(environment)
    function(rank, *arguments)


def train_together(
    configs: Sequence[StageConfig], tracking_uri: str, folder: Path, hook: Hook | None = None
) -> list[tuple[dict[str, Any], dict[int, dict[str, float]]]]:
    """Run stages one after the other on as many processes as each has workers.

    Returns:
        Of each stage rank 0's answer, and its metrics by step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = []
    for config in configs:
        shapes = find_shapes(config)
        if shapes is not None:
            shapes.write(config.out)
        with Tracking(tracking_uri, "dim-training").run(config.stage) as run:
            plans.append(
                Plan(
                    config=config,
                    steps=config.steps or 1,
                    rows=count_samples(config),
                    sources=count_sources(config),
                    tracking_uri=tracking_uri,
                    run_id=run.id,
                    shapes=None if shapes is None else shapes.told(),
                )
            )
    told = [dump_config(plan) for plan in plans]
    most = max(config.worker_range[1] for config in configs)
    start(_take_part, (str(folder), told, hook), most)
    answers = pickle.loads((folder / "answers").read_bytes())
    return [(answer, _history(plan)) for answer, plan in zip(answers, plans, strict=True)]


def _history(plan: Plan) -> dict[int, dict[str, float]]:
    client = mlflow.MlflowClient(plan.tracking_uri)
    found: dict[int, dict[str, float]] = {}
    for name in client.get_run(plan.run_id).data.metrics:
        for metric in client.get_metric_history(plan.run_id, name):
            found.setdefault(metric.step, {})[name] = metric.value
    return found


def _take_part(rank: int, folder: str, plans: list[dict[str, Any]], hook: Hook | None) -> None:
    torch.set_num_threads(1)
    if hook is not None:
        hook(rank)
    answers = []
    for number, plan in enumerate(plans):
        workers = plan["config"]["workers"]
        if rank >= workers:
            continue
        if workers > 1:
            meet = f"file://{folder}/meet-{number}"
            dist.init_process_group(
                "gloo", timeout=PATIENCE, init_method=meet, rank=rank, world_size=workers
            )
        member = Member(rank, workers)
        with (
            mock.patch.object(ray.train, "get_context", lambda member=member: member),
            mock.patch.object(ray.train, "get_preemption_info", lambda: None),
            mock.patch.object(ray.train.torch, "get_device", lambda: torch.device("cpu")),
        ):
            answers.append(train_loop_per_worker(plan))
        if workers > 1:
            gc.collect()  # a DDP in a cycle holds the group, and would end it at a bad moment
            dist.destroy_process_group()
    if rank == 0:
        Path(folder, "answers").write_bytes(pickle.dumps(answers))
