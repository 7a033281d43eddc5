"""What a training stage is: its YAML, its defaults and its rules."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from dim.config import StrictModel
from dim.errors import ConfigError
from dim.judges import check_name
from dim.learning.config import StageInputs
from dim.learning.optimizer import OptimizerName
from dim.model.lora.settings import LoraSettings
from dim.records import TextName
from infra.capacity import WAIT_S
from infra.cost import Prices

# What may change between an interrupted run and its continuation: nothing that moves a weight.
OPERATIONAL_KEYS = frozenset(
    {
        "out",
        "workers",
        "resize_interval_s",
        "cpus_per_worker",
        "use_gpu",
        "micro_batch",
        "parallelism",
        "compile",
        "ema_on_cpu",
        "encode_batch",
        "prefetch_steps",
        "bad_samples",
        "gradient_checkpointing",
        "log_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_checkpoints",
        "keep_best",
        "keep_hours",
        "max_skips",
        "max_returns",
        "max_failures",
        "owner_wait_s",
        "owner_timeout_s",
        "export_understanding",
        "nodes_wait_s",
        "collective_timeout_s",
        "price_per_hour",
        "validation",
        "tracking",
        "registry",
    }
)

# What moves weights and may change all the same while a run is unfinished; it is recorded.
CHANGEABLE_KEYS = frozenset({"learning_rate"})


AUTO_JUDGE, NO_JUDGE = "auto", "none"


class ValidationConfig(StrictModel):
    """Held-out samples that are painted, as ``dim edit`` would, and scored during training."""

    data: list[str] = Field(min_length=1)  # output folders of data jobs, held out
    samples: PositiveInt = 32  # that are painted each time
    every: PositiveInt | None = None  # steps between two validations; None = at the end only
    steps: PositiveInt | None = None  # of the sampler; None = as the model samples
    guidance_scale: float | None = Field(default=None, ge=1)  # None = the model's
    # Who scores what is painted (``dim.judges``), or none; auto = tabletop where it is known.
    judge: str = "auto"
    grid_rows: PositiveInt = 8  # samples shown in the picture that goes to MLflow
    batch_size: PositiveInt = 32  # samples painted at once

    @field_validator("judge")
    @classmethod
    def _check_judge(cls, name: str) -> str:
        if name not in (AUTO_JUDGE, NO_JUDGE):
            try:
                check_name(name)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return name


class ParallelismConfig(StrictModel):
    """What each worker holds of weights, gradients and optimizer.

    ``ddp``: all. ``fsdp``: one of ``workers`` parts. ``hsdp``: one of ``shard`` parts, so that
    groups of ``shard`` workers (those of a machine, say) hold the same.
    """

    strategy: Literal["ddp", "fsdp", "hsdp"] = "ddp"  # who holds how much, as above
    shard: PositiveInt | None = None  # workers that hold one copy between them

    def parts(self, workers: int) -> int:
        """How many workers hold one copy between them.

        Raises:
            ValueError: ``shard`` does not go with the strategy and the number of workers.
        """
        shard = self.shard
        if self.strategy == "hsdp":
            if shard is None or workers % shard:
                raise ValueError(
                    f"strategy hsdp needs a shard that divides the {workers} workers, not {shard}"
                )
            return shard
        parts = workers if self.strategy == "fsdp" else 1
        if shard not in (None, parts):
            raise ValueError(
                f"strategy {self.strategy} on {workers} workers has shard {parts}, not {shard}: "
                "leave shard out, or choose strategy hsdp"
            )
        return parts


class KeepBestConfig(StrictModel):
    """Which checkpoint is the best: a metric of validation. One is made after each validation."""

    metric: str = Field("validation_exact", pattern="^validation_")  # one that validation logs
    higher_is_better: bool = True  # of the metric


class TrackingConfig(StrictModel):
    """Where MLflow lives. Without ``uri``: MLFLOW_TRACKING_URI, else SQLite in the stage's out."""

    uri: str | None = None  # MLflow's address
    experiment: str = "dim-training"  # MLflow's name for runs that belong together
    prices: Prices = Field(default_factory=dict)
    """US dollars an hour of what a cluster has, see :mod:`infra.cost`; else no cost is told."""


class RegistryConfig(StrictModel):
    """As what a finished stage is registered with MLflow. Its stage's name becomes an alias."""

    name: str = Field("dim", pattern=r"^[^/@:]+$")  # of the registered model
    champion: str | None = "validation_exact"
    """The metric by which a version becomes the alias ``champion``; ``null``: none does."""
    higher_is_better: bool = True  # of that metric


