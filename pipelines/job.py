"""The frame of every data job: begin or find it done, run, commit, account, report."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, TypedDict

import pyarrow as pa
from pydantic import Field
from ray.data import Dataset

from dim import records
from dim.config import HowOnly, StrictModel, dump_config, what_decides
from dim.errors import DimError, InputError
from dim.failures import find_dim_error
from dim.redaction import redacted
from infra.capacity import WAIT_S
from infra.cost import Prices, counted_cost
from infra.storage import open_store
from infra.tracking import Run, Tracking, code_version, default_uri
from pipelines.calls.answers import set_unusable_aside
from pipelines.calls.bill import is_billed, read_costs, write_bill
from pipelines.cluster import connect
from pipelines.outcome import FAILED, KEPT, REJECTED
from pipelines.outputs import card, histograms, receipts
from pipelines.outputs import manifest as manifests
from pipelines.outputs.files import FOLDERS, Limits
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
from pipelines.outputs.progress import Progress, observed
from pipelines.outputs.receipts import Done, RangeOutput, Receipt
from pipelines.outputs.shards import Shards
from pipelines.ranges import TIMEOUT_S

OnProgress = Callable[[int, int, float], None]
"""Is told how many ranges are done, of how many, and the dollars that were paid for them."""


class HowToRun(TypedDict, total=False):
    """What the ``run`` of every job takes besides its settings; see :meth:`Job.run`."""

    overwrite: bool
    retry_failed: bool
    on_progress: OnProgress | None


REPORT = "report.html"
"""A page that a job may leave in its output, for MLflow to keep."""

_WITH_CARD = ("edit", "t2i")

_DELETES = 16  # at a time
_ROWS_PER_RANGE = 512  # of an input that is cut before anybody knows how long it is

# What is said of an input besides what it is: it may differ between two runs as well.
_SAID_ONLY = frozenset({"hidden"})


class TrackingConfig(StrictModel):
    """Where a job's MLflow run goes. Without ``uri``: MLFLOW_TRACKING_URI, else a file in out."""

    uri: str | None = None
    experiment: str = "dim-data"
    prices: Prices = Field(default_factory=dict)
    """US dollars an hour of what a cluster has, see :mod:`infra.cost`; else no cost is told."""


class JobConfig(StrictModel):
    """What every data job is told."""

    out: Annotated[str, HowOnly]
    """Address of the output folder."""
    rows_per_file: int = Field(16_384, ge=1)
    """Records of the input per output file at most."""
    target_file_mb: float = Field(256, gt=0)
    """Size of an output file at most, in units of 2**20 bytes before compression."""
    range_timeout_s: Annotated[float, HowOnly] = Field(TIMEOUT_S, gt=0)
    """Seconds that a task may take for a range of records. One that takes longer ends, and is begun
    again with care: each record alone, in an eighth of this."""
    nodes_wait_s: Annotated[float, HowOnly] = Field(WAIT_S, gt=0)
    """Seconds to wait where no node of the cluster has what a worker wants and none will come."""
    licences: Annotated[dict[str, str], HowOnly] = Field(default_factory=dict)
    """The licence of each source, for the dataset card: ``licences.NAME=cc-by-4.0``."""
    tracking: Annotated[TrackingConfig | None, HowOnly] = None
    """Log to MLflow. Without this, a job logs only if MLFLOW_TRACKING_URI is set."""

    @property
    def rows_per_range(self) -> int:
        """Records that a task takes in at a time, and writes into files of their own."""
        return min(self.rows_per_file, _ROWS_PER_RANGE)


@dataclass(frozen=True)
class Remaining:
    """What a job is to do.

    Attributes:
        output: where its ranges go.
        todo: the numbers of those that are to be done.
        key: what is made of the input, and how, as a hash.
        retry: whether they were done before, and what failed in them is to be tried again.
    """

    output: RangeOutput
    todo: Sequence[int]
    key: str
    retry: bool = False


