"""The training loop that Ray Train runs on every worker: prepare, then step after step, export."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dim.errors import CheckpointError, DimError, StorageUnavailable
from dim.features.encoder import LiveFeatures
from dim.learning.batch import WorkerOrder
from dim.learning.ema import averaged
from dim.learning.optimizer import set_learning_rate
from dim.learning.step import Trainable, changed_cells
from dim.learning.trained import load_trained_weights, trained_weights
from dim.model import DIM
from dim.model.flow import FlowSchedule, squared_error
from infra.memory import keep_freed_memory
from infra.models import load_initial
from infra.tracing import span
from infra.tracking import TrackingError
from training import finetune, parallel
from training.bad_samples import TooManyBadSamples
from training.checkpoints import Checkpoints, UnsavedError
from training.data import Feed, choose_source, make_feed, make_order, open_shards
from training.log import RunLog, open_log, silence_repeats
from training.metrics import PREFIX, StepLog
from training.notices import Notices, interrupted, listening
from training.owner import Fence, LostOutputError
from training.plan import Plan, announcement, resumption
from training.stage import StageConfig, learning_rate_at
from training.state import TrainState, check_updates, new_state
from training.validation import Validation, open_validation


class DivergedError(DimError):
    """Gradients are no finite numbers, and going back is of no use. All workers see it at once."""


STOPPED = (
    CheckpointError,
    DivergedError,
    LostOutputError,
    TooManyBadSamples,
    TrackingError,
    UnsavedError,
)
"""What another try would meet again, or would train for in vain."""

PREPARATION_S = 7 * 86400.0
"""That workers wait for the slowest one to load and encode: Ray Train sees to one that is lost."""


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
    steps: StepLog
    validation: Validation | None
    checkpoints: Checkpoints
    notices: Notices
    log: RunLog
    fence: Fence

    @property
    def config(self) -> StageConfig:
        """The stage."""
        return self.plan.config


def train_loop_per_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Prepare, train, export: ``error``, ``metrics``, ``checkpoint`` and the state's ``events``.

    An error that another try would meet again is returned (``{"error": …}``) and not raised, since
    Ray Train answers what is raised by starting the workers again.
    """
    plan = Plan.model_validate(config)
    torch.set_num_threads(plan.config.cpus_per_worker)
    keep_freed_memory()
    silence_repeats()
    rank = parallel.this_worker()[0]
    patient = parallel.side_group(PREPARATION_S)
    with listening(), plan.trace.span("worker", stage=plan.config.stage, rank=rank):
        worker: Worker | None = None
        error: Exception | None = None
        try:
            worker = prepare(plan)
        except DimError as problem:
            error = problem
        if (error := parallel.agree(error, patient)) is not None or worker is None:
            if isinstance(error, StorageUnavailable):
                raise error  # Ray Train starts the workers again, at most max_failures times
            return {"error": error, "events": []}
        return run(worker)


def run(worker: Worker) -> dict[str, Any]:
    """Pick up the latest checkpoint, train, export; the answer of ``train_loop_per_worker``.

    What is returned as an error here is one that all workers have met, or the tracker's in the end.
    """
    state, checkpoints = worker.state, worker.checkpoints
    try:
        with closing(checkpoints):
            if checkpoints.restore(state):
                worker.log.say(resumption(worker.plan, state))
            worker.trainable = parallel.wrap(state.module)
            metrics = train(worker)
        export(worker)
        worker.log.close()
    except STOPPED as stopped:
        return {"error": stopped, "events": state.events}
    return {
        "error": None,
        "metrics": metrics,
        "checkpoint": checkpoints.latest,
        "events": state.events,
    }


