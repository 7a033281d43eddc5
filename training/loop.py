"""The training loop that Ray Train runs on every worker: prepare, then step after step, export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray.train
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dim.errors import DimError, StorageUnavailable
from dim.learning.batch import WorkerOrder
from dim.learning.ema import averaged
from dim.learning.optimizer import set_learning_rate
from dim.learning.step import Trainable, changed_cells
from dim.learning.trained import load_trained_weights, trained_weights
from dim.model import DIM
from dim.model.flow import FlowSchedule, squared_error
from infra.models import load_initial
from training import finetune, parallel
from training.bad_samples import TooManyBadSamples
from training.data import Feed, choose_source, make_feed, make_order, open_shards
from training.log import RunLog, StepLog, open_log, silence_repeats
from training.plan import Plan, announcement
from training.stage import StageConfig, learning_rate_at
from training.state import TrainState, check_updates, new_state, restore, return_to, save
from training.validation import Validation, open_validation


class DivergedError(DimError):
    """Gradients are no finite numbers, and going back is of no use. All workers see it at once."""


@dataclass
class Worker:
    """What one worker holds. ``trainable`` is what a step calls: the state's module, or its DDP."""

    plan: Plan
    rank: int
    device: torch.device
    mesh: DeviceMesh | None
    model: DIM
    schedule: FlowSchedule
    state: TrainState
    trainable: nn.Module
    feed: Feed
    validation: Validation | None
    log: RunLog

    @property
    def config(self) -> StageConfig:
        """The stage."""
        return self.plan.config


def train_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Prepare, train, export. The answer has ``error``, ``metrics`` and the state's ``events``.

    An error that another try would meet again is returned (``{"error": …}``) and not raised, since
    Ray Train answers what is raised by starting the workers again.
    """
    plan = Plan.model_validate(config)
    torch.set_num_threads(plan.config.cpus_per_worker)
    silence_repeats()
    worker: Worker | None = None
    error: Exception | None = None
    try:
        worker = prepare(plan)
    except DimError as problem:
        error = problem
    if (error := parallel.agree(error)) is not None or worker is None:
        if isinstance(error, StorageUnavailable):
            raise error  # Ray Train starts the workers again, at most max_failures times
        return {"error": error, "events": []}
    worker.trainable = parallel.wrap(worker.state.module)
    try:
        metrics = train(worker)
    except (DivergedError, TooManyBadSamples) as stopped:
        return {"error": stopped, "events": worker.state.events}
    export(worker)
    worker.log.close()
    return {"error": None, "metrics": metrics, "events": worker.state.events}


def prepare(plan: Plan) -> Worker:
    """Load the model, compute features, pick up the latest checkpoint.

    The only collective is the first act: whatever fails later is agreed on by the caller.

    Raises:
        DimError: something is wrong with model, data, checkpoint or tracker.
    """
    config = plan.config
    rank, world_size, device = parallel.this_worker()
    mesh = parallel.make_mesh(world_size, config.parallelism.parts(world_size), device)
    log = open_log(plan, rank)
    model = load_initial(config.init, edits=config.edits)
    shards = open_shards(plan, model, rank)
    frozen_are_used = shards is None or config.validation is not None
    parallel.place(model, device, config.precision, frozen=frozen_are_used)
    finetune.attach(model, config)
    model.painter.checkpoint_gradients(config.gradient_checkpointing)
    state = new_state(model, config, mesh)
    resumed = restore(state, ray.train.get_checkpoint())
    order = WorkerOrder(make_order(plan, model), rank, world_size)
    features = choose_source(plan, model, shards, order, log)
    validation = open_validation(config, model, rank, world_size)
    feed = make_feed(config, order, features)
    limit = model.config.understanding.max_condition_tokens
    log.say(announcement(plan, state, features, token_limit=limit, resumed=resumed))
    return Worker(
        plan=plan,
        rank=rank,
        device=device,
        mesh=mesh,
        model=model,
        schedule=FlowSchedule(model.config.sampling.shift),
        state=state,
        trainable=state.module,
        feed=feed,
        validation=validation,
        log=log,
    )


def update(worker: Worker, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of flow matching: this worker's mean loss and the gradient norm over all.

    A gradient that is no finite number on any worker is skipped on all.
    """
    config, state, passes = worker.config, worker.state, worker.feed.passes.count
    loss = torch.zeros((), device=worker.device)
    for number in range(passes):
        with parallel.averaging(worker.trainable, last=number == passes - 1):
            part = flow_matching(worker, step, number)
            part.backward()
        loss += part.detach()

    norm = parallel.clip_gradients(state.module, config.grad_clip)
    if parallel.all_finite(norm):
        set_learning_rate(state.optimizers, learning_rate_at(config, step, worker.plan.steps))
        for optimizer in state.optimizers:
            optimizer.step()
        if state.ema is not None:
            state.ema.update(step)
        state.skips_in_a_row = 0
    else:
        state.skipped += 1
        state.skips_in_a_row += 1
    state.module.zero_grad()
    state.step = step + 1
    return loss, norm


