"""What the driver finds out before a stage begins and tells every worker; the announcement."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from pydantic import Field
from torch.distributed.tensor import DTensor

from dim.config import StrictModel
from dim.errors import CheckpointError
from dim.features.encoder import CachedFeatures, FeatureSource, ShardFeatures
from dim.learning.batch import steps_per_epoch
from dim.learning.config import check_view
from dim.learning.optimizer import MOMENT_BYTES
from infra import storage
from infra.models import check_reference, read_config
from infra.samples import holds_features, open_features, open_images
from infra.tracing import Trace
from training.mixture import count_sources, describe_mixture, epoch_samples
from training.shapes import RowShapes, Shapes
from training.stage import StageConfig
from training.state import TrainState


class Plan(StrictModel):
    """What the driver tells every worker. ``steps`` is resolved, paths are absolute."""

    config: StageConfig
    steps: int
    rows: int
    tracking_uri: str
    run_id: str
    owner: str = ""  # the driver's token, see ``training.owner``; empty: nobody owns the output
    sources: list[int] = Field(default_factory=list)  # rows of each of the data, where several
    shapes: Shapes | None = None  # of the samples, where they make a difference
    trace: Trace = Trace()  # of which the workers' spans are a part

    @property
    def source_rows(self) -> list[int]:
        """How many of ``rows`` each of the config's data has."""
        return self.sources or [self.rows]

    @property
    def ends(self) -> list[int]:
        """How many rows there are up to the end of each of the config's data."""
        return list(accumulate(self.source_rows))

    @property
    def epoch_samples(self) -> list[int]:
        """Of each of the config's data, how many samples an epoch has, were there no shapes."""
        return epoch_samples(self.config, self.source_rows)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return epoch_steps(sum(self.epoch_samples), self.config.batch_size, self.shapes)


def absolute(config: StageConfig) -> StageConfig:
    """Local paths made absolute: Ray Train gives its workers another working directory."""
    changes: dict[str, Any] = {
        "init": _absolute(config.init),
        "out": _absolute(config.out),
        "data": [
            source.model_copy(update={"uri": _absolute(source.uri)}) for source in config.data
        ],
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
        ConfigError: the understanding model was shown something else before (``check_view``).
        InputError, StorageError: the data are not what the stage needs, or ``init`` has no
            understanding model to refer to; the message says where.
    """
    if not storage.exists(config.init):
        raise CheckpointError(f"init: there is no model folder or model YAML at {config.init}")
    if config.edits:
        check_view(read_config(config.init), config.vlm_view, config.init)
    if config.export_understanding == "reference":
        check_reference(config.init)
    rows = count_samples(config)
    samples = sum(epoch_samples(config, count_sources(config)))
    if config.validation is not None:
        open_images(config.validation.data, config.columns)
    if config.steps is not None:
        return config.steps, rows
    assert config.epochs is not None
    told = None if shapes is None else shapes.told()
    return config.epochs * epoch_steps(samples, config.batch_size, told), rows


def epoch_steps(samples: int, batch_size: int, shapes: Shapes | None) -> int:
    """Batches of an epoch: of all ``samples`` together, or of those of each of ``shapes``."""
    if shapes is None:
        return steps_per_epoch(samples, batch_size)
    return shapes.steps_per_epoch(batch_size)


def count_samples(config: StageConfig) -> int:
    """Samples in the data of a stage, of either kind, after the checks that need no worker.

    Raises:
        InputError, StorageError: the data are not what the stage needs; the message says where.
    """
    if holds_features(config.uris):
        return open_features(config.uris, config.texts, edits=config.edits).rows
    return open_images(config.uris, config.columns).rows


def announcement(
    plan: Plan, state: TrainState, features: FeatureSource[Any], *, token_limit: int
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
    if len(config.data) > 1 or plan.epoch_samples != plan.source_rows:
        told = describe_mixture(config, plan.source_rows)
        lines.append(f"an epoch has {told}")
    if plan.shapes is not None:
        lines += plan.shapes.announcement(config.batch_size, config.source_names)
    elif plan.rows < config.batch_size:
        lines.append(
            f"{plan.rows} samples are fewer than a batch of {config.batch_size}: they repeat in it"
        )
    if held and (cut := held.count_cut(token_limit)):
        lines.append(f"{cut} texts fill all {token_limit} condition tokens; longer ones were cut")
    return "\n".join(lines)


def resumption(plan: Plan, state: TrainState) -> str:
    """Where a run stands that goes on from a checkpoint."""
    epoch, batch = divmod(state.step, plan.steps_per_epoch)
    lines = [
        f"resumed after step {state.step} of {plan.steps} (epoch {epoch}, batch "
        f"{batch} of {plan.steps_per_epoch})"
    ]
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
