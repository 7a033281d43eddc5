"""What a worker says of its stage: to MLflow, and to the driver that shows it."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image

from infra.logs import log
from infra.metrics import of_training
from infra.tracking import Run, Tracking, TrackingError
from training.plan import Plan
from training.progress import Teller, find_teller

SAID = "said"  # the tag that holds what was said last
_SAID_LINES = 20
_FLUSH_SECONDS = 2.0


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
