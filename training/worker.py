"""What one worker holds while a stage trains, and how it gets there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from dim.config import StrictModel
from dim.errors import InputError
from dim.features.encoder import (
    CachedFeatures,
    FeatureSource,
    FrozenEncoder,
    LiveFeatures,
    ShardFeatures,
)
from dim.features.format import preparation_of
from dim.features.shards import FeatureShards
from dim.learning.ema import Ema
from dim.learning.order import SampleOrder, WorkerOrder
from dim.learning.step import Trainable
from dim.model import DIM
from infra.models import load_initial
from infra.samples import holds_features, open_features, open_images
from infra.tracking import Run, Tracking
from training.data import Feed
from training.log import RunLog
from training.stage import StageConfig
from training.state import TrainState, restore
from training.validation import Validation


class Plan(StrictModel):
    """What the driver tells every worker. ``steps`` is resolved, paths are absolute."""

    config: StageConfig
    steps: int
    rows: int
    tracking_uri: str
    run_id: str


@dataclass
class Worker:
    """One worker, ready for the first step. ``trainable`` is what a step calls (DDP or not)."""

    plan: Plan
    rank: int
    device: torch.device
    model: DIM
    trainable: nn.Module
    state: TrainState
    order: WorkerOrder
    epochs: SampleOrder
    features: FeatureSource
    feed: Feed
    validation: Validation | None
    log: RunLog

    @property
    def config(self) -> StageConfig:
        """The stage."""
        return self.plan.config

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of a forward pass."""
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def prepare(plan: Plan) -> Worker:
    """Load the model, compute features, pick up the latest checkpoint. No collective is used.

    Raises:
        DimError: something is wrong with model, data, checkpoint or tracker.
    """
    config = plan.config
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    log = RunLog(_attach(plan) if rank == 0 else None)
    model = load_initial(config.init, edits=config.edits)
    shards = _shards(plan, model, rank)
    _place(model, device, config.precision, frozen=shards is None or config.validation is not None)
    model.painter.checkpoint_gradients(config.gradient_checkpointing)
    state = _new_state(model, config)
    resumed = restore(state, device)
    epochs = SampleOrder(plan.rows, config.batch_size, config.seed)
    order = WorkerOrder(epochs, rank, world_size)
    features = _features(plan, model, shards, order.rows, log)
    validation = _validation(config, model, rank, world_size)
    sample = features.batch(np.zeros(1, np.int64), np.zeros(1, np.int64))
    latent_shape: tuple[int, int, int] = tuple(sample.latent.shape[1:])  # type: ignore[assignment]
    ahead = isinstance(features, ShardFeatures) and not features.in_memory
    worker = Worker(
        plan=plan,
        rank=rank,
        device=device,
        model=model,
        trainable=state.module,
        state=state,
        order=order,
        epochs=epochs,
        features=features,
        feed=Feed(config, order, features, latent_shape, ahead=ahead),
        validation=validation,
        log=log,
    )
    log.say(_announcement(plan, worker, resumed))
    return worker


def _attach(plan: Plan) -> Run:
    return Tracking(plan.tracking_uri, plan.config.tracking.experiment).attach(plan.run_id)


def join(worker: Worker) -> None:
    """Tie the workers' gradients together (a collective: every worker calls it)."""
    worker.trainable = ray.train.torch.prepare_model(
        worker.state.module,
        move_to_device=False,
        parallel_strategy_kwargs={"static_graph": True, "gradient_as_bucket_view": True},
    )