def flow_matching(worker: Worker, step: int, number: int) -> torch.Tensor:
    """The loss of one forward pass; averaged over the workers, a step's passes add up to its mean.

    A worker's share of the batch may be a sample more or less than another's, so all divide by
    what a worker has on average.
    """
    config, schedule = worker.config, worker.schedule
    draws, batch = worker.feed.get(step, number, worker.state.salt)
    batch, index = batch.to(worker.device), draws.index
    noise, dropped = draws.noise.to(worker.device), draws.dropped.to(worker.device)
    finetune.key_dropout(worker.model, config, draws.noise)

    noisy = schedule.add_noise(batch.latent, noise, index)
    with parallel.autocast(worker.device, config.precision):
        velocity = worker.trainable(
            noisy,
            schedule.timesteps[index],
            batch.hidden_states,
            batch.mask,
            batch.source_latent,
            dropped,
        )
    weight = changed_cells(batch.latent, batch.source_latent, config.changed_cell_weight)
    errors = squared_error(velocity, noise - batch.latent, weight)
    counted = worker.feed.passes.counted(number).to(worker.device)
    return (errors * counted).sum() / (config.batch_size / parallel.world_size())


def train(worker: Worker) -> dict[str, float]:
    """Every step from where the state stands to the end; the last metrics of each kind."""
    config, state, steps = worker.config, worker.state, worker.plan.steps
    validate_every = config.validation.every if config.validation else None
    log = StepLog(worker.log, worker.plan, worker.device)
    metrics: dict[str, float] = {}
    begun = state.step
    while state.step < steps:
        loss, norm = update(worker, state.step)
        skipped, waited = state.skips_in_a_row > 0, worker.feed.take_wait()
        log.add(loss, norm, skipped=skipped, waited=waited)
        done, last = state.step, state.step == steps
        if last or due(done, config.log_every):
            metrics |= log.read(done) | worker.feed.bad.read(worker.log, worker.device)
            metrics["skipped_updates"] = state.skipped
            log.write(done, metrics)
        if state.skips_in_a_row == config.max_skips:
            go_back(worker)
            log.restart()
            continue
        if not last and due(done, validate_every):
            metrics |= validate(worker)
            log.restart()
        # Weights with which no gradient is finite are none to go back to.
        if not last and due(done, config.checkpoint_every) and not state.skips_in_a_row:
            checkpoint(worker, metrics)
            log.restart()
    metrics |= validate(worker)
    if begun != steps:
        checkpoint(worker, metrics)
    check_updates(state, steps)
    return metrics


def go_back(worker: Worker) -> None:
    """Return to the latest checkpoint and other draws; all workers take part.

    Raises:
        DivergedError: there is none, or the run went back often enough.
    """
    config, state = worker.config, worker.state
    trouble = f"{config.max_skips} gradients in a row up to step {state.step} were no numbers"
    if state.salt >= config.max_returns:
        raise DivergedError(
            f"{trouble}, after going back {state.salt} times: go on from the latest checkpoint "
            "with a lower learning_rate"
        )
    latest = parallel.from_first(ray.train.get_checkpoint())  # only the first worker knows it
    if not return_to(state, latest):
        raise DivergedError(
            f"{trouble}, before the first checkpoint: lower learning_rate or raise warmup_steps, "
            "then start again with --fresh"
        )
    worker.log.flush()  # or MLflow could not tell a step from the same one made again
    worker.log.say(f"{trouble}: back to step {state.step}, and on with other draws")


def validate(worker: Worker) -> dict[str, float]:
    """Paint the held-out samples with the averaged weights; all workers take part."""
    if worker.validation is None:
        return {}
    worker.model.eval()
    autocast = parallel.autocast(worker.device, worker.config.precision)
    with autocast, averaged(worker.state.ema), parallel.whole(worker.state.module):
        outcome = worker.validation.run()
    worker.model.train()
    if outcome is None:
        return {}
    metrics, sheet = outcome
    worker.log.validation(worker.state.step, metrics, sheet)
    return metrics


def checkpoint(worker: Worker, metrics: dict[str, float]) -> None:
    """Save the state; all workers take part."""
    worker.log.flush()
    save(worker.state, metrics, rank=worker.rank)


def export(worker: Worker) -> None:
    """Write the averaged weights, a model folder or an adapter; all workers take part."""
    config, model = worker.config, worker.model
    with averaged(worker.state.ema):
        weights = parallel.gathered(trained_weights(worker.state.module))
        if worker.rank != 0:
            return
        if worker.mesh is not None:  # the model's own weights are parts
            model = load_initial(config.init, edits=config.edits)
            load_trained_weights(Trainable(model), weights)
        finetune.export(model, config, worker.log)


def due(step: int, every: int | None) -> bool:
    """Whether what happens every so many steps happens after ``step``; ``None``: never."""
    return every is not None and step % every == 0
