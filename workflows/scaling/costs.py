"""What a job costs: so much once, so much a range, so much a record, as a benchmark measured it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat
from scipy.optimize import nnls

from dim.config import StrictModel, load_config
from dim.errors import ConfigError
from pipelines.job import JobConfig
from pipelines.outputs.files import GROUP_ROWS
from pipelines.ranges import rows_per_range

JOBS = ("ingest-pairs", "filter-pairs", "edit", "ingest-images", "filter-images", "t2i")
"""Jobs whose costs are measured."""


class Amounts(StrictModel):
    """What something takes: CPU seconds of all processes, bytes, requests, memory.

    ``reads`` and ``writes`` are requests to the object store, ``calls`` those to a model, and
    ``driver_bytes`` what the job's driver holds at its peak.
    """

    cpu_seconds: NonNegativeFloat = 0
    read_bytes: NonNegativeFloat = 0
    written_bytes: NonNegativeFloat = 0
    reads: NonNegativeFloat = 0
    writes: NonNegativeFloat = 0
    calls: NonNegativeFloat = 0
    driver_bytes: NonNegativeFloat = 0

    def __add__(self, other: Amounts) -> Amounts:
        """Both together."""
        values = {name: getattr(self, name) + getattr(other, name) for name in _NAMES}
        return Amounts(**values)

    def times(self, factor: float, *, but: Sequence[str] = ()) -> Amounts:
        """So many times as much, except of the fields ``but``."""
        values = {name: getattr(self, name) for name in _NAMES}
        return Amounts(**{k: v if k in but else v * factor for k, v in values.items()})


_NAMES = tuple(Amounts.model_fields)
_NOT_PIXELS = ("calls", "driver_bytes")  # what does not grow with a picture


class JobCost(StrictModel):
    """What a job takes: once, for each range of its input, for each record, and for each record
    that is read again, because the last pieces of a filter's input are cut for all cores to end
    together."""

    once: Amounts = Amounts()
    a_range: Amounts = Amounts()
    a_record: Amounts = Amounts()
    a_last: Amounts = Amounts()

    def of(self, records: int, ranges: int, cores: int, *, pictures: float = 1.0) -> Amounts:
        """What so many records in so many ranges take.

        Args:
            records: of the input.
            ranges: into which the job cuts it.
            cores: of the cluster.
            pictures: how many times as large as the measured ones they are, in pixels.
        """
        parts = zip((self.once, self.a_range, self.a_record, self.a_last),
                    terms(records, ranges, cores), (1.0, 1.0, pictures, pictures),
                    strict=True)  # fmt: skip
        found = Amounts()
        for part, count, larger in parts:
            found += part.times(larger, but=_NOT_PIXELS).times(count)
        return found


class Run(NamedTuple):
    """A job that was measured: its records and ranges, the cores, and what it took."""

    records: int
    ranges: int
    cores: int
    took: Amounts


def terms(records: int, ranges: int, cores: int) -> tuple[float, float, float, float]:
    """What a job's cost is a sum over: itself, its ranges, records, and the last records."""
    piece = min(GROUP_ROWS, records / ranges)
    return 1.0, ranges, records, min(records, cores * piece)


def fit(runs: Sequence[Run]) -> JobCost:
    """The cost that explains some runs best, none of its parts below 0.

    Args:
        runs: four or more that differ in records and in ranges.
    """
    known = np.array([terms(run.records, run.ranges, run.cores) for run in runs])
    parts: list[dict[str, float]] = [{}, {}, {}, {}]
    for name in _NAMES:
        found, _ = nnls(known, np.array([getattr(run.took, name) for run in runs]))
        for part, value in zip(parts, found, strict=True):
            part[name] = float(value)
    names = ("once", "a_range", "a_record", "a_last")
    return JobCost(**{name: Amounts(**part) for name, part in zip(names, parts, strict=True)})


class Measurement(StrictModel):
    """How numbers were found: the command that prints them, when, and on what machine."""

    command: str
    date: date
    machine: str


class Costs(Measurement):
    """The measured costs of all jobs.

    ``megapixels`` are those of a measured picture, of which a pair has two.
    """

    megapixels: PositiveFloat
    jobs: dict[str, JobCost] = Field(min_length=1)

    def of(self, job: str) -> JobCost:
        """The cost of one.

        Raises:
            ConfigError: it was not measured.
        """
        if job not in self.jobs:
            raise ConfigError(f"the costs have no job {job!r}; they have {', '.join(self.jobs)}")
        return self.jobs[job]


def load_costs(path: str | Path) -> Costs:
    """Read a file of measured costs.

    Raises:
        ConfigError: it is missing, or is none.
    """
    return load_config(Costs, path)


def ranges_for(job: str, records: int) -> int:
    """Into how many ranges a job cuts an input of so many records, by its own rule."""
    settings = JobConfig(out="")
    if job.startswith("ingest"):
        return math.ceil(records / settings.rows_per_range)
    return math.ceil(records / rows_per_range(records, settings.rows_per_file))