def agree(error: Exception | None) -> Exception | None:
    """The first worker's error, on every worker, so that all stop or none (a collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return error
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((one for one in errors if one is not None), None)


def _place(model: DIM, device: torch.device, precision: str, *, frozen: bool) -> None:
    """Trained parts in float32; frozen ones in bfloat16 where that is what a GPU is fast at.

    Without ``frozen`` the frozen parts are not used and do not take the GPU's memory.
    """
    model.train()
    for part in (model.connector, model.painter):
        part.to(device).requires_grad_(True).float()
    if not frozen:
        return
    model.to(device)
    if precision == "bf16" and device.type == "cuda":
        model.conditioner.bfloat16()
        model.autoencoder.bfloat16()


def _new_state(model: DIM, config: StageConfig) -> TrainState:
    module = Trainable(model, config.changed_cell_weight)
    optimizer = torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    ema = None if config.ema_decay is None else Ema(module, config.ema_decay)
    return TrainState(module, optimizer, ema)


def _shards(plan: Plan, model: DIM, rank: int) -> FeatureShards | None:
    """The stage's feature shards, if its data are features; the first worker checks their key."""
    config = plan.config
    if not holds_features(config.data):
        return None
    shards = open_features(config.data, config.texts, edits=config.edits)
    _check_rows(plan, shards.rows)
    if rank == 0:
        resolution = model.config.sampling.resolution
        shards.check_preparation(preparation_of(model, edits=config.edits, resolution=resolution))
    return shards


def _features(
    plan: Plan,
    model: DIM,
    shards: FeatureShards | None,
    rows: np.ndarray[Any, np.dtype[np.int64]],
    log: RunLog,
) -> FeatureSource:
    config = plan.config
    if shards is not None:
        return ShardFeatures(shards, rows, config.texts, in_memory=config.cache_features)
    images = open_images(config.data, config.columns)
    _check_rows(plan, images.rows)
    table = images.read(rows)
    encoder = FrozenEncoder(model, edits=config.edits, resolution=model.config.sampling.resolution)
    if not config.cache_features:
        return LiveFeatures(encoder, table, config.texts)
    return CachedFeatures(
        encoder,
        table,
        config.texts,
        encode_batch=config.encode_batch,
        progress=lambda done, total: log.add(0, {"features_done": done / total}),
    )


def _check_rows(plan: Plan, count: int) -> None:
    if count != plan.rows:
        raise InputError(f"the training data changed: {plan.rows} samples became {count}")


def _validation(config: StageConfig, model: DIM, rank: int, world_size: int) -> Validation | None:
    if config.validation is None:
        return None
    table = read_validation(config)
    return Validation(config, model, table, rank=rank, world_size=world_size)


def read_validation(config: StageConfig) -> pa.Table:
    """The first ``validation.samples`` held-out rows, with their provenance where they have one.

    Raises:
        InputError: there are none, or a column is missing.
    """
    assert config.validation is not None
    images = open_images(config.validation.data, config.columns)
    count = min(images.rows, config.validation.samples)
    table, origin = images.read(np.arange(count)), images.head(count, "provenance")
    return table if origin is None else table.append_column("provenance", origin)


def _announcement(plan: Plan, worker: Worker, resumed: bool) -> str:
    """What will happen and what memory it takes, said before it happens."""
    config, state, epochs, features = plan.config, worker.state, worker.epochs, worker.features
    parameters = sum(p.numel() for p in state.module.parameters() if p.requires_grad)
    copies = 4 if state.ema is None else 5  # weights, gradients, two moments, EMA
    held = features if isinstance(features, CachedFeatures | ShardFeatures) else None
    cached = held.nbytes if held else 0
    lines = [
        f"{config.stage}: {plan.rows} samples, {epochs.steps_per_epoch} steps an epoch, "
        f"{plan.steps} steps; per worker {parameters:,} trained parameters "
        f"({parameters * 4 * copies / 1e6:.0f} MB with optimizer) and {cached / 1e6:.0f} MB of "
        "cached features"
    ]
    if isinstance(features, ShardFeatures):
        how = "held in memory" if features.in_memory else "read from their shards as needed"
        lines.append(f"features were made before ({features.encoding}) and are {how}")
    if plan.rows < config.batch_size:
        lines.append(
            f"{plan.rows} samples are fewer than a batch of {config.batch_size}: they repeat in it"
        )
    limit = worker.model.config.understanding.max_condition_tokens
    if held and (cut := held.count_cut(limit)):
        lines.append(f"{cut} texts fill all {limit} condition tokens; longer ones were cut")
    if resumed:
        epoch = epochs.epoch(state.step)
        lines.append(
            f"resumed after step {state.step} of {plan.steps} (epoch {epoch}, batch "
            f"{state.step - epoch * epochs.steps_per_epoch} of {epochs.steps_per_epoch})"
        )
    return "\n".join(lines)