class Job:
    """One run of a data job.

    Args:
        name: what it is called in its manifest and in MLflow.
        config: its settings.
        schema: the columns of the records it keeps.
        identity: what it reads, the same exactly when the input is the same.
        rows: how many records it reads.
        ranges: in how many ranges; one is done whole or not at all.
        group_bytes: size of a row group of its output, as ``Limits`` takes it.
        asks: the designer or captioner whose answers it keeps and pays, if there is one.
    """

    def __init__(
        self,
        name: str,
        config: JobConfig,
        schema: pa.Schema,
        identity: Mapping[str, Any],
        rows: int,
        ranges: int,
        *,
        group_bytes: int | None = None,
        asks: str | None = None,
    ) -> None:
        self.name = name
        self.store = open_store(config.out)
        self._config = config
        self._settings = redacted(dump_config(config))
        self._schema = schema
        self._identity = redacted({**identity, "rows": rows})
        self._rows = rows
        self._ranges = ranges
        self._group_bytes = group_bytes
        self._asks = asks

    def run(
        self,
        build: Callable[[Remaining], Dataset],
        *,
        overwrite: bool = False,
        retry_failed: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Manifest:
        """Bring the output folder to hold all records, and say what is in it.

        A finished output of the same settings and input is left as it is. Of an unfinished one the
        ranges that have a receipt are kept, and answers that were paid for in any case. What goes
        with an output (card, bill, MLflow) comes when its manifest stands: if that fails the output
        is good, and the next call does it.

        Args:
            build: makes the data set of receipts of the ranges that are to be done; only called
                when there are any.
            overwrite: replace a finished output, whatever made it, when the new one is whole.
            retry_failed: do the ranges of a finished output again in which records failed, and ask
                again what was answered with nothing.
            on_progress: is told of every range that is done.

        Raises:
            InputError: the folder holds something else, and ``overwrite`` is not set; or somebody
                else has put another output there meanwhile.
            StorageError: it cannot be written.
            DimError: whatever stopped the job, in one sentence.
        """
        if retry_failed and self._asks is not None:
            set_unusable_aside(self.store)
        before = manifests.read_bytes(self.store)
        done = manifests.read(self.store)
        if done is not None and not overwrite:
            self._check_same(done)
            if not (retry_failed and done.counts.failed):
                if self._is_unfinished(before):  # it was killed, or something failed, after that
                    with _one_sentence(), self._tracked() as tracked:
                        self._go_with(done, lambda: tracked(done, None))
                return done
        self._begin(before)
        with (
            _one_sentence(),
            observed(self.name, self.store.uri),
            self._tracked() as tracked,
        ):
            connect(self._config.nodes_wait_s)
            started = time.monotonic()
            work, there = self._what_is_left(before, None if overwrite else done)
            progress = Progress(self.name, self.store.uri, work.output.of, len(there.receipts))
            if work.todo:
                dataset = build(work)
                tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
                for one in receipts.receipts_in(tables):
                    there.add(one)
                    progress.add(one)
                    if on_progress is not None:
                        on_progress(len(there.receipts), work.output.of, there.usd)
            manifest = self._publish(work.output, there, before)
            if before is not None:  # what went with the output that was there
                for name in (card.NAME, REPORT):
                    self.store.delete(name)
            seconds = time.monotonic() - started
            self._go_with(manifest, lambda: tracked(manifest, seconds))
        return manifest

    def _check_same(self, done: Manifest) -> None:
        if done.job != self.name:
            raise InputError(
                f"{self.store.uri} holds the output of 'data {done.job}'; choose another --out"
            )
        kind = type(self._config)
        changes = [
            *manifests.differences(
                what_decides(kind, done.config), what_decides(kind, self._settings)
            ),
            *manifests.differences(_which(done.input), _which(self._identity), "input "),
        ]
        if changes:
            raise InputError(
                f"{self.store.uri} holds a finished output made otherwise ({changes[0]}"
                f"{f' and {len(changes) - 1} more' if len(changes) > 1 else ''}); choose another "
                "--out, or --overwrite it"
            )

    def _is_unfinished(self, standing: bytes | None) -> bool:
        """Whether whoever wrote the manifest that stands has not done what comes after it.

        A run that is to replace this manifest, now or until it was killed, does not count.
        """
        if not self.store.is_file(manifests.MARKER):
            return False
        try:
            replaces = json.loads(self.store.read(manifests.MARKER)).get("replaces")
        except (ValueError, AttributeError):
            return True
        return bool(replaces != _hash(standing))

    def _begin(self, before: bytes | None) -> None:
        """Claim the folder; nothing of an earlier attempt, or of somebody else's, is touched."""
        ours = self.store.is_file(manifests.MARKER) or self.store.is_file(manifests.NAME)
        if not ours and not self.store.is_empty():
            raise InputError(
                f"{self.store.uri} is not empty and holds no output of a data job; choose "
                "another --out"
            )
        claim = json.dumps({"job": self.name, "replaces": _hash(before)})
        self.store.write(manifests.MARKER, f"{claim}\n".encode())

    def _what_is_left(
        self, before: bytes | None, retried: Manifest | None
    ) -> tuple[Remaining, Done]:
        """What there is to do, and what is done.

        Args:
            before: the manifest that stands, in place of which the new one comes.
            retried: the same where only what failed is done again.
        """
        config = self._config
        what = [
            self.name,
            what_decides(type(config), self._settings),
            _which(self._identity),
            str(self._schema.with_metadata(None)),
            {str(key): str(value) for key, value in (self._schema.metadata or {}).items()},
        ]
        replaced = _hash(before)
        output = RangeOutput(
            self.store,
            # A receipt is one of the attempts at *this* place: not of the output that stands.
            receipts.key_of(*what, replaced),
            self._ranges,
            self._schema,
            Limits(config.rows_per_file, int(config.target_file_mb * 2**20), self._group_bytes),
        )
        # Receipts are listed before the files are, which are there when their receipt is.
        found = [output.found()]
        if retried is not None:
            found.append(iter(receipts.without_failures(self.store, retried, self._ranges)))
        there = Done()
        for one in receipts.whole(self.store, chain(*found)):
            there.add(one)
        todo = [number for number in range(self._ranges) if number not in there.receipts]
        key = receipts.key_of(*what, replaced if retried is None else None)
        return Remaining(output, todo, key, retried is not None), there

    def _publish(self, output: RangeOutput, done: Done, before: bytes | None) -> Manifest:
        """Let all ranges be the output, unless somebody else has put one there meanwhile."""
        ranges = done.receipts.values()
        files = receipts.files_in_order(ranges)
        files = receipts.files_in_order(
            [*ranges, Receipt(number=0, files=tuple(output.write_missing(files)), reasons={})]
        )
        manifest = Manifest(
            job=self.name,
            config=self._settings,
            input=self._identity,
            counts=self._count(ranges, files),
            files=tuple(files),
            cost=self._cost(ranges) if self._is_billed else None,
            measured=None if done.measured is None else histograms.in_order(done.measured),
        )
        if lost := receipts.lacking(self.store, files):
            raise DimError(self._lost(lost[0]))
        if (theirs := manifests.read_bytes(self.store)) != before and theirs is not None:
            return self._theirs()
        manifests.write(self.store, manifest)
        # Whoever finished between the two last looks has cleared what only our manifest names.
        if lost := receipts.lacking(self.store, files):
            if manifests.read(self.store) != manifest:
                return self._theirs()
            self.store.delete(manifests.NAME)
            raise DimError(self._lost(lost[0]))
        return manifest

    def _cost(self, done: Iterable[Receipt]) -> dict[str, float]:
        """What all answers cost; those that a receipt sums up are not read again."""
        paid = (receipt.paid for receipt in done)
        return read_costs(self.store, {each.folder: each.sums for each in paid if each is not None})

    def _theirs(self) -> Manifest:
        """The output that somebody else has finished meanwhile, if it is the same."""
        theirs = manifests.read(self.store)
        if theirs is None:
            raise DimError(self._lost(manifests.NAME))
        self._check_same(theirs)
        return theirs

    def _lost(self, name: str) -> str:
        return (
            f"{self.store.address(name)} is gone or not whole: another run works on the same "
            "output; run this again when it has ended"
        )

    @property
    def _is_billed(self) -> bool:
        return self._asks is not None and is_billed(self._asks)

    def _go_with(self, manifest: Manifest, track: Callable[[], None]) -> None:
        """What goes with an output that stands: each is tried, whatever becomes of the others.

        Raises:
            DimError: something of it could not be done; the sentence says that the output is good.
        """
        extras: list[tuple[str, Callable[[], object]]] = []
        if self._is_billed:
            extras.append(("the bill", lambda: write_bill(self.store)))
        if records.kind_of(self._schema) in _WITH_CARD:
            extras.append(("the card", lambda: card.write(Shards(self.store, manifest))))
        extras.append(("MLflow", track))  # which keeps the card
        failures = [f"{name}: {error}" for name, error in _tried(extras)]
        if failures:
            raise DimError(
                f"{self.store.uri} is finished and good, but for {'; '.join(failures)} (the same "
                "command does that alone)"
            )
        self._tidy(manifest)

    def _tidy(self, manifest: Manifest) -> None:
        """Clear what is only there until all is done; a kill may come in between.

        What no manifest names is litter of a run that was killed, or of one that finds this output
        when it ends.
        """
        if manifests.read(self.store) != manifest:
            return
        named = {file.path for file in manifest.files}
        there = [name for folder in FOLDERS.values() for name, _ in self.store.list(folder)]
        with ThreadPoolExecutor(_DELETES) as pool:
            list(pool.map(self.store.delete, (name for name in there if name not in named)))
        self.store.delete(receipts.FOLDER)
        if not manifest.counts.failed:  # else they may be tried again
            self.store.delete(receipts.VERDICTS)
        self.store.delete(manifests.MARKER)

    def _count(self, done: Iterable[Receipt], files: list[FileEntry]) -> Counts:
        rows: Counter[str] = Counter()
        for file in files:
            rows[file.path.partition("/")[0]] += file.rows
        reasons: Counter[str] = Counter()
        for receipt in done:
            reasons.update(receipt.reasons)
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
    def _tracked(self) -> Iterator[Callable[[Manifest, float | None], None]]:
        """An MLflow run around the job, if one is wanted, and how to report to it."""
        chosen = self._config.tracking
        if chosen is None and not os.environ.get("MLFLOW_TRACKING_URI"):
            yield lambda manifest, seconds: None
            return
        chosen = chosen or TrackingConfig()
        tracking = Tracking(chosen.uri or default_uri(self._config.out), chosen.experiment)
        tags = {"job": self.name, **code_version()}
        with (
            tracking.run(f"data {self.name}", self._settings, tags) as run,
            counted_cost(run, chosen.prices) as cost,
        ):
            self._report_input(run)

            def report(manifest: Manifest, seconds: float | None) -> None:
                cost.calls_usd = (manifest.cost or {}).get("usd", 0.0)
                self._report(run, manifest, seconds)

            yield report

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

    def _report(self, run: Run, manifest: Manifest, seconds: float | None) -> None:
        """Log what came out: numbers, the output as a data set, the manifest and the report.

        ``seconds`` is how long it took; ``None`` if that was in an earlier call.
        """
        counts = manifest.counts
        whole = max(counts.input, 1)
        pace = {} if seconds is None else {"seconds": seconds}
        if seconds:
            pace["records_per_second"] = counts.input / seconds
        run.log_metrics(
            {
                **pace,
                "input": counts.input,
                "kept": counts.kept,
                "rejected": counts.rejected,
                "failed": counts.failed,
                "kept_share": counts.kept / whole,
                "rejected_share": counts.rejected / whole,
                "failed_share": counts.failed / whole,
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


def _tried(extras: Iterable[tuple[str, Callable[[], object]]]) -> Iterator[tuple[str, Exception]]:
    """Do one after another; those that failed."""
    for name, do in extras:
        try:
            do()
        except Exception as error:
            yield name, error


def _digest(value: Any) -> str:
    """A short hash, as MLflow wants for a data set."""
    return records.sha256_hex(json.dumps(value, sort_keys=True).encode())[:32]


def _hash(manifest: bytes | None) -> str | None:
    """What tells a manifest from another one."""
    return None if manifest is None else records.sha256_hex(manifest)


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
