"""What Ray Train costs and what a second worker brings, and where data and frozen parts are bars.

    python -m benchmarks.train                             # about ten minutes on two cores
    python -m benchmarks.train --only step workers         # what is measured here alone

Five bars, each a ratio of figures of one run:

step: a step through Ray Train with one worker takes at most 1.05 times the plain PyTorch loop below
    (the same classes, the same micro-batches; their losses must be equal too).
workers: two workers of one thread take at least 1.7 times the samples a second of one, and 0.85
    times those of two processes that make the plain loop side by side and exchange nothing: what
    two cores that share a cache, the memory and the system's own work are good for. Told besides:
    what they would reach if each step waited for the slower one, as an exchange makes it, and what
    the machine's cores did meanwhile.
wait: live reading with prefetch keeps a step waiting at most 5 % of the time (``benchmarks.feed``).
cached: features made before are at least 2.5 times as fast as live ones at the published widths of
    the layers, a tenth of their number (``benchmarks.features`` on ``published_widths.yaml``).

Rounds alternate and each way's best one counts. Leaves with status 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import ray
import torch
from torch import nn
from torch.optim import AdamW

from benchmarks import feed
from dim.features.encoder import CachedFeatures, FrozenEncoder
from dim.features.shards import Share
from dim.learning.batch import SampleOrder, WorkerOrder, draw
from dim.learning.step import Trainable
from dim.model.flow import FlowSchedule, squared_error
from infra.memory import keep_freed_memory
from infra.models import load_initial
from infra.samples import open_images
from infra.storage import join
from infra.tracking import Tracking, default_uri
from training import loop, train
from training.plan import Plan
from training.stage import StageConfig

HERE = Path(__file__).resolve().parent
SAME = 1e-5  # of a loss, relative
PLAIN, ONE, TWO = "plain PyTorch", "Ray Train, 1 worker", "Ray Train, 2 workers"
APART = "plain PyTorch, twice"  # two processes, each with half of a step's batch

# Bars that another benchmark holds: its arguments, and what it fails below or above.
ELSEWHERE = {
    "wait": (["benchmarks.feed"], "steps wait for live reading at most 5 % of the time"),
    "cached": (
        [
            "benchmarks.features", "--model", str(HERE / "published_widths.yaml"),
            "--target", "2.5", "--samples", "8", "--batch", "4", "--steps", "2", "--repeats", "1",
        ],
        "cached features at least 2.5 x live ones at the published widths",
    ),
}  # fmt: skip


class Bar(NamedTuple):
    """A bar, its ``figure`` and whether that will do."""

    name: str
    figure: str
    met: bool


class Cores(NamedTuple):
    """What a machine's cores did for some time: seconds, or how many cores it was at a time.

    ``own``: this process. ``all``: every process and the kernel. ``taken``: the host, for others.
    """

    wall: float
    own: float
    all: float
    taken: float

    @classmethod
    def now(cls) -> Cores:
        """Seconds since whenever; only differences mean something."""
        of_machine = psutil.cpu_times()._asdict()
        busy = sum(
            of_machine.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq")
        )
        taken = of_machine.get("steal", 0.0)
        return cls(time.perf_counter(), time.process_time(), busy, taken)

    def since(self, before: Cores) -> Cores:
        """Cores at a time from ``before`` to this."""
        wall, *seconds = (after - then for after, then in zip(self, before, strict=True))
        return Cores(wall, *(each / wall for each in seconds))


@dataclass(frozen=True)
class Steps:
    """Of one round: when each step began (seconds), and its loss.

    ``in_step`` is for two processes: seconds of a step, the median, if each had waited for the
    other one at its end. ``cores``: what was computed in the round, as one process saw it.
    """

    begins: list[float]
    losses: list[float]
    in_step: float | None = None
    cores: Cores | None = None

    @property
    def seconds(self) -> float:
        """Of a step, from its beginning to the next one's; the median."""
        return statistics.median(np.diff(self.begins).tolist())


def main() -> int:
    """Measure and compare; returns the exit status."""
    options = _options()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the workers of training do: what is compared is the loop
    before = os.getloadavg()[0]
    bars: list[Bar] = []
    if ways := _ways(options.only):
        with tempfile.TemporaryDirectory() as folder:
            bars += judge(measure(options, folder, ways), options.batch)
    bars += [elsewhere(name) for name in ELSEWHERE if name in options.only]
    # What others compute meanwhile moves the ratios too: two workers need two idle cores.
    after = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {before:.1f} before and {after:.1f} after the run")
    return report(bars)


