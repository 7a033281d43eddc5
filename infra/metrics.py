"""Prometheus metrics of data jobs and training, at the metrics port of every Ray node.

Outside of a Ray cluster they count nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]


class JobMetrics:
    """What a data job's driver knows, tagged by ``job``."""

    def __init__(self) -> None:
        self._records = Counter(
            "dim_data_records",
            description="Records that are done, by outcome and, of rejected ones, reason.",
            tag_keys=("job", "outcome", "reason"),
        )
        self._left = Gauge(
            "dim_data_ranges_left", description="Ranges that are not done.", tag_keys=("job",)
        )
        self._all = Gauge(
            "dim_data_ranges", description="Ranges of the job's input.", tag_keys=("job",)
        )

    def records(self, job: str, outcome: str, count: int, reason: str = "") -> None:
        """Count records that are done."""
        if count:
            self._records.inc(count, tags={"job": job, "outcome": outcome, "reason": reason})

    def ranges(self, job: str, done: int, of: int) -> None:
        """Say how many ranges are done, of how many."""
        self._all.set(of, tags={"job": job})
        self._left.set(of - done, tags={"job": job})


class CallMetrics:
    """What a worker knows of its calls to models."""

    def __init__(self) -> None:
        self._calls = Counter(
            "dim_model_calls",
            description="Answers of models; unusable ones were paid for and hold nothing.",
            tag_keys=("outcome",),
        )
        self._tokens = Counter(
            "dim_model_tokens", description="Tokens read and written.", tag_keys=("direction",)
        )
        self._usd = Counter("dim_model_usd", description="US dollars, by the job's prices.")
        self._seconds = Histogram(
            "dim_model_seconds", description="From a request to its answer.", boundaries=SECONDS
        )

    def answered(self, outcome: str, tokens: tuple[int, int], usd: float, seconds: float) -> None:
        """Count an answer: ``answered`` or ``unusable``, tokens read and written."""
        self._calls.inc(tags={"outcome": outcome})
        for direction, count in zip(("in", "out"), tokens, strict=True):
            if count:
                self._tokens.inc(count, tags={"direction": direction})
        if usd:
            self._usd.inc(usd)
        self._seconds.observe(seconds)


_TRAINING = {
    "samples_per_second": ("dim_train_samples_per_second", "Samples a second, of all workers."),
    "loss": ("dim_train_loss", "Mean loss since the last line."),
    "data_wait": ("dim_train_data_wait", "Share of the time without samples to compute on."),
    "memory_gb": ("dim_train_memory_gb", "The most that the first worker has held, in 1e9 bytes."),
    "mfu": ("dim_train_mfu", "What the work is of the GPUs' peak, where that is known."),
    "skipped_updates": ("dim_train_skipped_updates", "Updates whose gradients were no numbers."),
    "progress": ("dim_train_progress", "Share of the steps that is done."),
}


class TrainingMetrics:
    """What the first worker of a stage knows, tagged by ``stage``."""

    def __init__(self) -> None:
        self._gauges = {
            key: Gauge(name, description=said, tag_keys=("stage",))
            for key, (name, said) in _TRAINING.items()
        }
        self._samples = Counter(
            "dim_train_samples", description="Samples trained on.", tag_keys=("stage",)
        )

    def line(self, stage: str, samples: int, metrics: Mapping[str, float]) -> None:
        """Take a line of the stage's log, and how many samples came since the last one."""
        tags = {"stage": stage}
        if samples:
            self._samples.inc(samples, tags=tags)
        for key, gauge in self._gauges.items():
            if key in metrics:
                gauge.set(metrics[key], tags=tags)


@cache
def of_jobs() -> JobMetrics:
    """Those of this process."""
    return JobMetrics()


@cache
def of_calls() -> CallMetrics:
    """Those of this process."""
    return CallMetrics()


@cache
def of_training() -> TrainingMetrics:
    """Those of this process."""
    return TrainingMetrics()
