"""What a job's driver tells of its ranges while it runs: metrics, log lines, and its span."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from infra import metrics, tracing
from infra.logs import log
from pipelines.outcome import FAILED, KEPT, REJECTED
from pipelines.outputs.files import FOLDERS
from pipelines.outputs.receipts import Receipt

_LONGEST = 2_000  # characters of an error


class Progress:
    """Counts the ranges of a job as they are done.

    Args:
        job: its name.
        output: address of its folder.
        of: how many ranges there are.
        done: how many are done already.
    """

    def __init__(self, job: str, output: str, of: int, done: int) -> None:
        self._job, self._output = job, output
        self._of, self._done = of, done
        metrics.of_jobs().ranges(job, done, of)
        log("job begun", data_job=job, output=output, ranges=of, ranges_done=done)

    def add(self, receipt: Receipt) -> None:
        """A range is done."""
        rows: Counter[str] = Counter()
        for file in receipt.files:
            rows[file.path.partition("/")[0]] += file.rows
        counted = metrics.of_jobs()
        counted.records(self._job, KEPT, rows[FOLDERS[KEPT]])
        counted.records(self._job, FAILED, rows[FOLDERS[FAILED]])
        for reason, count in receipt.reasons.items():
            counted.records(self._job, REJECTED, count, reason)
        self._done += 1
        counted.ranges(self._job, self._done, self._of)
        said = {outcome: rows[folder] for outcome, folder in FOLDERS.items()}
        log("range done", data_job=self._job, output=self._output, range=receipt.number, **said)


@contextmanager
def observed(job: str, output: str) -> Iterator[None]:
    """The whole of a job: a span, and a line about how it ended."""
    began = time.monotonic()
    who = {"data_job": job, "output": output}
    try:
        with tracing.here().span(f"data {job}", output=output):
            yield
    except BaseException as error:
        said = str(error) or type(error).__name__
        log("job failed", **who, error=said[:_LONGEST], seconds=time.monotonic() - began)
        raise
    log("job done", **who, seconds=time.monotonic() - began)
