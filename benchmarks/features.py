"""Training on features made before against features made live: samples a second, in one run.

    python benchmarks/features.py                                  # the tiny model, a few minutes
    python benchmarks/features.py --samples 16 --steps 2 --repeats 1   # to see that it runs

Makes DIM-Edit of the tabletop and its features with the jobs themselves, then takes the same
training steps (``training.loop.update``) with the features computed live, read from their shards
as needed, and held in memory, in turns. Leaves with status 1 when reading or holding features is
less than ``--target`` times as fast as computing them, or when the losses are not the same.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray.train
import torch

from dim.config import load_config
from dim.features.encoder import FeatureSource, FrozenEncoder, LiveFeatures, ShardFeatures
from dim.features.shards import Share
from dim.learning.batch import SampleOrder, WorkerOrder
from dim.model import DIM
from dim.model.flow import FlowSchedule
from infra.models import load_initial
from infra.samples import open_features, open_images
from infra.storage import join, open_store
from pipelines import edit, features, ingest
from pipelines.edit import EditConfig
from pipelines.features import FeaturesConfig
from pipelines.ingest import IngestConfig
from training.checkpoints import Checkpoints
from training.data import Feed, make_feed
from training.log import RunLog
from training.loop import Worker, update
from training.metrics import StepLog
from training.notices import Notices
from training.owner import Fence
from training.plan import Plan
from training.stage import StageConfig
from training.state import new_state

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
LIVE = "live"
SAME = 1e-2  # of a loss, relative: bfloat16 features against float32 ones


@dataclass(frozen=True)
class Result:
    """Seconds of the best round, and the losses of the first one, of each way."""

    seconds: dict[str, float]
    losses: dict[str, list[float]]
    samples: int  # in a round


def main() -> int:
    """Make the data, take the steps, compare; returns the exit status."""
    options = _options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        plain, made, seconds = _make(options, folder)
        size = sum(size for _, size in open_store(made).list("data"))
        result = _compare(options, plain, made)
    print(
        f"making features: {seconds / options.samples * 1000:.0f} ms a sample, start included; "
        f"{size / options.samples / 1000:.0f} kB a sample"
    )
    return _report(result, options.target)


def _make(options: argparse.Namespace, folder: str) -> tuple[str, str, float]:
    """Addresses of edits and of their features, and the seconds that making features took."""
    raw, plain, made = (join(folder, name) for name in ("raw", "edit", "features"))
    ingest.run(IngestConfig(tabletop=2 * options.samples, out=raw))
    oracle = [f"raw={raw}", f"out={plain}", "designer=oracle"]
    edit.run(load_config(EditConfig, CONFIGS / "data-tabletop-edit.yaml", oracle))
    start = time.perf_counter()
    features.run(FeaturesConfig(data=plain, model=options.model, out=made))
    return plain, made, time.perf_counter() - start


def _compare(options: argparse.Namespace, plain: str, made: str) -> Result:
    config = StageConfig(
        stage="edit2",
        init=options.model,
        data=[plain],
        out="unused",
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=1e-4,
    )
    images = open_images([plain], config.columns)
    plan = Plan(config=config, steps=options.steps, rows=images.rows, tracking_uri="", run_id="")
    order = WorkerOrder(SampleOrder(images.rows, options.batch, seed=0), 0, 1)
    model = load_initial(options.model, edits=True)
    encoder = FrozenEncoder(model, edits=True, resolution=model.config.sampling.resolution)
    shards = open_features([made], config.texts, edits=True)
    sources: dict[str, FeatureSource[Any]] = {
        LIVE: LiveFeatures(encoder, Share(images, order.rows), config.texts),
        "read": ShardFeatures(shards, order.rows, config.texts, in_memory=False),
        "held": ShardFeatures(shards, order.rows, config.texts, in_memory=True),
    }
    seconds = dict.fromkeys(sources, float("inf"))
    losses: dict[str, list[float]] = {}
    begun = copy.deepcopy(new_state(model, config).module.state_dict())
    for _ in range(options.repeats + 1):  # the first round is for allocators and page cache
        for name, source in sources.items():
            worker = _worker(plan, model, make_feed(config, order, source))
            worker.state.module.load_state_dict(begun)
            start = time.perf_counter()
            # Ray Train, which knows of nodes that are about to go, is not there.
            with mock.patch.object(ray.train, "get_preemption_info", lambda: None):
                taken = [update(worker, step)[0].item() for step in range(options.steps)]
            if name in losses:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
            losses.setdefault(name, taken)
    return Result(seconds, losses, options.steps * options.batch)


def _worker(plan: Plan, model: DIM, feed: Feed) -> Worker:
    """The only worker of a stage, before its first step."""
    state, log = new_state(model, plan.config), RunLog(None)
    return Worker(
        plan=plan,
        rank=0,
        device=torch.device("cpu"),
        mesh=None,
        model=model,
        schedule=FlowSchedule(model.config.sampling.shift),
        state=state,
        trainable=state.module,
        feed=feed,
        steps=StepLog(log, plan, model.config, torch.device("cpu"), live=False),
        validation=None,
        checkpoints=Checkpoints(plan.config, 0, None, log),
        notices=Notices(None),
        log=log,
        fence=Fence(plan.config.out, plan.owner),
    )


def _report(result: Result, target: float) -> int:
    live = result.seconds[LIVE]
    for name, seconds in result.seconds.items():
        print(f"{name:5} {result.samples / seconds:8.1f} samples/s   {live / seconds:5.2f} x live")
    failures = []
    for name in result.seconds.keys() - {LIVE}:
        if live / result.seconds[name] < target:
            failures.append(f"features that are {name} are not {target:g} times as fast as live")
        if _apart(result.losses[LIVE], result.losses[name]) > SAME:
            failures.append(f"features that are {name} give other losses than live ones")
    for said in sorted(failures):
        print(f"FAILED: {said}", file=sys.stderr)
    return 1 if failures else 0


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(CONFIGS / "tiny.yaml"), help="folder or YAML")
    parser.add_argument("--samples", type=int, default=64, help="edits, about")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--steps", type=int, default=8, help="of a round")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds; the best counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", type=float, default=1.0, help="ratio to live that is wanted")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
