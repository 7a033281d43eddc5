"""What the driver finds out before a stage begins and tells every worker; the announcement."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dim.config import StrictModel
from dim.errors import CheckpointError
from dim.features.encoder import CachedFeatures, FeatureSource, ShardFeatures
from dim.learning.batch import steps_per_epoch
from dim.learning.optimizer import MOMENT_BYTES
from infra import storage
from infra.samples import holds_features, open_features, open_images
from training.shapes import RowShapes, Shapes
from training.stage import StageConfig
from training.state import TrainState


class Plan(StrictModel):
    """What the driver tells every worker. ``steps`` is resolved, paths are absolute.

    ``shapes`` are those of the samples, where they make a difference.
    """

    config: StageConfig
    steps: int
    rows: int
    tracking_uri: str
    run_id: str
    shapes: Shapes | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return epoch_steps(self.rows, self.config.batch_size, self.shapes)


def absolute(config: StageConfig) -> StageConfig:
    """Local paths made absolute: Ray Train gives its workers another working directory."""
    changes: dict[str, Any] = {
        "init": _absolute(config.init),
        "out": _absolute(config.out),
        "data": [_absolute(uri) for uri in config.data],
    }
    if config.validation is not None:
        held_out = [_absolute(uri) for uri in config.validation.data]
        changes["validation"] = config.validation.model_copy(update={"data": held_out})
    return config.model_copy(update=changes)


def measure(config: StageConfig, shapes: RowShapes | None = None) -> tuple[int, int]:
    """Steps and samples of the stage, after all that can be known to be wrong was checked.

    Args:
        config: The stage.
        shapes: Of its samples, from ``find_shapes``.

    Raises:
        CheckpointError: there is nothing at ``init``.
        InputError, StorageError: the data are not what the stage needs; the message says where.
    """
    if not storage.exists(config.init):
        raise CheckpointError(f"init: there is no model folder or model YAML at {config.init}")
    rows = count_samples(config)
    if config.validation is not None:
        open_images(config.validation.data, config.columns)
    if config.steps is not None:
        return config.steps, rows
    assert config.epochs is not None
    told = None if shapes is None else shapes.told()
    return config.epochs * epoch_steps(rows, config.batch_size, told), rows


def epoch_steps(rows: int, batch_size: int, shapes: Shapes | None) -> int:
    """Batches of an epoch: of all samples together, or of those of each of ``shapes``."""
    if shapes is None:
        return steps_per_epoch(rows, batch_size)
    return shapes.steps_per_epoch(batch_size)


def count_samples(config: StageConfig) -> int:
    """Samples in the data of a stage, of either kind, after the checks that need no worker.

    Raises:
        InputError, StorageError: the data are not what the stage needs; the message says where.
    """
    if holds_features(config.data):
        return open_features(config.data, config.texts, edits=config.edits).rows
    return open_images(config.data, config.columns).rows


def announcement(
    plan: Plan, state: TrainState, features: FeatureSource[Any], *, token_limit: int, resumed: bool
) -> str:
    """What will happen and what memory it takes, said before it happens."""
    config = plan.config
    parameters = sum(_held(p) for p in state.module.parameters() if p.requires_grad)
    averages = 0 if state.ema is None or config.ema_on_cpu else 4
    nbytes = parameters * (8 + MOMENT_BYTES[config.optimizer] + averages)  # weights and gradients
    held = features if isinstance(features, CachedFeatures | ShardFeatures) else None
    cached = held.nbytes if held else 0
    lines = [
        f"{config.stage}: {plan.rows} samples, {plan.steps_per_epoch} steps an epoch, "
        f"{plan.steps} steps; per worker {parameters:,} trained parameters "
        f"({nbytes / 1e6:.0f} MB with optimizer) and {cached / 1e6:.0f} MB of "
        "cached features"
    ]
    if isinstance(features, ShardFeatures):
        how = "held in memory" if features.in_memory else "read from their shards as needed"
        lines.append(f"features were made before ({features.encoding}) and are {how}")
    if plan.shapes is not None:
        lines += plan.shapes.announcement(config.batch_size)
    elif plan.rows < config.batch_size:
        lines.append(
            f"{plan.rows} samples are fewer than a batch of {config.batch_size}: they repeat in it"
        )
    if held and (cut := held.count_cut(token_limit)):
        lines.append(f"{cut} texts fill all {token_limit} condition tokens; longer ones were cut")
    if resumed:
        epoch, batch = divmod(state.step, plan.steps_per_epoch)
        lines.append(
            f"resumed after step {state.step} of {plan.steps} (epoch {epoch}, batch "
            f"{batch} of {plan.steps_per_epoch})"
        )
        lines += [
            f"learning_rate is {event['learning_rate']:g} from here on, and was "
            f"{event['before']:g} before"
            for event in state.events[-1:]
            if event["step"] == state.step and "learning_rate" in event
        ]
    return "\n".join(lines)


def _held(parameter: torch.Tensor) -> int:
    """How many of a parameter's numbers this worker holds."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()


def _absolute(uri: str) -> str:
    store = storage.open_store(uri)
    return store.root if store.is_local else uri