@span("prepare")
def prepare(plan: Plan) -> Worker:
    """Load the model, compute features.

    The only collectives are the first acts: whatever fails later is agreed on by the caller.

    Raises:
        DimError: something is wrong with model, data or tracker.
    """
    config = plan.config
    rank, world_size, device = parallel.this_worker()
    mesh = parallel.make_mesh(world_size, config.parallelism.parts(world_size), device)
    group = parallel.side_group(config.collective_timeout_s)
    log = open_log(plan, rank)
    fence = Fence(config.out, plan.owner)
    fence.confirm()  # also after a restart of the workers
    model = load_initial(config.init, edits=config.edits, vlm_view=config.vlm_view)
    shards = open_shards(plan, model, rank)
    frozen_are_used = shards is None or config.validation is not None
    parallel.place(model, device, config.precision, frozen=frozen_are_used, keep=rank == 0)
    finetune.attach(model, config)
    model.painter.checkpoint_gradients(config.gradient_checkpointing)
    state = new_state(model, config, mesh)
    order = WorkerOrder(make_order(plan, model), rank, world_size)
    features = choose_source(plan, model, shards, order, log)
    validation = open_validation(config, model, rank, world_size)
    feed = make_feed(config, order, features, plan.ends)
    limit = model.config.understanding.max_condition_tokens
    log.say(announcement(plan, state, features, token_limit=limit))
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
        steps=StepLog(log, plan, model.config, device, live=isinstance(features, LiveFeatures)),
        validation=validation,
        checkpoints=Checkpoints(config, rank, group, log),
        notices=Notices(config.checkpoint_minutes),
        log=log,
        fence=fence,
    )


