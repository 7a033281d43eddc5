"""The training loop that Ray Train runs on every worker."""

from __future__ import annotations

import logging
import math
import time
import warnings
from typing import Any

import torch

from dim.errors import DimError
from dim.learning.ema import averaged
from training.export import export
from training.log import LossMeter
from training.stage import learning_rate_at
from training.state import report
from training.worker import Plan, Worker, agree, join, prepare

_SAY_SECONDS = 15.0


class DivergedError(DimError):
    """Loss or gradients are no longer finite numbers. Every worker sees it at the same step."""


def train_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Prepare, train, export.

    An error that another try would meet again is returned (``{"error": …}``) and not raised, since
    Ray Train answers what is raised by starting the workers again.
    """
    plan = Plan.model_validate(config)
    torch.set_num_threads(plan.config.cpus_per_worker)
    _silence_repeats()
    worker, error = None, None
    try:
        worker = prepare(plan)
    except DimError as problem:
        error = problem
    if (problem := agree(error)) is not None or worker is None:
        return {"error": problem}
    join(worker)
    try:
        metrics = train(worker)
    except DivergedError as problem:
        return {"error": problem}
    if worker.rank == 0:
        export(worker)
        worker.log.close()
    return {"error": None, "metrics": metrics}


def update(worker: Worker, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of flow matching: this worker's mean loss and the gradient norm over all."""
    config, state = worker.config, worker.state
    draws, batch = worker.feed.get(step)
    batch = batch.to(worker.device)
    with worker.autocast():
        rows = worker.trainable(
            batch.hidden_states,
            batch.mask,
            batch.latent,
            batch.source_latent,
            draws.noise.to(worker.device),
            draws.index,
            draws.dropped.to(worker.device),
        )
    loss = rows.mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.module.parameters(), config.grad_clip)
    if not math.isfinite(norm.item()):
        raise DivergedError(
            f"the gradient is {norm.item()} at step {step + 1} (loss {loss.item():.4g}): lower "
            "learning_rate or raise warmup_steps, then start again with --fresh"
        )
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(config, step, worker.plan.steps)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update(step)
    state.step = step + 1
    return loss.detach(), norm


def train(worker: Worker) -> dict[str, float]:
    """Every step from where the state stands to the end; the last metrics of each kind."""
    plan, config, state = worker.plan, worker.config, worker.state
    meter = LossMeter(worker.device, config.batch_size)
    saved, said = state.step, time.monotonic()
    metrics: dict[str, float] = {}
    validation = config.validation
    for step in range(state.step, plan.steps):
        loss, norm = update(worker, step)
        meter.add(loss)
        done, last = state.step, state.step == plan.steps
        if done % config.log_every == 0 or last:
            metrics |= meter.read() | _step_metrics(worker, norm)
            worker.log.add(done, metrics)
            if time.monotonic() - said > _SAY_SECONDS or last:
                said = time.monotonic()
                worker.log.say(_progress_line(plan, done, metrics))
        if validation and validation.every and done % validation.every == 0 and not last:
            metrics |= validate(worker)
            meter.restart()
        if config.checkpoint_every and done % config.checkpoint_every == 0 and not last:
            _save(worker, metrics)
            saved = done
            meter.restart()
    metrics |= validate(worker)
    if saved != plan.steps:
        _save(worker, metrics)
    check_updates(worker)
    return metrics


def validate(worker: Worker) -> dict[str, float]:
    """Paint the held-out samples with the averaged weights; all workers take part."""
    if worker.validation is None:
        return {}
    worker.model.painter.eval()
    with worker.autocast(), averaged(worker.state.ema):
        outcome = worker.validation.run()
    worker.model.painter.train()
    if outcome is None:
        return {}
    metrics, sheet = outcome
    worker.log.add(worker.state.step, metrics)
    worker.log.picture(sheet, f"validation/step-{worker.state.step:08d}.png")
    worker.log.say(
        f"validation after step {worker.state.step}: "
        + ", ".join(f"{name.removeprefix('validation_')} {v:.3f}" for name, v in metrics.items())
    )
    return metrics


def check_updates(worker: Worker) -> None:
    """Whether the optimizer has made exactly the updates that were asked for.

    Raises:
        RuntimeError: it has not; the weights are not what the configuration says.
    """
    optimizer = worker.state.optimizer
    made = {int(state["step"]) for state in optimizer.state.values()}
    if made != {worker.plan.steps}:
        raise RuntimeError(f"{worker.plan.steps} updates were asked for but {sorted(made)} made")


def _silence_repeats() -> None:
    """Quieten what comes with every batch or report, and is said elsewhere or needs no act."""
    logging.getLogger().setLevel(logging.WARNING)
    for message in ("a prompt of .* tokens is longer", "Grad strides do not match bucket view"):
        warnings.filterwarnings("ignore", message=message)


def _save(worker: Worker, metrics: dict[str, float]) -> None:
    worker.log.flush()
    report(worker.state, {**metrics, "step": worker.state.step}, rank=worker.rank)


def _step_metrics(worker: Worker, norm: torch.Tensor) -> dict[str, float]:
    done = worker.state.step
    return {
        "learning_rate": learning_rate_at(worker.config, done - 1, worker.plan.steps),
        "grad_norm": norm.item(),
        "epoch": done / worker.epochs.steps_per_epoch,
        "progress": done / worker.plan.steps,
    }


def _progress_line(plan: Plan, done: int, metrics: dict[str, float]) -> str:
    rate = metrics["samples_per_second"] / plan.config.batch_size
    left = (plan.steps - done) / rate / 60
    return (
        f"{plan.config.stage} step {done}/{plan.steps}: loss {metrics['loss']:.4f}, "
        f"{metrics['samples_per_second']:.0f} samples/s, {left:.1f} minutes left"
    )
