"""The frame of every data job: begin or find it done, run, commit, account, report."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from pydantic import Field
from ray.data import Dataset

from dim import records
from dim.config import StrictModel, dump_config
from dim.designers import CallOptions
from dim.errors import DimError, InputError
from dim.failures import find_dim_error
from dim.redaction import redacted
from infra.storage import open_store
from infra.tracking import Run, Tracking, code_version, default_uri
from pipelines.calls.answers import set_unusable_aside
from pipelines.calls.bill import is_billed, write_bill
from pipelines.calls.engine import EngineOptions
from pipelines.cluster import connect
from pipelines.outcome import FAILED, KEPT, REJECTED
from pipelines.outputs import card
from pipelines.outputs import manifest as manifests
from pipelines.outputs.commit import FOLDERS, Limits, Piece, commit
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
from pipelines.outputs.shards import Shards
from pipelines.outputs.sink import ROWS_PER_RANGE, STAGING, OutcomeSink
from pipelines.ranges import TIMEOUT_S

REPORT = "report.html"
"""A page that a job may leave in its output, for MLflow to keep."""

_WITH_CARD = ("edit", "t2i")

# Settings that say how a job runs and not what comes out: they may differ between two runs.
_HOW_ONLY = frozenset(
    {
        "out",
        "batch_size",
        "workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "range_timeout_s",
        "tracking",
        "licences",
        "engine",
        "calls.in_flight",
        "calls.timeout_s",
        "calls.retries",
        "calls.busy_s",
        "calls.requests_per_minute",
        "calls.tokens_per_minute",
        "calls.input_price",
        "calls.output_price",
        "calls.budget",
        "calls.hedge_after",
        "calls.breaker",
        "fetch.workers",
        "fetch.per_host",
        "fetch.per_host_per_second",
        "fetch.timeout_s",
        "fetch.attempts",
        "fetch.max_wait_s",
    }
)


# What is said of an input besides what it is: it may differ between two runs as well.
_SAID_ONLY = frozenset({"hidden"})


class TrackingConfig(StrictModel):
    """Where a job's MLflow run goes. Without ``uri``: MLFLOW_TRACKING_URI, else a file in out."""

    uri: str | None = None
    experiment: str = "dim-data"


class JobConfig(StrictModel):
    """What every data job is told."""

    out: str
    """Address of the output folder."""
    rows_per_file: int = Field(16_384, ge=1)
    """Places in the input per output file at most."""
    target_file_mb: float = Field(256, gt=0)
    """Size of an output file at most, in units of 2**20 bytes before compression."""
    range_timeout_s: float = Field(TIMEOUT_S, gt=0)
    """Seconds that a task may take for a range of records. One that takes longer ends, and is begun
    again with care: each record alone, in an eighth of this."""
    licences: dict[str, str] = Field(default_factory=dict)
    """The licence of each source, for the dataset card: ``licences.NAME=cc-by-4.0``."""
    tracking: TrackingConfig | None = None
    """Log to MLflow. Without this, a job logs only if MLFLOW_TRACKING_URI is set."""

    @property
    def rows_per_range(self) -> int:
        """Places in the input that one task reads; a file holds one range or several."""
        return min(self.rows_per_file, ROWS_PER_RANGE)