def update(worker: Worker, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of flow matching: this worker's mean loss and the gradient norm over all.

    A gradient that is no finite number on any worker is none on all, and skipped.
    """
    config, state, passes = worker.config, worker.state, worker.feed.passes.count
    loss = torch.zeros((), device=worker.device)
    for number in range(passes):
        last = number == passes - 1
        with parallel.averaging(worker.trainable, last):
            part = flow_matching(worker, step, number)
            if last:
                worker.notices.tell(worker.device)  # on its way while gradients are computed
            part.backward()
        loss += part.detach()

    norm = parallel.clip_gradients(state.module, config.grad_clip)
    worker.notices.hear()
    if torch.isfinite(norm):
        set_learning_rate(state.optimizers, learning_rate_at(config, step, worker.plan.steps))
        for optimizer in state.optimizers:
            optimizer.step()
        if state.ema is not None:
            state.ema.update(step)
        state.skips_in_a_row = 0
    else:
        state.skipped += 1
        state.skips_in_a_row += 1
    parallel.clear_gradients(worker.trainable)
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
    worker.steps.add_pass(errors, counted, index, worker.feed.sources(number), batch.mask)
    return (errors * counted).sum() / (config.batch_size / parallel.world_size())


@span("steps")
def train(worker: Worker) -> dict[str, float]:
    """Every step from where the state stands to the end; the last metrics of each kind."""
    config, state, log, steps = worker.config, worker.state, worker.steps, worker.plan.steps
    validate_every = config.validation.every if config.validation else None
    begun = state.step
    log.begin(begun)
    metrics: dict[str, float] = {}
    while state.step < steps:
        loss, norm = update(worker, state.step)
        skipped, waited = state.skips_in_a_row > 0, worker.feed.take_wait()
        log.add(loss, norm, skipped=skipped, waited=waited)
        worker.checkpoints.look()
        done, last = state.step, state.step == steps
        measured: dict[str, float] = {}  # after this very step
        if last or due(done, config.log_every):
            metrics = without(metrics, PREFIX)
            measured |= log.read(done) | worker.feed.bad.read(worker.log, worker.device)
            measured["skipped_updates"] = state.skipped
            confirm_owner(worker)
            log.write(done, metrics | measured)
        if state.skips_in_a_row == config.max_skips:
            go_back(worker)
            log.restart()
            continue
        if worker.notices.ending:
            end_early(worker, measured)
        if last or due(done, validate_every):
            metrics = without(metrics, "validation_")
            with log.aside():
                measured |= validate(worker)
        metrics |= measured
        # Weights with which no gradient is finite are none to go back to.
        if last or (wants_checkpoint(worker) and not state.skips_in_a_row):
            with log.aside():
                checkpoint(worker, measured)
    if begun == steps:  # the run ended before it could export
        metrics = without(metrics, "validation_") | validate(worker)
    worker.checkpoints.finish()
    check_updates(state, steps)
    return metrics


def wants_checkpoint(worker: Worker) -> bool:
    """Whether one is due after the step that was made: by its number, the clock, or validation."""
    config, done = worker.config, worker.state.step
    validated = config.validation is not None and due(done, config.validation.every)
    return (
        due(done, config.checkpoint_every)
        or worker.notices.due
        or (validated and config.keep_best is not None)
    )


def end_early(worker: Worker, metrics: dict[str, float]) -> NoReturn:
    """Save the state now and end, for Ray Train to start the workers again; all take part.

    Raises:
        RayActorError: always; Ray Train does not count it as a failure.
    """
    if not worker.state.skips_in_a_row:
        checkpoint(worker, metrics)
    worker.checkpoints.finish()
    reason = f"{worker.notices.ending}: ended after step {worker.state.step}"
    worker.log.say(f"{reason}, the latest checkpoint is {worker.checkpoints.latest or 'none'}")
    raise interrupted(reason)


def go_back(worker: Worker) -> None:
    """Return to the latest checkpoint and other draws; all workers take part.

    Raises:
        DivergedError: there is none, or the run went back often enough.
        CheckpointError: none can be used.
    """
    config, state = worker.config, worker.state
    trouble = f"{config.max_skips} gradients in a row up to step {state.step} were no numbers"
    if state.salt >= config.max_returns:
        raise DivergedError(
            f"{trouble}, after going back {state.salt} times: go on from the latest checkpoint "
            "with a lower learning_rate"
        )
    left, salt, events = state.step, state.salt + 1, state.events
    if not worker.checkpoints.restore(state):
        raise DivergedError(
            f"{trouble}, before the first checkpoint: lower learning_rate or raise warmup_steps, "
            "then start again with --fresh"
        )
    state.salt = salt  # not the checkpoint's own: going back twice would meet the same draws twice
    state.events = [*events, {"step": left, "back_to": state.step, "salt": salt}]
    worker.log.flush()  # or MLflow could not tell a step from the same one made again
    worker.log.say(f"{trouble}: back to step {state.step}, and on with other draws")


@span("validation")
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


@span("checkpoint")
def checkpoint(worker: Worker, metrics: dict[str, float]) -> None:
    """Begin to save the state, with what was measured after its last step; all take part."""
    confirm_owner(worker)
    worker.log.flush()
    worker.checkpoints.save(worker.state, metrics)
    worker.notices.saved()


@span("export")
def export(worker: Worker) -> None:
    """Write the averaged weights, a model folder or an adapter; all workers take part."""
    config, model = worker.config, worker.model
    confirm_owner(worker)
    with averaged(worker.state.ema):
        weights = parallel.gathered(trained_weights(worker.state.module))
        if worker.rank != 0:
            return
        if worker.mesh is not None:  # the model's own weights are parts
            model = load_initial(config.init, edits=config.edits, vlm_view=config.vlm_view)
            load_trained_weights(Trainable(model), weights)
        finetune.export(model, config, worker.log)


def confirm_owner(worker: Worker) -> None:
    """Go on only while the output is this run's; all workers take part.

    Raises:
        LostOutputError: another driver has taken it over.
    """
    lost: Exception | None = None
    if worker.rank == 0:
        try:
            worker.fence.confirm()
        except DimError as error:
            lost = error
    if (lost := parallel.agree(lost)) is not None:
        raise lost


def without(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """``metrics`` but for those that begin so and, where there is no new value, would stay."""
    return {name: value for name, value in metrics.items() if not name.startswith(prefix)}


def due(step: int, every: int | None) -> bool:
    """Whether what happens every so many steps happens after ``step``; ``None``: never."""
    return every is not None and step % every == 0