class StageConfig(StageInputs):
    """One training stage, as its YAML file says it. Exactly one of ``steps`` and ``epochs``."""

    out: str  # address of the folder for checkpoints, the model and the run's record

    steps: PositiveInt | None = None  # updates of the weights
    epochs: PositiveInt | None = None  # times that each sample is used, of the mixture
    batch_size: PositiveInt  # over all workers
    learning_rate: PositiveFloat  # after warm-up; may change while a run is unfinished
    warmup_steps: NonNegativeInt = 0  # over which the rate rises from nothing, linearly
    schedule: Literal["constant", "cosine"] = "constant"  # of the rate after that; cosine ends at 0
    optimizer: OptimizerName = "adamw"  # muon is for hidden matrices, with AdamW for the rest
    weight_decay: float = Field(default=0.0, ge=0)  # of the optimizer, decoupled
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW's two moments
    grad_clip: PositiveFloat = 1.0  # largest norm of all gradients together
    condition_dropout: float = Field(default=0.1, ge=0, le=1)  # share of rows that learn unguided
    # Of the moving average of the weights, which is then what is exported; None = no average.
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    # How much more a latent cell counts whose source and target differ. 1 = the published loss.
    changed_cell_weight: float = Field(default=1.0, ge=1)
    seed: NonNegativeInt = 0  # of order, noise, noise levels and dropped conditions
    lora: LoraSettings | None = None  # train an adapter of painter and connector; else all of both

    # Fewest and most where a run goes on with those that there are. Nothing depends on how many.
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    resize_interval_s: PositiveFloat = 600.0  # between two looks whether there could be more
    cpus_per_worker: PositiveInt = 1  # reserved with Ray; also the threads of its torch
    use_gpu: bool = False  # one for each worker
    micro_batch: PositiveInt | None = None  # samples of a worker's forward pass; None = its share
    parallelism: ParallelismConfig = ParallelismConfig()
    ema_on_cpu: bool = False  # less memory of the GPU for a copy of the weights at every update
    compile: bool = False  # the painter's blocks: minutes before the first steps, then faster ones
    cache_features: bool = True  # in memory; else computed, or read from their shards, as needed
    gradient_checkpointing: bool = False  # less memory for a second forward pass; the same weights
    encode_batch: PositiveInt = 64  # samples of a frozen part's forward pass
    prefetch_steps: PositiveInt = 2  # read and decoded while a step is computed, where not cached
    # How many neighbours a slot mixes; None = all of its samples, each for a row group's reading.
    shuffle_window: PositiveInt | None = None
    bad_samples: float = Field(default=0.01, ge=0, le=1)  # share that may be replaced by others

    log_every: PositiveInt = 10  # steps between two lines and two points in MLflow
    checkpoint_every: PositiveInt | None = None  # steps; None = at the end only
    checkpoint_minutes: PositiveFloat | None = None  # without one, then one is made
    keep_checkpoints: PositiveInt = 2  # the last ones
    keep_best: KeepBestConfig | None = None  # this one too, whatever its age
    keep_hours: PositiveFloat | None = None  # and one for every so many hours
    max_skips: PositiveInt = 10  # updates in a row without a finite gradient, then back
    max_returns: NonNegativeInt = 3  # to a checkpoint, with other draws; then the run ends
    max_failures: int = Field(default=3, ge=-1)  # worker deaths survived; -1 = any number
    owner_wait_s: NonNegativeInt = 0  # for another driver of the same out, if it lives, to end
    owner_timeout_s: PositiveFloat = 60.0  # without a sign of life, this driver counts as dead
    nodes_wait_s: PositiveFloat = WAIT_S  # where no node has what a worker wants, nor will come
    collective_timeout_s: PositiveInt = 1800  # that workers wait for one another in a step
    price_per_hour: float | None = Field(default=None, ge=0)  # dollars a worker, for the metrics
    validation: ValidationConfig | None = None
    tracking: TrackingConfig = TrackingConfig()
    # Whether the model that is made holds the frozen understanding model, or says where it lies.
    export_understanding: Literal["copy", "reference"] = "copy"
    registry: RegistryConfig | None = RegistryConfig()  # null: the model is not registered

    @model_validator(mode="after")
    def _check_together(self) -> StageConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        fewest, most = self.worker_range
        if fewest > most:
            raise ValueError(f"workers [{fewest}, {most}]: the fewest stand first")
        if self.batch_size < most:
            raise ValueError(
                f"batch_size {self.batch_size} leaves some of {most} workers without a sample"
            )
        if self.keep_best is not None and self.validation is None:
            raise ValueError(
                f"keep_best goes by {self.keep_best.metric}, and validation is not set"
            )
        if fewest < most and self.parallelism.strategy == "hsdp":
            raise ValueError(
                f"strategy hsdp goes with a fixed number of workers: not all numbers from {fewest} "
                f"to {most} divide into groups; choose fsdp"
            )
        if self.lora is not None and self.export_understanding != "copy":
            raise ValueError(
                "export_understanding goes with stages without lora, which make a model"
            )
        sharded = max(self.parallelism.parts(n) for n in range(fewest, most + 1)) > 1
        if sharded and self.lora is not None:
            raise ValueError(
                f"lora goes with strategy ddp, not {self.parallelism.strategy}: an adapter is small"
            )
        if sharded and self.optimizer == "adamw8bit":
            raise ValueError(
                f"optimizer adamw8bit goes with strategy ddp; under {self.parallelism.strategy} "
                "the workers share the optimizer's memory already: choose adamw"
            )
        if sharded and self.ema_on_cpu:
            raise ValueError(
                f"ema_on_cpu goes with strategy ddp; under {self.parallelism.strategy} the workers "
                "share the averages already"
            )
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """The fewest workers to train with, and the most."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def validation_text(self) -> TextName:
        """The text validation paints from: the most frequent one of training."""
        return max(zip(self.text_shares, self.texts, strict=True))[1]


def learning_rate_at(config: StageConfig, step: int, steps: int) -> float:
    """The learning rate of update ``step`` (from 0) of ``steps``: linear warm-up, then schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