class AskingConfig(JobConfig):
    """What a job is told that asks a model about every record."""

    calls: CallOptions = CallOptions()
    engine: EngineOptions = EngineOptions()
    """How a local model (``vllm:MODEL``) runs."""
    workers: int = Field(1, ge=1)
    """Processes that each hold the model; fewer for a few records."""
    cpus_per_worker: float = Field(0.5, gt=0)
    """What each is reckoned to need: one that calls a server mostly waits."""
    batch_size: int = Field(64, ge=1)
    """Records that a step works on at a time."""

    def workers_for(self, rows: int) -> int:
        """How many workers so many records keep busy."""
        return max(1, min(self.workers, rows // self.batch_size))


class Job:
    """One run of a data job.

    Args:
        name: what it is called in its manifest and in MLflow.
        config: its settings.
        schema: the columns of the records it keeps.
        identity: what it reads, the same exactly when the input is the same.
        rows: how many records it reads.
        group_bytes: size of a row group of its output, as ``Limits`` takes it.
        rows_per_write: records that are written together at least, as ``OutcomeSink`` takes it.
        asks: the designer or captioner whose answers it keeps and pays, if there is one.
    """

    def __init__(
        self,
        name: str,
        config: JobConfig,
        schema: pa.Schema,
        *,
        identity: Mapping[str, Any],
        rows: int,
        group_bytes: int | None = None,
        rows_per_write: int | None = ROWS_PER_RANGE,
        asks: str | None = None,
    ) -> None:
        self.name = name
        self.store = open_store(config.out)
        self._config = config
        self._settings = redacted(dump_config(config))
        self._schema = schema
        self._identity = redacted({**identity, "rows": rows})
        self._rows = rows
        self._group_bytes = group_bytes
        self._rows_per_write = rows_per_write
        self._asks = asks

    def run(
        self,
        build: Callable[[], Dataset | Sequence[Piece]],
        *,
        overwrite: bool = False,
        retry_failed: bool = False,
    ) -> Manifest:
        """Bring the output folder to hold the records of ``build()``, and say what is in it.

        A finished output of the same settings and input is left as it is, an unfinished one is
        made again; answers that were paid for are kept in either case.

        Args:
            build: makes the data set of records with outcomes, or says where they lie already;
                only called when there is work.
            overwrite: replace a finished output, whatever made it.
            retry_failed: make a finished output again if records failed in it, and ask again
                what was answered with nothing.

        Raises:
            InputError: the folder holds something else, and ``overwrite`` is not set.
            StorageError: it cannot be written.
            DimError: whatever stopped the job, in one sentence.
        """
        if retry_failed and self._asks is not None:
            set_unusable_aside(self.store)
        done = manifests.read(self.store)
        if done is not None and not overwrite:
            self._check_same(done)
            if not (retry_failed and done.counts.failed):
                self._tidy()
                return done
        self._begin(overwrite=overwrite)
        with _one_sentence(), self._tracked() as tracked:
            connect()
            started = time.monotonic()
            manifest = self._write(build())
            tracked(manifest, time.monotonic() - started)
        return manifest

    def _check_same(self, done: Manifest) -> None:
        if done.job != self.name:
            raise InputError(
                f"{self.store.uri} holds the output of 'data {done.job}'; choose another --out"
            )
        changes = [
            *manifests.differences(_what(done.config), _what(self._settings)),
            *manifests.differences(_which(done.input), _which(self._identity), "input "),
        ]
        if changes:
            raise InputError(
                f"{self.store.uri} holds a finished output made otherwise ({changes[0]}"
                f"{f' and {len(changes) - 1} more' if len(changes) > 1 else ''}); choose another "
                "--out, or --overwrite it"
            )

    def _begin(self, *, overwrite: bool) -> None:
        """Claim the folder, and clear what an earlier attempt left, but for its answers."""
        ours = self.store.is_file(manifests.MARKER) or self.store.is_file(manifests.NAME)
        if not ours and not self.store.is_empty():
            raise InputError(
                f"{self.store.uri} is not empty and holds no output of a data job; choose "
                "another --out"
            )
        self.store.write(manifests.MARKER, f'{{"job": "{self.name}"}}\n'.encode())
        for name in (manifests.NAME, card.NAME, REPORT, STAGING, *FOLDERS.values()):
            self.store.delete(name)

    def _write(self, made: Dataset | Sequence[Piece]) -> Manifest:
        config = self._config
        pieces = self._stage(made) if isinstance(made, Dataset) else made
        limits = Limits(config.rows_per_file, int(config.target_file_mb * 2**20), self._group_bytes)
        files = commit(self.store, self._schema, pieces, limits)
        billed = self._asks is not None and is_billed(self._asks)
        manifest = Manifest(
            job=self.name,
            config=self._settings,
            input=self._identity,
            counts=self._count(pieces, files),
            files=tuple(files),
            cost=write_bill(self.store) if billed else None,
        )
        if records.kind_of(self._schema) in _WITH_CARD:
            card.write(Shards(self.store, manifest))
        manifests.write(self.store, manifest)
        self._tidy()
        return manifest

    def _stage(self, dataset: Dataset) -> Sequence[Piece]:
        most = self._rows_per_write
        together = None if most is None else min(most, self._config.rows_per_file)
        sink = OutcomeSink(self.store, self._schema, together)
        dataset.write_datasink(sink)
        return sink.pieces

    def _tidy(self) -> None:
        """Clear what is only there until the manifest is written; a kill may come in between."""
        if self.store.is_file(manifests.MARKER):
            self.store.delete(STAGING)
            self.store.delete(manifests.MARKER)

    def _count(self, pieces: Sequence[Piece], files: list[FileEntry]) -> Counts:
        rows: Counter[str] = Counter()
        for file in files:
            rows[file.path.partition("/")[0]] += file.rows
        reasons: Counter[str] = Counter()
        for piece in pieces:
            reasons.update(piece.reasons)
        counts = Counts(
            input=self._rows,
            kept=rows[FOLDERS[KEPT]],
            rejected=rows[FOLDERS[REJECTED]],
            failed=rows[FOLDERS[FAILED]],
            by_reason=dict(sorted(reasons.items())),
        )
        if not counts.add_up():
            raise DimError(f"the records of {self.store.uri} do not add up: {counts}")
        return counts

    @contextmanager
    def _tracked(self) -> Iterator[Callable[[Manifest, float], None]]:
        """An MLflow run around the job, if one is wanted, and how to report to it."""
        chosen = self._config.tracking
        if chosen is None and not os.environ.get("MLFLOW_TRACKING_URI"):
            yield lambda manifest, seconds: None
            return
        chosen = chosen or TrackingConfig()
        tracking = Tracking(chosen.uri or default_uri(self._config.out), chosen.experiment)
        tags = {"job": self.name, **code_version()}
        with tracking.run(f"data {self.name}", self._settings, tags) as run:
            self._report_input(run)
            yield lambda manifest, seconds: self._report(run, manifest, seconds)

    def _report_input(self, run: Run) -> None:
        where = [
            self._identity.get("uri"),
            self._identity.get("file"),
            self._settings.get("images"),
        ]
        run.log_dataset(
            f"{self.name} input",
            next((str(uri) for uri in where if uri), None),
            _digest(self._identity),
            context="input",
            profile=self._identity,
        )

    def _report(self, run: Run, manifest: Manifest, seconds: float) -> None:
        """Log what came out: numbers, the output as a data set, the manifest and the report."""
        counts = manifest.counts
        whole = max(counts.input, 1)
        run.log_metrics(
            {
                "input": counts.input,
                "kept": counts.kept,
                "rejected": counts.rejected,
                "failed": counts.failed,
                "kept_share": counts.kept / whole,
                "rejected_share": counts.rejected / whole,
                "failed_share": counts.failed / whole,
                "seconds": seconds,
                "records_per_second": counts.input / max(seconds, 1e-9),
                "bytes": sum(file.bytes for file in manifest.files),
                **{f"rejected/{reason}": rows for reason, rows in counts.by_reason.items()},
                **{f"cost/{name}": value for name, value in (manifest.cost or {}).items()},
            }
        )
        run.log_dataset(
            f"{self.name} output",
            self.store.uri,
            _digest([file.sha256 for file in manifest.files]),
            context="output",
            schema=self._schema,
            profile=counts.model_dump(),
        )
        run.log_dict(manifest.model_dump(mode="json"), manifests.NAME)
        for name in (card.NAME, REPORT):
            if self.store.is_file(name):
                run.log_text(self.store.read(name).decode(), name)


def _digest(value: Any) -> str:
    """A short hash, as MLflow wants for a data set."""
    return records.sha256_hex(json.dumps(value, sort_keys=True).encode())[:32]


def _what(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that decide what comes out."""
    chosen: dict[str, Any] = {}
    for key, value in settings.items():
        if f"{prefix}{key}" in _HOW_ONLY:
            continue
        chosen[key] = _what(value, f"{prefix}{key}.") if isinstance(value, dict) else value
    return chosen


def _which(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What tells an input from another one."""
    return {key: value for key, value in identity.items() if key not in _SAID_ONLY}


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Whatever Ray wrapped our errors in, raise the error itself."""
    try:
        yield
    except Exception as error:  # Ray's own error of a DimError is one too, with a traceback as text
        known = find_dim_error(error)
        if known is None:
            raise
        known.args = (str(known).partition("\n")[0],)  # Ray adds lines of advice on retries
        raise known from None