def measure(
    options: argparse.Namespace, folder: str, ways: Sequence[str]
) -> dict[str, list[Steps]]:
    """The rounds of each way."""
    data = feed.write_images(Path(folder, "data"), options.samples, options.side)
    config = StageConfig(
        stage="t2i",
        init=options.model,
        data=[data],
        out=join(folder, "out"),
        steps=options.steps,
        batch_size=options.batch,
        micro_batch=options.micro_batch,
        learning_rate=1e-4,
        registry=None,
    )
    taken: dict[str, list[Steps]] = {way: [] for way in ways}
    # One Ray for all rounds: its start is not what is measured.
    with train.ray_session(config.model_copy(update={"workers": 2})):
        for number in range(options.rounds):
            for way in ways:
                if way == PLAIN:
                    steps = plain_loop(config, options.samples)
                elif way == APART:
                    steps = side_by_side(config, options.samples)
                else:
                    out = join(folder, f"out-{number}-{ways.index(way)}")
                    changes = {"out": out, "workers": 2 if way == TWO else 1}
                    steps = through_ray(config.model_copy(update=changes), options.samples)
                taken[way].append(steps)
    return taken


def plain_loop(config: StageConfig, rows: int) -> Steps:
    """The loop that one would write with these classes and no Ray."""
    model = load_initial(config.init, edits=config.edits).train()
    order = WorkerOrder(SampleOrder(rows, config.batch_size, config.seed), 0, 1)
    encoder = FrozenEncoder(model, edits=config.edits, resolution=model.config.sampling.resolution)
    images = open_images(config.uris, config.columns)
    features = CachedFeatures(encoder, Share(images, order.rows), config.texts)
    schedule = FlowSchedule(model.config.sampling.shift)
    module = Trainable(model)
    optimizer = AdamW(
        module.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    texts = np.zeros(config.batch_size, np.int64)
    channels, *sides = features.batch(order.batch(0)[:1], texts[:1]).latent.shape[1:]
    shape = (channels, sides[0], sides[1])
    begins, losses = [], []
    before = Cores.now()
    for step in range(config.steps or 0):
        begins.append(time.perf_counter())
        positions, total = order.batch(step), 0.0
        draws = draw(config.seed, step, order.slots, shape, dropout=config.condition_dropout)
        for rows_of_pass in torch.arange(config.batch_size).split(config.micro_batch or 1):
            chosen = rows_of_pass.tolist()
            batch, part = features.batch(positions[chosen], texts[chosen]), draws.take(chosen)
            velocity = module(
                schedule.add_noise(batch.latent, part.noise, part.index),
                schedule.timesteps[part.index],
                batch.hidden_states,
                batch.mask,
                batch.source_latent,
                part.dropped,
            )
            errors = squared_error(velocity, part.noise - batch.latent)
            loss = errors.sum() / config.batch_size
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(module.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return Steps(begins, losses, cores=Cores.now().since(before))


def side_by_side(config: StageConfig, rows: int) -> Steps:
    """The plain loop in two processes at once, each with half of the batch; the slower one's."""
    half = config.model_copy(update={"batch_size": config.batch_size // 2})
    process = ray.remote(num_cpus=1)(_kept_plain_loop)
    both: list[Steps] = ray.get([process.remote(half, rows) for _ in range(2)])
    slower = np.maximum(*(np.diff(steps.begins) for steps in both))
    in_step = statistics.median(slower.tolist())
    return replace(max(both, key=lambda steps: steps.seconds), in_step=in_step)


def _kept_plain_loop(config: StageConfig, rows: int) -> Steps:
    torch.set_num_threads(1)
    keep_freed_memory()
    return plain_loop(config, rows)


def through_ray(config: StageConfig, rows: int) -> Steps:
    """The steps of ``dim train``'s own trainer, with its log, as its first worker saw them."""
    uri = default_uri(config.out)
    with Tracking(uri, config.tracking.experiment).run("benchmark", {}, {}) as run:
        plan = Plan(
            config=config, steps=config.steps or 0, rows=rows, tracking_uri=uri, run_id=run.id
        )
        plain = train.train_loop_per_worker
        train.train_loop_per_worker = noted_loop
        try:
            result = train.make_trainer(plan).fit()
        finally:
            train.train_loop_per_worker = plain
    outcome = result.return_value  # type: ignore[attr-defined]
    if outcome["error"] is not None:
        raise outcome["error"]
    return Steps(outcome["begins"], outcome["losses"], cores=outcome["cores"])


def noted_loop(config: dict[str, Any]) -> dict[str, Any]:
    """``train_loop_per_worker``, whose answer also has what ``Steps`` has."""
    begins: list[float] = []
    losses: list[torch.Tensor] = []
    cores: list[Cores] = []
    plain = loop.update

    def noted(worker: loop.Worker, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        cores.append(Cores.now())
        begins.append(time.perf_counter())
        loss, norm = plain(worker, step)
        losses.append(loss)
        return loss, norm

    loop.update = noted
    try:
        outcome = loop.train_loop_per_worker(config)
    finally:
        loop.update = plain
    losses_made = [loss.item() for loss in losses]
    return {
        **outcome, "begins": begins, "losses": losses_made, "cores": cores[-1].since(cores[0])
    }  # fmt: skip


def judge(taken: dict[str, list[Steps]], batch: int) -> list[Bar]:
    """The bars for which all ways were measured."""
    best = {way: min(steps.seconds for steps in rounds) for way, rounds in taken.items()}
    for way, seconds in best.items():
        print(f"{way:20} {1000 * seconds:8.1f} ms a step {batch / seconds:8.1f} samples/s")
        cores = min(taken[way], key=lambda steps: steps.seconds).cores
        if cores is not None:
            print(
                f"    cores at a time: {cores.own:.2f} by one of its processes, {cores.all:.2f} by "
                f"all of the machine's, {cores.taken:.2f} taken by its host"
            )
    bars = []
    if PLAIN in best:
        ratio = best[ONE] / best[PLAIN]
        bars.append(
            Bar("a step through Ray Train at most 1.05 x plain PyTorch", f"{ratio:.3f}",
                ratio <= 1.05)
        )  # fmt: skip
        apart = max(
            abs(one - other) / abs(other)
            for one, other in zip(taken[ONE][0].losses, taken[PLAIN][0].losses, strict=True)
        )
        bars.append(Bar(f"their losses at most {SAME:g} apart", f"{apart:.1e}", apart <= SAME))
    if TWO in best:
        ratio = best[ONE] / best[TWO]
        bars.append(Bar("two one-thread workers at least 1.7 x one", f"{ratio:.2f}", ratio >= 1.7))
    if TWO in best and APART in best:
        print(f"two processes that exchange nothing: {best[ONE] / best[APART]:.2f} x one worker")
        if waited := [steps.in_step for steps in taken[APART] if steps.in_step is not None]:
            print(f"    in step, by their own times: {best[ONE] / min(waited):.2f} x")
        ratio = best[APART] / best[TWO]
        bars.append(
            Bar("two workers at least 0.85 x two processes apart", f"{ratio:.2f}", ratio >= 0.85)
        )
    return bars


def elsewhere(name: str) -> Bar:
    """A bar of another benchmark, in a process of its own, which prints its figures."""
    arguments, bar = ELSEWHERE[name]
    print(f"python -m {' '.join(arguments)}", flush=True)
    status = subprocess.run([sys.executable, "-m", *arguments], check=False).returncode
    return Bar(bar, "as above" if status == 0 else f"status {status}", status == 0)


def report(bars: Sequence[Bar]) -> int:
    """Print each bar with its figure; 1 where one is missed."""
    for bar in bars:
        print(f"{'met   ' if bar.met else 'MISSED'} {bar.name}: {bar.figure}")
    missed = [bar.name for bar in bars if not bar.met]
    for name in missed:
        print(f"FAILED: {name}", file=sys.stderr)
    return 1 if missed else 0


def _ways(only: Sequence[str]) -> list[str]:
    """What has to be measured here for the bars ``only``."""
    ways = [PLAIN, ONE] if "step" in only else []
    if "workers" in only:
        ways = [*(ways or [ONE]), TWO, APART]
    return ways


def _options() -> argparse.Namespace:
    bars = ("step", "workers", *ELSEWHERE)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=bars, default=bars, help="bars to measure")
    parser.add_argument("--model", default=str(HERE.parent / "configs" / "tiny.yaml"))
    parser.add_argument("--samples", type=int, default=512, help="images")
    parser.add_argument("--side", type=int, default=64, help="pixels of an image")
    parser.add_argument("--batch", type=int, default=128, help="samples of a step")
    parser.add_argument("--micro-batch", type=int, default=32, help="of a forward pass")
    parser.add_argument("--steps", type=int, default=24, help="of a round")
    parser.add_argument("--rounds", type=int, default=3, help="of each way; the best counts")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
