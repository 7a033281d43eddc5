"""What a worker says of its stage: to MLflow, and to the driver that shows it."""

from __future__ import annotations

import logging
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from PIL import Image

from infra.logs import log
from infra.metrics import of_training
from infra.tracking import Run, Tracking, TrackingError
from training import parallel
from training.breakdown import Breakdown
from training.plan import Plan
from training.progress import Teller, find_teller
from training.stage import learning_rate_at
from training.throughput import Throughput

SAID = "said"  # the tag that holds what was said last
_SAID_LINES = 20
_SAY_SECONDS = 15.0
_FLUSH_SECONDS = 2.0
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


class RunLog:
    """Rank 0's way to MLflow and the driver; on other ranks (``run`` is ``None``) it does nothing.

    The tracker was checked before the first step. Should it fail later, hours of training are
    worth more than its points: they are kept and sent again, and a line says so.
    """

    def __init__(self, run: Run | None, tell: Teller | None = None, stage: str = "") -> None:
        self._run = run
        self._stage = stage
        self._tell = tell or (lambda lines, metrics: None)
        self._rows: list[tuple[int, Mapping[str, float]]] = []
        self._lines: list[str] = []
        self._sent = time.monotonic()
        self._failing = False

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note ``metrics`` at ``step``; they are sent to MLflow every two seconds."""
        if self._run is None:
            return
        self._tell([], metrics)
        self._rows.append((step, dict(metrics)))
        if time.monotonic() - self._sent >= _FLUSH_SECONDS:
            self.flush()

    def count(self, samples: int, metrics: Mapping[str, float]) -> None:
        """Show ``metrics``, and the samples since the last ones, to Prometheus."""
        if self._run is not None:
            of_training().line(self._stage, max(0, samples), metrics)

    def flush(self) -> None:
        """Send what is kept."""
        if self._run is None or not self._rows:
            return
        self._sent = time.monotonic()
        try:
            self._run.log_metric_rows(self._rows)
        except TrackingError as error:
            if not self._failing:
                self.say(f"warning: {error}; training goes on, metrics are kept and sent later")
            self._failing = True
            return
        self._failing = False
        self._rows.clear()

    def say(self, text: str) -> None:
        """Lines for a human: in the worker's log, and (the latest ones) as the run's tag."""
        if self._run is None:
            return
        now = time.strftime("%H:%M:%S")
        lines = [f"{now} {line}" for line in text.splitlines()]
        self._tell(lines, {})
        log(text, stage=self._stage, run=self._run.id)
        self._lines = [*self._lines, *lines][-_SAID_LINES:]
        # Not print: Ray Train also turns that into a record of its own log, and shows both.
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        with suppress(TrackingError):
            self._run.set_tags({SAID: "\n".join(self._lines)})

    def picture(self, image: Image.Image, name: str) -> None:
        """Store an image as the run's artifact ``name``."""
        if self._run is None:
            return
        try:
            self._run.log_figure(image, name)
        except TrackingError as error:
            self.say(f"warning: {error}; training goes on without this picture")

    def file(self, file: Path, folder: str) -> None:
        """Store a file as the run's artifact in ``folder``."""
        if self._run is None:
            return
        try:
            self._run.log_artifact(file, folder)
        except TrackingError as error:
            self.say(f"warning: {error}; {file.name} is in the stage's output only")

    def validation(self, step: int, metrics: Mapping[str, float], sheet: Image.Image) -> None:
        """Note, show and say what validation after ``step`` found."""
        self.add(step, metrics)
        self.picture(sheet, f"validation/step-{step:08d}.png")
        named = (
            f"{name.removeprefix('validation_')} {value:.3f}"
            for name, value in metrics.items()
            if "/" not in name  # parts of another one
        )
        self.say(f"validation after step {step}: {', '.join(named)}")

    def close(self) -> None:
        """Send the rest.

        Raises:
            TrackingError: the tracker has not come back.
        """
        if self._run is not None and self._rows:
            self._run.log_metric_rows(self._rows)
            self._rows.clear()


class StepLog:
    """The metrics of the steps, and now and then a line with the time that is left.

    Args:
        log: Where they go.
        plan: What the worker was told.
        device: Of the losses.
        breakdown: To which the steps add their losses by source and noise level.
        throughput: To which they add their tokens.
        begun: Steps that were done before.
    """

    def __init__(
        self,
        log: RunLog,
        plan: Plan,
        device: torch.device,
        breakdown: Breakdown,
        throughput: Throughput,
        begun: int = 0,
    ) -> None:
        self._log = log
        self._plan = plan
        self._breakdown = breakdown
        self._throughput = throughput
        self._sum = torch.zeros((), device=device)
        self._norm = torch.zeros((), device=device)
        self._said = time.monotonic()
        self._written = begun
        self.restart()

    def restart(self) -> None:
        """Forget what was added and how long it took."""
        self._sum.zero_()
        self._steps = self._counted = 0
        self._waited = 0.0
        self._breakdown.restart()
        self._throughput.restart()
        self._started = time.perf_counter()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside takes none of the steps' time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - began

    def add(
        self,
        loss: torch.Tensor,
        norm: torch.Tensor,
        *,
        skipped: bool = False,
        waited: float = 0.0,
    ) -> None:
        """Count one step: this worker's mean loss, and the norm of the gradient over all.

        The loss of a skipped one is left out, for it may be no number. ``waited`` are the seconds
        of it in which there was nothing to compute on.
        """
        self._steps += 1
        self._waited += waited
        self._norm = norm
        self._breakdown.end_step(skipped=skipped)
        if not skipped:
            self._sum += loss
            self._counted += 1

    def read(self, done: int) -> dict[str, float]:
        """Metrics of the steps since the last reading, ``done`` in all; then start anew.

        Every worker calls this at the same step: losses are averaged across them, and are no number
        if all updates were skipped. ``grad_norm`` is that of the last step,
        ``samples_per_second`` counts all workers. ``data_wait`` is the share of the time in which
        this worker waited for samples, ``memory_gb`` the most that it has held so far: of its GPU,
        or of the machine where it has none. ``loss/NAME`` is the mean loss of a source's samples,
        or of those of a quartile of the noise levels, where there were any; for tokens, ``mfu`` and
        dollars see ``Throughput.read``.
        """
        plan = self._plan
        loss = parallel.mean(self._sum / self._counted)  # 0 / 0 is nan
        seconds = time.perf_counter() - self._started
        samples, waited = self._steps * plan.config.batch_size, self._waited
        parts = self._breakdown.read()
        rates = self._throughput.read(samples, seconds)
        self.restart()
        return {
            "loss": loss.item(),
            **parts,
            "samples_per_second": samples / max(seconds, 1e-9),
            **rates,
            "learning_rate": learning_rate_at(plan.config, done - 1, plan.steps),
            "grad_norm": self._norm.item(),
            "data_wait": waited / max(seconds, 1e-9),
            "memory_gb": _most_memory(self._sum.device) / 1e9,
            "epoch": done / plan.steps_per_epoch,
            "progress": done / plan.steps,
        }

    def write(self, done: int, metrics: Mapping[str, float]) -> None:
        """Log ``metrics`` of step ``done``; say them every 15 seconds, and at the end."""
        self._log.add(done, metrics)
        self._log.count((done - self._written) * self._plan.config.batch_size, metrics)
        self._written = done
        now, plan = time.monotonic(), self._plan
        if now - self._said <= _SAY_SECONDS and done != plan.steps:
            return
        self._said = now
        rate = metrics["samples_per_second"]
        left = (plan.steps - done) / (rate / plan.config.batch_size) / 60
        self._log.say(
            f"{plan.config.stage} step {done}/{plan.steps}: loss {metrics['loss']:.4f}, "
            f"{rate:.0f} samples/s, {left:.1f} minutes left"
        )


def _most_memory(device: torch.device) -> float:
    """Bytes that this process has held at most, on its GPU or in the machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


def open_log(plan: Plan, rank: int) -> RunLog:
    """The log of one worker.

    Raises:
        TrackingError: the tracker cannot be reached.
    """
    if rank != 0:
        return RunLog(None)
    tracking = Tracking(plan.tracking_uri, plan.config.tracking.experiment)
    return RunLog(tracking.attach(plan.run_id), find_teller(plan.run_id), plan.config.stage)


def silence_repeats() -> None:
    """Quieten what comes with every batch or report, and is said elsewhere or needs no act."""
    logging.getLogger().setLevel(logging.WARNING)
    for message in ("a prompt of .* tokens is longer", "Grad strides do not match bucket view"):
        warnings.filterwarnings("ignore", message=message)
